"""The random numbers of a training step: noise, timesteps, posterior samples of the first stage, dropped prompts."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class RandomStreams:
    """The random numbers of one rank, apart from every other source, so that samples drawn on the side change nothing.

    Args:
        seed, rank: the streams are seeded with seed + rank: no two ranks train on the same noise and timesteps.
        device: where noise is drawn; a run continues to the bit on the same kind of device.
    """

    def __init__(self, seed: int, rank: int, device: torch.device | str):
        self.generator = torch.Generator(device).manual_seed(seed + rank)
        # Another seed for the other generator: on a CPU the two would walk through the same numbers.
        self.prompts = torch.Generator().manual_seed((seed + rank) ^ 0x5EED0FF5)

    def noise_and_timesteps(self, latents: Tensor, timesteps: int) -> tuple[Tensor, Tensor]:
        """Standard normal noise like latents [N, C, h, w], and timesteps int64 [N] uniform in [0, timesteps)."""
        noise = torch.randn(latents.shape, generator=self.generator, device=latents.device, dtype=latents.dtype)
        t = torch.randint(timesteps, (latents.shape[0],), generator=self.generator, device=latents.device)
        return noise, t

    def offset(self, latents: Tensor) -> Tensor:
        """Standard normal noise that is the same in all places of a channel, [N, C, 1, 1], for offset noise."""
        shape = (*latents.shape[:2], 1, 1)
        return torch.randn(shape, generator=self.generator, device=latents.device, dtype=latents.dtype)

    def dropped_prompts(self, count: int, rate: float) -> Tensor:
        """Which of `count` captions become the empty one, each with probability `rate`, as guidance needs it.

        Returns:
            bool [count], on the CPU.
        """
        return torch.rand(count, generator=self.prompts) < rate

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state(), "prompts": self.prompts.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.generator.set_state(state["generator"])
        self.prompts.set_state(state["prompts"])
