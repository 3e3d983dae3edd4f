"""Draws images with a trained ControlNet: `generate` carries out a `Request`."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from controlnet.common.extras import require
from controlnet.inference.sampling import control_scales, ddim, guided, sample_with_scheduler
from controlnet.model.controlled import ControlledUNet
from controlnet.model.diffusion import NoiseSchedule

SCHEDULERS = {"DDIM": "DDIMScheduler", "UniPC": "UniPCMultistepScheduler", "Euler": "EulerDiscreteScheduler"}
PREDICTION_TYPES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}


@dataclasses.dataclass(frozen=True)
class Request:
    """The prompt and the settings of one drawing.

    prompt, negative_prompt: texts of the conditional and the unconditional half.
    strength, scales: of the control: one factor for all outputs, and one each (13 for Stable Diffusion).
    guess_mode: control only the conditional half, the shallow outputs weaker; see `sampling.control_scales`.
    guidance_scale, steps, eta: see `sampling.ddim`.
    seed: image i starts from the noise of seed + i.
    scheduler: None for the DDIM of this package, or a name of SCHEDULERS for that of diffusers.
    graph: run the steps as one CUDA graph; see `controlnet.inference.graph.StepGraph`.
    """

    prompt: str
    negative_prompt: str = ""
    strength: float = 1.0
    scales: Sequence[float] | None = None
    guess_mode: bool = False
    guidance_scale: float = 7.5
    steps: int = 50
    eta: float = 0.0
    seed: int = 0
    images: int = 1
    scheduler: str | None = None
    graph: bool = False


def generate(
    model: ControlledUNet,
    conditioning: Any,
    schedule: NoiseSchedule,
    hint: Tensor,
    request: Request,
    progress: Any = lambda order: order,
) -> tuple[Tensor, Tensor]:
    """Draws images: returns them, [N, 3, H, W] in [-1, 1], and the latents that they are decoded from.

    Args:
        conditioning: a `controlnet.conditioning.Conditioning`.
        hint: [1, C, H, W] in [0, 1], of the size of the images; those of several ControlNets joined along C.
    Raises ValueError for a size that the first stage cannot take, or another number of scales than control outputs.
    """
    factor, n = conditioning.factor, request.images
    height, width = hint.shape[2:]
    check_size(hint, factor)
    shape = (n, conditioning.latent_channels, height // factor, width // factor)
    seeds = [torch.Generator().manual_seed(request.seed + i) for i in range(n)]
    x_T = torch.cat([torch.randn(1, *shape[1:], generator=seed) for seed in seeds])
    # Stable Diffusion XL is told of a picture of this size that was not cropped
    time_ids = torch.tensor([[height, width, 0, 0, height, width]] * n)
    context, y = conditioning.condition([request.prompt] * n, time_ids)
    uncond_context, uncond_y = conditioning.condition([request.negative_prompt] * n, time_ids)
    guidance = {
        "uncond_context": uncond_context,
        "y": y,
        "uncond_y": uncond_y,
        "hint": hint.expand(n, -1, -1, -1).to(context.device),
        "guidance_scale": request.guidance_scale,
        "scales": control_scales(len(model.control.zero_convs) + 1, request.strength, request.scales),
        "guess_mode": request.guess_mode,
        "graph": request.graph,
    }
    sampling = {"steps": request.steps, "generator": seeds[0], "x_T": x_T, "progress": progress}
    if request.scheduler is None:
        latents = ddim(model, schedule, shape, context, eta=request.eta, **guidance, **sampling)
    else:
        scheduler = diffusers_scheduler(request.scheduler, schedule)
        predict = guided(model, context, **guidance)
        latents = sample_with_scheduler(scheduler, predict, shape, device=context.device, **sampling)
    return conditioning.images(latents), latents


def check_size(hint: Tensor, factor: int) -> None:
    """Raises ValueError unless the hint's sides are multiples of the first stage's factor."""
    height, width = hint.shape[2:]
    if height % factor or width % factor:
        near = " x ".join(str(max(factor, round(side / factor) * factor)) for side in (width, height))
        raise ValueError(
            f"the hint is {width} x {height} pixels; expected multiples of {factor}, such as {near} (see --size)"
        )


def diffusers_scheduler(name: str, schedule: NoiseSchedule) -> Any:
    """Makes a scheduler of diffusers with this schedule's betas and prediction, and Stable Diffusion's timesteps."""
    if name not in SCHEDULERS:
        raise ValueError(f"scheduler is {name!r}; expected one of {', '.join(SCHEDULERS)}")
    require("diffusers", extra="diffusers", wanted_by=f"it has the scheduler {name}")
    import diffusers

    own = {"clip_sample": False, "set_alpha_to_one": False} if name == "DDIM" else {}
    return getattr(diffusers, SCHEDULERS[name])(
        num_train_timesteps=schedule.timesteps,
        trained_betas=schedule.betas.float().cpu().numpy(),
        prediction_type=PREDICTION_TYPES[schedule.parameterization],
        timestep_spacing="leading",
        steps_offset=1,
        **own,
    )
