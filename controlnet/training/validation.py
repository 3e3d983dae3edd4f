"""The grid of samples that a run draws of itself, all ranks together."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from controlnet.inference.images import fault, grid, to_uint8
from controlnet.inference.sampling import ddim
from controlnet.model.controlled import ControlledUNet
from controlnet.model.diffusion import NoiseSchedule
from controlnet.training.distributed import Stopped, StopRequest, World


def _until_stopped(order: Sequence[int], world: World, stop: StopRequest) -> Iterator[int]:
    """The order, until any rank is asked to stop; then all ranks raise Stopped at the same place."""
    for i in order:
        if world.any(stop.requested)[0]:
            raise Stopped
        yield i


@torch.no_grad()
def draw_grid(
    model: ControlledUNet,
    conditioning: Any,
    schedule: NoiseSchedule,
    batch: Mapping[str, Any],
    world: World,
    *,
    images: int,
    steps: int,
    eta: float,
    guidance_scale: float,
    seed: int,
    stop: StopRequest,
) -> tuple[Image.Image, str | None]:
    """Hints, images, their reconstructions by the first stage, and samples, one below the other.

    Every rank must call it; each draws its share, from noise that is the same at every call. The picture is the same on
    all ranks.

    Arguments:
        batch: the rank's latest, of which the first images are taken.
        images: how many in all; rounded up to a multiple of the ranks, and at most the batch of each.
    Returns the picture, and what is wrong with the samples (None when nothing is, see `images.fault`).
    Raises Stopped on all ranks when one of them is asked to stop meanwhile.
    """
    count = min(math.ceil(images / world.size), len(batch["captions"]))
    target, hint = (batch[key][:count].to(world.device) for key in ("images", "hint"))
    captions = list(batch["captions"][:count])
    posterior = torch.Generator(world.device).manual_seed(seed + world.rank)
    latents = conditioning.latents(target, generator=posterior)
    training = model.training
    model.eval()
    try:
        samples = ddim(
            model,
            schedule,
            latents.shape,
            conditioning.context(captions),
            uncond_context=conditioning.context([""] * count),
            hint=hint,
            guidance_scale=guidance_scale,
            steps=steps,
            eta=eta,
            generator=torch.Generator().manual_seed(seed + world.rank),
            progress=lambda order: _until_stopped(order, world, stop),
        )
    finally:
        model.train(training)
    decoded = conditioning.images(samples)
    rows = {
        "hint": to_uint8(hint, low=0.0),
        "image": to_uint8(target),
        "reconstruction": to_uint8(conditioning.images(latents)),
        "sample": to_uint8(decoded),
    }
    picture = grid({label: world.gather_tensor(row) for label, row in rows.items()})
    problems = [problem for problem in world.gather(fault(decoded, samples)) if problem is not None]
    return picture, problems[0] if problems else None
