"""The noise schedule against diffusers' DDPMScheduler; the controlled U-Net and the loss against their formulas."""

import pytest
import torch
from torch.nn import functional as F

from controlnet.model.diffusion import DiffusionLoss, NoiseSchedule
from tests.controlnet import tiny_run

DIFFUSERS_NAMES = {"linear": "scaled_linear", "sqrt_linear": "linear", "cosine": "squaredcos_cap_v2"}


def noisy_inputs(timesteps=1000):
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(6, 4, 3, 5, generator=generator) for _ in range(2))
    return x0, noise, torch.tensor([0, 1, 10, 500, timesteps - 2, timesteps - 1])


@pytest.mark.parametrize("beta_schedule", DIFFUSERS_NAMES)
@pytest.mark.parametrize("timesteps", [1000, 100])
def test_schedule_equals_diffusers(beta_schedule, timesteps):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(
        num_train_timesteps=timesteps, beta_start=0.00085, beta_end=0.012, beta_schedule=DIFFUSERS_NAMES[beta_schedule]
    )
    ours = NoiseSchedule(timesteps, 0.00085, 0.012, beta_schedule)
    # Theirs is float32: a product of `timesteps` factors, each rounded once.
    torch.testing.assert_close(
        ours.betas.float(), theirs.betas, atol=0, rtol=1e-4 if beta_schedule == "cosine" else 1e-6
    )
    torch.testing.assert_close(ours.alphas_cumprod.float(), theirs.alphas_cumprod, atol=1e-9, rtol=timesteps * 6e-8)
    x0, noise, _ = noisy_inputs()
    t = torch.tensor([0, 1, 10, 50, timesteps - 2, timesteps - 1])
    torch.testing.assert_close(ours.add_noise(x0, noise, t), theirs.add_noise(x0, noise, t), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        NoiseSchedule(timesteps, 0.00085, 0.012, beta_schedule, "v").target(x0, noise, t),
        theirs.get_velocity(x0, noise, t), atol=1e-5, rtol=1e-5,
    )  # fmt: skip


def test_sqrt_schedule_and_given_betas():
    expected = torch.linspace(0.01, 0.04, 7, dtype=torch.float64).sqrt()
    torch.testing.assert_close(NoiseSchedule(7, 0.01, 0.04, "sqrt").betas, expected)
    given = NoiseSchedule(3, given_betas=[0.1, 0.2, 0.5])
    torch.testing.assert_close(given.alphas_cumprod, torch.tensor([0.9, 0.72, 0.36], dtype=torch.float64))


@pytest.mark.parametrize("parameterization", ["eps", "v", "x0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_perfect_prediction_gives_back_image_and_noise(parameterization, dtype):
    schedule = NoiseSchedule(parameterization=parameterization)
    x0, noise, t = noisy_inputs()
    x0, noise = x0.to(dtype), noise.to(dtype)
    x_t = schedule.add_noise(x0, noise, t)
    prediction = schedule.target(x0, noise, t)
    # Dividing by sqrt(alpha_bar) or sqrt(1 - alpha_bar), at worst 1/0.0291 and 1/0.0683, magnifies one rounding of x_t.
    atol = 100 * torch.finfo(dtype).eps * 8
    torch.testing.assert_close(schedule.predict_x0(prediction, x_t, t), x0, atol=atol, rtol=0)
    torch.testing.assert_close(schedule.predict_eps(prediction, x_t, t), noise, atol=atol, rtol=0)
    assert schedule.predict_x0(prediction, x_t, t).dtype == dtype


def test_tables_stay_out_of_the_state_dict():
    assert NoiseSchedule().state_dict() == {}


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"beta_schedule": "liner"}, "beta_schedule is 'liner'; expected one of linear, sqrt_linear, sqrt, cosine"),
        ({"parameterization": "epsilon"}, "parameterization is 'epsilon'; expected one of eps, v, x0"),
        ({"given_betas": [0.1, 0.2]}, "given_betas has 2 values; expected timesteps = 1000"),
        ({"linear_end": 1.5}, r"betas run from 0.00085 to 1.5; expected all in \(0, 1\)"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        NoiseSchedule(**kwargs)


def controlled(tmp_path, *overrides):
    """A model without zero layers, and inputs x, timesteps, context, hint."""
    run = tiny_run.trainer(tiny_run.configuration(tmp_path, *overrides))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 12, 8, 8, generator=generator)
    context = torch.randn(2, 4, 16, generator=generator)
    return run.model, (x, torch.tensor([3, 700]), context, torch.rand(2, 3, 16, 16, generator=generator))


@pytest.mark.parametrize("only_mid_control", [False, True])
def test_controlled_prediction_is_encoder_beside_control_then_decoder(tmp_path, only_mid_control):
    model, (x, t, context, hint) = controlled(tmp_path, f"model.only_mid_control={only_mid_control}")
    h, skips = model.unet.encode(x, t, context)
    residuals = model.control(x, hint, t, context)
    weakened = [residual * (0.5 + 0.1 * i) for i, residual in enumerate(residuals)]
    for scales, control in ((1.0, residuals), ([0.5 + 0.1 * i for i in range(len(residuals))], weakened)):
        expected = model.unet.decode(h, skips, control, t, context, only_mid_control=only_mid_control)
        torch.testing.assert_close(model(x, t, context, hint, scales=scales), expected)
    assert not torch.allclose(model(x, t, context, hint), model.unet(x, t, context), atol=1e-3)


def test_without_control_it_is_the_unet(tmp_path):
    model, (x, t, context, hint) = controlled(tmp_path)
    with torch.no_grad():  # a layer may take another product where gradients are recorded
        alone = model.unet(x, t, context)
        assert torch.equal(model(x, t, context), alone)
        assert torch.equal(model(x, t, context, hint, scales=0), alone)
    torch.testing.assert_close(model(x, t, context), alone, rtol=1e-4, atol=1e-4)  # roundings of some twenty layers
    guided_hint = model.control.encode_hint(hint)
    assert torch.equal(model(x, t, context, guided_hint=guided_hint), model(x, t, context, hint))


def test_a_scale_for_each_sample(tmp_path):
    model, (x, t, context, hint) = controlled(tmp_path)
    mixed = model(x, t, context, hint, scales=torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(mixed[:1], model(x, t, context)[:1])
    torch.testing.assert_close(mixed[1:], model(x, t, context, hint)[1:])


def test_the_locked_encoder_keeps_no_graph(tmp_path):
    model, (x, t, context, hint) = controlled(tmp_path)
    recorded = []
    for block in [*model.unet.input_blocks, model.unet.middle_block]:
        block.register_forward_hook(lambda module, inputs, output: recorded.append(output.requires_grad))
    model(x, t, context, hint).sum().backward()
    assert recorded and not any(recorded)
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("parameterization", ["eps", "v", "x0"])
def test_loss_is_the_mean_squared_error_at_x_t(tmp_path, parameterization):
    model, (latents, t, context, hint) = controlled(tmp_path)
    schedule = NoiseSchedule(parameterization=parameterization)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    signal, sigma = (table[t].float().view(-1, 1, 1, 1) for table in (schedule.signal, schedule.sigma))
    target = {"eps": noise, "x0": latents, "v": signal * noise - sigma * latents}[parameterization]
    prediction = model(signal * latents + sigma * noise, t, context, hint)
    loss = DiffusionLoss(model, schedule)(latents, hint, context, noise, t)
    torch.testing.assert_close(loss, F.mse_loss(prediction, target))
