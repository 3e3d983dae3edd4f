"""Sampling against diffusers' schedulers, and guidance against its formula."""

import pytest
import torch
from torch import nn

from controlnet.inference.sampling import control_scales, ddim, ddim_timesteps, guided, sample_with_scheduler
from controlnet.model.diffusion import NoiseSchedule

SHAPE = (2, 4, 5, 7)
PREDICTION_TYPES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}


class Predictor(nn.Module):
    """Stands for a controlled U-Net: a smooth nonlinear function of all its inputs that records how it was called."""

    def __init__(self, outputs=13):
        super().__init__()
        self.control = nn.Module()
        self.control.zero_convs = nn.ModuleList(nn.Identity() for _ in range(outputs - 1))
        self.control.encode_hint = self._encode_hint
        self.calls, self.hints_encoded, self.contexts_prepared = [], 0, 0

    def _encode_hint(self, hint):
        self.hints_encoded += 1
        return hint.mean(dim=(1, 2, 3))

    def prepare_context(self, context):
        self.contexts_prepared += 1
        return context * 1

    def forward(self, x, timesteps, context, hint=None, *, guided_hint=None, scales=1.0):
        self.calls.append({"batch": x.shape[0], "timesteps": timesteps.clone(), "scales": scales})
        every = scales if isinstance(scales, (list, tuple)) else [scales]
        strength = sum(torch.as_tensor(scale, dtype=torch.float32) for scale in every) / len(every)
        level = context.mean(dim=(1, 2)) + (0 if guided_hint is None else strength * guided_hint)  # [N]
        return torch.tanh(0.7 * x + level.view(-1, 1, 1, 1)) + timesteps.view(-1, 1, 1, 1) / 3000


def inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    context, uncond = (torch.randn(SHAPE[0], 3, 6, generator=generator) for _ in range(2))
    return context, uncond, torch.rand(SHAPE[0], 3, 40, 56, generator=generator)


