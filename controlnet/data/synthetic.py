"""Made-up samples of the configured size, for trying a configuration or a machine without data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from controlnet.data.samples import Transform
from controlnet.data.shards import DataError


class SyntheticLoader:
    """Stands for `ShardLoader`: uniform noise as image and hint, a function of the sample's number, not cropped.

    Args:
        data: the section `data`; its crop gives the size, `synthetic_data_length` the samples in an epoch.
        factor, batch_size, rank, world_size, start, hint_channels: as `build_loader`.

    Raises:
        DataError: fewer samples than one batch of each rank.
    """

    def __init__(
        self,
        data: Mapping[str, Any],
        *,
        factor: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        start: Mapping[str, Any] | None = None,
        hint_channels: int = 3,
    ):
        length, whole = data["synthetic_data_length"], batch_size * world_size
        if length < whole:
            raise DataError(f"data.synthetic_data_length is {length}; expected at least {whole}, a batch of each rank")
        self.size = Transform.from_config(data["train"]["augmentations"], factor).crop
        self.batch_size, self.rank, self.world_size, self.hint_channels = batch_size, rank, world_size, hint_channels
        self.epoch_batches = length // whole
        self.next = start["next"] if start else 0
        self.drops: dict[str, dict[str, int]] = {}

    @property
    def epoch(self) -> int:
        return self.next // self.epoch_batches

    @property
    def position(self) -> dict[str, int]:
        return {"next": self.next}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        end = (self.epoch + 1) * self.epoch_batches
        while self.next < end:
            number = (self.next % self.epoch_batches) * self.world_size + self.rank
            generator = torch.Generator().manual_seed(number)
            images = torch.rand(self.batch_size, 3, *self.size, generator=generator) * 2 - 1
            hint = torch.rand(self.batch_size, self.hint_channels, *self.size, generator=generator)
            keys = [f"synthetic-{number * self.batch_size + i}" for i in range(self.batch_size)]
            self.next += 1
            captions = ["a synthetic sample"] * self.batch_size
            time_ids = torch.tensor([[*self.size, 0, 0, *self.size]] * self.batch_size)
            yield {"images": images, "hint": hint, "captions": captions, "keys": keys, "time_ids": time_ids}
