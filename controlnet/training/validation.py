"""Evaluation during a run, by all ranks together: a grid of samples, and the loss on a validation set."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from controlnet.inference.images import fault, grid, to_uint8
from controlnet.inference.sampling import ddim
from controlnet.model.controlled import ControlledUNet
from controlnet.model.diffusion import DiffusionLoss, NoiseSchedule
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
    """Hints, images (unless the batch is a cached one), their reconstructions by the first stage, and samples.

    Every rank must call it; each draws its share, from noise that is the same at every call. The picture is the same on
    all ranks.

    Args:
        batch: the rank's latest, of which the first images are taken.
        images: how many in all; rounded up to a multiple of the ranks, and at most the batch of each.

    Returns:
        the picture, and what is wrong with the samples (None when nothing is, see `images.fault`).

    Raises:
        Stopped: on all ranks, when one of them is asked to stop meanwhile.
    """
    count = min(math.ceil(images / world.size), len(batch["keys"]))
    batch = {name: value[:count] for name, value in batch.items()}
    hint = batch["hint"].to(world.device)
    posterior = torch.Generator(world.device).manual_seed(seed + world.rank)
    latents = conditioning.batch_latents(batch, posterior)
    everyone = torch.ones(count, dtype=torch.bool)
    context, y = conditioning.batch_condition(batch, ~everyone)
    uncond_context, uncond_y = conditioning.batch_condition(batch, everyone)
    training = model.training
    model.eval()
    try:
        samples = ddim(
            model,
            schedule,
            latents.shape,
            context,
            uncond_context=uncond_context,
            y=y,
            uncond_y=uncond_y,
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
    rows = {"hint": to_uint8(hint, low=0.0)}
    if "images" in batch:
        rows["image"] = to_uint8(batch["images"].to(world.device))
    rows |= {"reconstruction": to_uint8(conditioning.images(latents)), "sample": to_uint8(decoded)}
    picture = grid({label: world.gather_tensor(row) for label, row in rows.items()})
    problems = [problem for problem in world.gather(fault(decoded, samples)) if problem is not None]
    return picture, problems[0] if problems else None


class Validation:
    """The loss on a validation set, at noise and timesteps that are the same at every measurement.

    It is the plain mean squared error, without model.offset_noise and model.min_snr_gamma: runs that differ in these
    compare.

    Args:
        make_batches: () -> the set's batches of this rank, from its first one, as many on every rank.
        batches: at most so many of each rank; None for all.
        seed: of the noise and the timesteps, with the rank.
    """

    def __init__(self, make_batches: Callable[[], Iterable[Mapping[str, Any]]], batches: int | None, seed: int):
        self.make_batches, self.batches, self.seed = make_batches, batches, seed

    @torch.no_grad()
    def loss(
        self, model: ControlledUNet, conditioning: Any, schedule: NoiseSchedule, world: World, stop: StopRequest
    ) -> float:
        """The mean loss over the set, the same on all ranks. Every rank must call it.

        Raises:
            Stopped: on all ranks, when one of them is asked to stop meanwhile.
        """
        loss, training = DiffusionLoss(model, schedule), model.training
        generator = torch.Generator(world.device).manual_seed(self.seed + world.rank)
        losses: list[Tensor] = []
        model.eval()
        try:
            for batch in itertools.islice(self.make_batches(), self.batches):
                if world.any(stop.requested)[0]:
                    raise Stopped
                latents = conditioning.batch_latents(batch, generator)
                context, y = conditioning.batch_condition(batch, torch.zeros(len(batch["keys"]), dtype=torch.bool))
                noise = torch.randn(latents.shape, generator=generator, device=latents.device)
                t = torch.randint(schedule.timesteps, (len(latents),), generator=generator, device=latents.device)
                hint = batch["hint"].to(world.device, non_blocking=True)
                losses.append(loss(latents, hint, context, noise, t, y))
        finally:
            model.train(training)
        return world.mean(torch.stack(losses).mean()).item()