@pytest.mark.parametrize("steps", [1, 4, 30, 50, 1000])
@pytest.mark.parametrize("parameterization", ["eps", "v", "x0"])
def test_ddim_equals_diffusers(steps, parameterization):
    diffusers = pytest.importorskip("diffusers")
    # At steps == 1000 the offset of one would leave the schedule; diffusers then indexes past its end.
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=0 if steps == 1000 else 1, prediction_type=PREDICTION_TYPES[parameterization],
    )  # fmt: skip
    schedule = NoiseSchedule(parameterization=parameterization)
    model, (context, uncond, hint) = Predictor(), inputs()
    kwargs = {"uncond_context": uncond, "hint": hint, "guidance_scale": 3.0}
    x_T = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    ours = ddim(model, schedule, SHAPE, context, steps=steps, x_T=x_T, **kwargs)

    predict, theirs = guided(model, context, **kwargs), x_T.clone()
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == ddim_timesteps(1000, steps)[::-1]
    for t in scheduler.timesteps:
        theirs = scheduler.step(predict(theirs, t.expand(SHAPE[0])), t, theirs, return_dict=False)[0]
    # float32 against float64 tables, over up to 1000 steps of a contraction.
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def test_ddim_noise_equals_diffusers():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    model, (context, _, _) = Predictor(), inputs()
    ours = ddim(model, NoiseSchedule(), SHAPE, context, steps=20, eta=0.8, generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    predict, theirs = guided(model, context), torch.randn(SHAPE, generator=generator)
    scheduler.set_timesteps(20)
    for t in scheduler.timesteps:
        prediction = predict(theirs, t.expand(SHAPE[0]))
        noise = torch.randn(SHAPE, generator=generator)
        theirs = scheduler.step(prediction, t, theirs, eta=0.8, variance_noise=noise, return_dict=False)[0]
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["DDIMScheduler", "UniPCMultistepScheduler", "EulerDiscreteScheduler"])
def test_diffusers_schedulers_find_the_exact_sample(name):
    """With the exact noise of a single known image as the prediction, every sampler must land on that image."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = getattr(diffusers, name)(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1,
        **({"clip_sample": False, "set_alpha_to_one": False} if name == "DDIMScheduler" else {}),
    )  # fmt: skip
    schedule = NoiseSchedule()
    image = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))

    def exact(x, t):
        signal, sigma = schedule.signal[t].view(-1, 1, 1, 1), schedule.sigma[t].view(-1, 1, 1, 1)
        return ((x - signal * image) / sigma).float()

    sample = sample_with_scheduler(
        scheduler, exact, SHAPE, steps=20, generator=torch.Generator().manual_seed(3), device="cpu"
    )
    # What is left is the noise of the last level, sqrt(1 - alpha_bar_0) = 0.029 (Euler and UniPC go to zero).
    assert (sample - image).abs().max() < 0.2
    assert (sample - image).std() < 0.05


def test_every_step_is_visited_once_and_downwards():
    model, (context, _, _) = Predictor(), inputs()
    ddim(model, NoiseSchedule(), SHAPE, context, steps=50, generator=torch.Generator().manual_seed(0))
    assert [int(call["timesteps"][0]) for call in model.calls] == list(range(981, 0, -20))


def test_guidance_is_one_batch_and_its_formula():
    model, (context, uncond, hint) = Predictor(), inputs()
    x, t = torch.randn(SHAPE), torch.tensor([400, 7])
    guided_hint = model.control.encode_hint(hint)
    cond = model(x, t, context, guided_hint=guided_hint)
    unguided = model(x, t, uncond, guided_hint=guided_hint)
    model.calls.clear()
    predict = guided(model, context, uncond_context=uncond, hint=hint, guidance_scale=4.5)
    torch.testing.assert_close(predict(x, t), unguided + 4.5 * (cond - unguided))
    assert [call["batch"] for call in model.calls] == [2 * SHAPE[0]]
    torch.testing.assert_close(guided(model, context, uncond_context=uncond, hint=hint, guidance_scale=1)(x, t), cond)
    assert model.calls[-1]["batch"] == SHAPE[0]


def test_hint_and_context_are_encoded_once():
    model, (context, uncond, hint) = Predictor(), inputs()
    ddim(model, NoiseSchedule(), SHAPE, context, uncond_context=uncond, hint=hint, steps=10)
    assert (model.hints_encoded, model.contexts_prepared) == (1, 1)
    assert len(model.calls) == 10


def test_guess_mode_controls_only_the_conditional_half_with_the_original_curve():
    model, (context, uncond, hint) = Predictor(), inputs()
    x, t = torch.randn(SHAPE), torch.tensor([400, 7])
    predict = guided(model, context, uncond_context=uncond, hint=hint, guidance_scale=3, scales=0.5, guess_mode=True)
    predict(x, t)
    for i, scale in enumerate(model.calls[-1]["scales"]):
        expected = 0.5 * 0.825 ** (12 - i)
        torch.testing.assert_close(scale, torch.tensor([0, 0, expected, expected], dtype=torch.float32))


def test_control_scales():
    assert control_scales(13, 0.7) == [0.7] * 13
    assert control_scales(3, 2.0, [1, 0, 0.5]) == [2.0, 0.0, 1.0]
    assert control_scales(13, guess_mode=True) == [0.825 ** (12 - i) for i in range(13)]
    with pytest.raises(ValueError, match="scales has 12 values; expected 13"):
        control_scales(13, scales=[1.0] * 12)


def test_same_seed_same_sample():
    model, (context, _, _) = Predictor(), inputs()
    first, second, other = (
        ddim(model, NoiseSchedule(), SHAPE, context, steps=3, eta=1.0, generator=torch.Generator().manual_seed(seed))
        for seed in (4, 4, 5)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_bad_arguments():
    model, (context, uncond, hint) = Predictor(), inputs()
    with pytest.raises(ValueError, match="steps is 0; expected 1 to 1000"):
        ddim(model, NoiseSchedule(), SHAPE, context, steps=0)
    with pytest.raises(ValueError, match="steps is 1001; expected 1 to 1000"):
        ddim_timesteps(1000, 1001)
    with pytest.raises(ValueError, match="eta is -1"):
        ddim(model, NoiseSchedule(), SHAPE, context, steps=2, eta=-1)
    with pytest.raises(ValueError, match=r"hint has batch size 1; expected that of context, 2"):
        guided(model, context, hint=hint[:1])
    with pytest.raises(ValueError, match=r"uncond_context is \(2, 2, 6\); expected the shape of context, \(2, 3, 6\)"):
        guided(model, context, uncond_context=uncond[:, :2])
    y = torch.ones(2, 5)
    for wrong, got in ((None, "None"), (y[:1], r"\(1, 5\)")):
        with pytest.raises(ValueError, match=rf"uncond_y is {got}; expected the shape of y, \(2, 5\)"):
            guided(model, context, uncond_context=uncond, y=y, uncond_y=wrong)
