"""The noise schedule and the loss of a training step."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from controlnet.model.controlled import ControlledUNet

BETA_SCHEDULES = ("linear", "sqrt_linear", "sqrt", "cosine")
PARAMETERIZATIONS = ("eps", "v", "x0")


def make_betas(
    beta_schedule: str, timesteps: int, linear_start: float, linear_end: float, cosine_s: float = 8e-3
) -> Tensor:
    """Returns the variances beta_t of the forward process, float64 [timesteps].

    "linear" is linear in sqrt(beta), as Stable Diffusion was trained (diffusers calls it "scaled_linear");
    "sqrt_linear" is linear in beta; "sqrt" is the square root of that; "cosine" follows
    alpha_bar(t) = cos^2((t/T + s) / (1 + s) * pi/2). The names are those of the latent-diffusion code, misnomers
    included, so that its configuration files keep their meaning.
    """
    if beta_schedule == "linear":
        return torch.linspace(linear_start**0.5, linear_end**0.5, timesteps, dtype=torch.float64) ** 2
    if beta_schedule == "sqrt_linear":
        return torch.linspace(linear_start, linear_end, timesteps, dtype=torch.float64)
    if beta_schedule == "sqrt":
        return torch.linspace(linear_start, linear_end, timesteps, dtype=torch.float64) ** 0.5
    if beta_schedule == "cosine":
        t = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps + cosine_s
        alpha_bar = torch.cos(t / (1 + cosine_s) * math.pi / 2) ** 2
        return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(0, 0.999)
    raise ValueError(f"beta_schedule is {beta_schedule!r}; expected one of {', '.join(BETA_SCHEDULES)}")


class NoiseSchedule(nn.Module):
    """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise, and what the network is asked to predict from x_t.

    Args:
        timesteps: number of noise levels T; a timestep t is an integer in [0, T).
        linear_start, linear_end: first and last beta of the linear schedules.
        beta_schedule: see `make_betas`.
        parameterization: "eps" predicts the noise, "x0" the clean latent x_0, and
            "v" sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x_0.
        cosine_s: offset of the cosine schedule.
        given_betas: [timesteps] betas that replace the schedule.

    Raises:
        ValueError: an unknown name, or betas outside (0, 1) or not `timesteps` many.

    The tables are float64 buffers outside the state_dict (old checkpoints carry float32 copies, which are not read).
    """

    def __init__(
        self,
        timesteps: int = 1000,
        linear_start: float = 0.00085,
        linear_end: float = 0.0120,
        beta_schedule: str = "linear",
        parameterization: str = "eps",
        cosine_s: float = 8e-3,
        given_betas: Sequence[float] | None = None,
    ):
        super().__init__()
        if parameterization not in PARAMETERIZATIONS:
            expected = ", ".join(PARAMETERIZATIONS)
            raise ValueError(f"parameterization is {parameterization!r}; expected one of {expected}")
        if given_betas is None:
            betas = make_betas(beta_schedule, timesteps, linear_start, linear_end, cosine_s)
        else:
            betas = torch.as_tensor(list(given_betas), dtype=torch.float64)
            if betas.shape != (timesteps,):
                raise ValueError(f"given_betas has {betas.numel()} values; expected timesteps = {timesteps}")
        if not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError(
                f"betas run from {betas.min().item():.3g} to {betas.max().item():.3g}; expected all in (0, 1)"
                " (linear_start, linear_end, given_betas)"
            )
        self.timesteps = timesteps
        self.parameterization = parameterization
        alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        self.register_buffer("betas", betas, persistent=False)
        self.register_buffer("alphas_cumprod", alphas_cumprod, persistent=False)
        self.register_buffer("signal", alphas_cumprod.sqrt(), persistent=False)
        self.register_buffer("sigma", (1 - alphas_cumprod).sqrt(), persistent=False)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "NoiseSchedule":
        """Makes the schedule of a configuration's `model` section, whose keys have the names of the arguments."""
        return cls(
            config["timesteps"],
            config["linear_start"],
            config["linear_end"],
            config["beta_schedule"],
            config["parameterization"],
            config["cosine_s"],
            config["given_betas"],
        )

    def _coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1,) + (1,) * (like.dim() - 1)
        return self.signal[t].to(like.dtype).view(shape), self.sigma[t].to(like.dtype).view(shape)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Returns x_t of clean latents x0 [N, C, H, W], noise of the same shape and timesteps t int64 [N]."""
        signal, sigma = self._coefficients(t, x0)
        return signal * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Returns the network's training target at x_t (arguments as `add_noise`)."""
        if self.parameterization == "eps":
            return noise
        if self.parameterization == "x0":
            return x0
        signal, sigma = self._coefficients(t, x0)
        return signal * noise - sigma * x0

    def min_snr_weights(self, t: Tensor, gamma: float) -> Tensor:
        """Weights of the samples' squared errors, float32 [N], by min-SNR-gamma (Hang et al., arXiv:2303.09556).

        snr = alpha_bar / (1 - alpha_bar). An error in x_0 weighs min(snr, gamma); one in the noise is snr times, and
        one in v snr + 1 times as large, hence min(snr, gamma) / snr and min(snr, gamma) / (snr + 1).
        """
        alpha_bar = self.alphas_cumprod[t]
        snr = alpha_bar / (1 - alpha_bar)
        scale = {"x0": 1.0, "eps": snr, "v": snr + 1}[self.parameterization]
        return (snr.clamp(max=gamma) / scale).float()

    def predict_x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Computes the clean latent from a prediction at x_t."""
        if self.parameterization == "x0":
            return prediction
        signal, sigma = self._coefficients(t, x_t)
        if self.parameterization == "v":
            return signal * x_t - sigma * prediction
        return (x_t - sigma * prediction) / signal

    def predict_eps(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Computes the noise from a prediction at x_t."""
        if self.parameterization == "eps":
            return prediction
        signal, sigma = self._coefficients(t, x_t)
        if self.parameterization == "v":
            return signal * prediction + sigma * x_t
        return (x_t - signal * prediction) / sigma


class DiffusionLoss(nn.Module):
    """The training loss: mean squared error between the prediction at x_t and the schedule's target.

    Args:
        min_snr_gamma: weighs each sample's error as `NoiseSchedule.min_snr_weights` says; None weighs all alike.
    """

    def __init__(self, model: ControlledUNet, schedule: NoiseSchedule, min_snr_gamma: float | None = None):
        super().__init__()
        self.model = model
        self.schedule = schedule
        self.min_snr_gamma = min_snr_gamma

    def forward(
        self,
        latents: Tensor,
        hint: Tensor,
        context: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        y: Tensor | None = None,
    ) -> Tensor:
        """Returns the loss, a float32 scalar.

        Args:
            latents: float32 [N, C, h, w], scaled as the first stage says.
            hint: [N, 3, H, W] in [0, 1].
            context: [N, T, D].
            noise: float32 [N, C, h, w], standard normal.
            timesteps: int64 [N], uniform over the schedule.
            y: [N, adm_in_channels], of a model with `num_classes` (Stable Diffusion XL).
        """
        x_t = self.schedule.add_noise(latents, noise, timesteps)
        prediction = self.model(x_t, timesteps, context, hint, y=y)
        target = self.schedule.target(latents, noise, timesteps)
        if self.min_snr_gamma is None:
            return F.mse_loss(prediction.float(), target)
        errors = F.mse_loss(prediction.float(), target, reduction="none").flatten(1).mean(1)
        return (self.schedule.min_snr_weights(timesteps, self.min_snr_gamma) * errors).mean()
