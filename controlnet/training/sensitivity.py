"""Control sensitivity: how much the prediction depends on the hint."""

import torch
from torch import Tensor, nn

from controlnet.model.controlled import ControlledUNet
from controlnet.model.diffusion import NoiseSchedule

SAMPLES = 4  # enough for a trend; the cost is two forward passes of this many


class Sensitivity(nn.Module):
    """`control_sensitivity` of the first samples of a training batch; called as `DiffusionLoss` is.

    Not a part of the loss, so that it can be compiled by itself.
    """

    def __init__(self, model: ControlledUNet, schedule: NoiseSchedule):
        super().__init__()
        self._parts = model, schedule  # a tuple: no submodules, whose parameters would be counted twice

    @torch.no_grad()
    def forward(
        self,
        latents: Tensor,
        hint: Tensor,
        context: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        y: Tensor | None = None,
    ) -> Tensor:
        model, schedule = self._parts
        latents, hint, context, noise, timesteps = (x[:SAMPLES] for x in (latents, hint, context, noise, timesteps))
        x_t = schedule.add_noise(latents, noise, timesteps)
        return control_sensitivity(model, x_t, timesteps, context, hint, None if y is None else y[:SAMPLES])


@torch.no_grad()
def control_sensitivity(
    model: ControlledUNet, x: Tensor, timesteps: Tensor, context: Tensor, hint: Tensor, y: Tensor | None = None
) -> Tensor:
    """How much the prediction changes when the hint is removed: 0 is a model that ignores its control.

    |prediction(hint) - prediction(none)| / |prediction(none)|, Frobenius norms over the batch; a float32 scalar.
    It is exactly 0 before the first update, since the zero convolutions are, and for a U-Net that predicts nothing.
    """
    training = model.training
    model.eval()
    free = model(x, timesteps, context, y=y).float()
    controlled = model(x, timesteps, context, hint, y=y).float()
    model.train(training)
    return (controlled - free).norm() / free.norm().clamp_min(torch.finfo(torch.float32).tiny)
