"""The noise schedule, the controlled U-Net, and the loss: the whole of a training step, to be read on one screen."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from controlnet.layers import Prepared

BETA_SCHEDULES = ("linear", "sqrt_linear", "sqrt", "cosine")
PARAMETERIZATIONS = ("eps", "v", "x0")


def make_betas(
    beta_schedule: str, timesteps: int, linear_start: float, linear_end: float, cosine_s: float = 8e-3
) -> Tensor:
    """The variances beta_t of the forward process, float64 [timesteps].

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

    Arguments:
        timesteps: number of noise levels T; a timestep t is an integer in [0, T).
        linear_start, linear_end: first and last beta of the linear schedules.
        beta_schedule: see `make_betas`.
        parameterization: "eps" predicts the noise, "x0" the clean latent x_0, and
            "v" sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x_0.
        cosine_s: offset of the cosine schedule.
        given_betas: [timesteps] betas that replace the schedule.
    Raises ValueError for an unknown name, or betas outside (0, 1) or not `timesteps` many.

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
        """The schedule of a `model` section, whose keys have the names of the arguments."""
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
        """x_t for clean latents x0 [N, C, H, W], noise of the same shape and timesteps t int64 [N]."""
        signal, sigma = self._coefficients(t, x0)
        return signal * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should answer at x_t (arguments as `add_noise`)."""
        if self.parameterization == "eps":
            return noise
        if self.parameterization == "x0":
            return x0
        signal, sigma = self._coefficients(t, x0)
        return signal * noise - sigma * x0

    def predict_x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The clean latent that a prediction at x_t implies."""
        if self.parameterization == "x0":
            return prediction
        signal, sigma = self._coefficients(t, x_t)
        if self.parameterization == "v":
            return signal * x_t - sigma * prediction
        return (x_t - sigma * prediction) / signal

    def predict_eps(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise that a prediction at x_t implies."""
        if self.parameterization == "eps":
            return prediction
        signal, sigma = self._coefficients(t, x_t)
        if self.parameterization == "v":
            return signal * prediction + sigma * x_t
        return (x_t - signal * prediction) / sigma


class ControlledUNet(nn.Module):
    """The locked U-Net with a ControlNet beside its encoder.

    h, skips = encode(x);  control = ControlNet(x, hint)
    prediction = decode(h + scale_mid * control_mid, [skip_i + scale_i * control_i])

    Arguments:
        unet: UNet. Its encoder and middle block are never trained and run without gradients.
        control: ControlNet, all trained.
        sd_locked: True freezes the U-Net's decoder (`output_blocks`, `out`) too; False trains it.
        only_mid_control: only the middle block is controlled. The zero convolutions of the skips then cannot receive
            a gradient and are frozen: every parameter that requires a gradient gets one, as DDP wants it.
    """

    def __init__(self, unet: nn.Module, control: nn.Module, *, sd_locked: bool = True, only_mid_control: bool = False):
        super().__init__()
        self.unet = unet
        self.control = control
        self.sd_locked = sd_locked
        self.only_mid_control = only_mid_control
        self.unet.requires_grad_(False)
        self.control.requires_grad_(True)
        if not sd_locked:
            self.unet.output_blocks.requires_grad_(True)
            self.unet.out.requires_grad_(True)
        if only_mid_control:
            self.control.zero_convs.requires_grad_(False)

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that the optimizer updates."""
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

    def prepare_context(self, context: Tensor) -> Tensor | tuple[Prepared, Prepared]:
        """The keys and values of a context [N, T, D] in both models: the `context` of any number of calls."""
        if not self.unet.arch.use_spatial_transformer:
            return context  # which nothing reads
        return self.unet.prepare_context(context), self.control.prepare_context(context)

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor | tuple[Prepared, Prepared],
        hint: Tensor | None = None,
        *,
        guided_hint: Tensor | None = None,
        scales: float | Tensor | Sequence[float | Tensor] = 1.0,
    ) -> Tensor:
        """The prediction [N, C, h, w] at x.

        Arguments:
            x: [N, C, h, w] noisy latents.
            timesteps: int64 [N].
            context: [N, T, D] text states, or `prepare_context` of them.
            hint: [N, 3, H, W] in [0, 1]; None with guided_hint None gives the uncontrolled prediction.
            guided_hint: `control.encode_hint(hint)`, computed once for many calls.
            scales: strength of the control, one for all outputs or one each: a number, a tensor 0-d or [N], or a mask
                [N, 1, h, w]. The number 0 skips the ControlNet altogether.
        """
        context, control_context = context if isinstance(context, tuple) else (context, context)
        with torch.no_grad():
            embedding = self.unet.embed(timesteps)
            h, skips = self.unet.encode(x, timesteps, context, embedding=embedding)
        uncontrolled = hint is None and guided_hint is None
        if uncontrolled or (isinstance(scales, (int, float)) and scales == 0):
            return self.unet.decode(h, skips, None, timesteps, context, embedding=embedding)
        if self.only_mid_control:  # nothing is computed for a scale of 0
            middle = scales[-1] if isinstance(scales, (list, tuple)) else scales
            scales = [0] * len(skips) + [middle]
        controlled = self.control(
            x, hint, timesteps, control_context, residuals=[*skips, h], scales=scales, guided_hint=guided_hint
        )
        return self.unet.decode(controlled[-1], controlled[:-1], None, timesteps, context, embedding=embedding)


class DiffusionLoss(nn.Module):
    """Mean squared error between the prediction at x_t and the schedule's target: what a training step computes."""

    def __init__(self, model: ControlledUNet, schedule: NoiseSchedule):
        super().__init__()
        self.model = model
        self.schedule = schedule

    def forward(self, latents: Tensor, hint: Tensor, context: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The loss, a float32 scalar.

        Arguments:
            latents: float32 [N, C, h, w], scaled as the first stage says.
            hint: [N, 3, H, W] in [0, 1].
            context: [N, T, D].
            noise: float32 [N, C, h, w], standard normal.
            timesteps: int64 [N], uniform over the schedule.
        """
        x_t = self.schedule.add_noise(latents, noise, timesteps)
        prediction = self.model(x_t, timesteps, context, hint)
        return F.mse_loss(prediction.float(), self.schedule.target(latents, noise, timesteps))
