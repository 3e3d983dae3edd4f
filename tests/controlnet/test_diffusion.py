"""The noise schedule against diffusers' DDPMScheduler."""

import pytest
import torch

from controlnet.diffusion import NoiseSchedule

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
