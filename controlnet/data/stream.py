"""What each worker reads, and in which order: it follows from (seed, epoch, rank, worker), and can be resumed anywhere.

The batches of a rank are numbered 0, 1, 2, ... and worker `number % workers` makes each. In an epoch a worker goes
through its shards, shuffles within a buffer, and starts another lap where its shards hold fewer good samples than its
share of the epoch. How far it has come is thus three numbers (epoch, lap, samples taken), sent with every batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from controlnet.data.samples import BadSample, Resolution, Transform, read_sample
from controlnet.data.shards import DataError, Drop, Sample, index_shard

FEWEST_TO_JUDGE = 100  # below this many samples, a bad fraction is taken of this many


class Plan(NamedTuple):
    """All that the order and the content of a rank's batches follow from; see `loader.build_loader`."""

    shards: list[str]
    extensions: tuple[tuple[str, str], ...]  # (extension, role)
    ignored: tuple[str, ...]
    formats: dict[str, str]  # role -> Pillow's name of its image format
    transform: Transform
    resolution: Resolution | None
    max_bad_fraction: float
    fixed_shards: bool
    infinite: bool
    shuffle_buffer: int
    seed: int
    rank: int
    world_size: int
    workers: int
    batch_size: int
    epoch_batches: int


class Cursor(NamedTuple):
    """How far a worker has come: samples taken, good or bad, in this lap through its shards in this epoch."""

    epoch: int
    lap: int
    taken: int


class Message(NamedTuple):
    """What a worker sends: a batch or an error, where the worker stands now, what it dropped since its last batch."""

    batch: dict[str, Any] | None
    cursor: Cursor | None
    drops: list[Drop]
    error: str | None = None


class _Decoded(NamedTuple):
    image: np.ndarray
    hint: np.ndarray
    caption: str
    key: str


class WorkerStream(IterableDataset):
    """The endless batches of each worker.

    Args:
        plan: see `Plan`.
        first: number of the first batch.
        cursors: where each of the plan's workers stands before it.
    """

    def __init__(self, plan: Plan, first: int, cursors: list[Cursor]):
        self.plan, self.first, self.cursors = plan, first, cursors
        self.drops: list[Drop] = []
        self.known_bad: set[tuple[str, str]] = set()
        self.seen: dict[str, int] = {}  # samples, good or bad, in each shard opened so far

    def __iter__(self) -> Iterator[Message]:
        info = get_worker_info()
        number = self.first + (0 if info is None else info.id)
        worker = number % self.plan.workers
        try:
            for batch, cursor in self._batches(worker, number):
                drops, self.drops = self.drops, []
                yield Message(batch, cursor, drops)
        except DataError as error:
            yield Message(None, None, self.drops, str(error))

    def _batches(self, worker: int, number: int) -> Iterator[tuple[dict[str, Any], Cursor]]:
        plan, cursor, samples, found = self.plan, self.cursors[worker], None, False
        while True:
            epoch = number // plan.epoch_batches
            if cursor.epoch != epoch:
                cursor, samples = Cursor(epoch, 0, 0), None
            good: list[_Decoded] = []
            while len(good) < plan.batch_size:
                if samples is None:
                    samples = itertools.islice(self._order(worker, cursor), cursor.taken, None)
                    found = cursor.taken > 0
                sample = next(samples, None)
                if sample is not None:
                    cursor = cursor._replace(taken=cursor.taken + 1)
                    decoded = self._read(sample, worker, cursor)
                    good += decoded
                    found = found or bool(decoded)
                elif found:
                    cursor, samples = Cursor(epoch, cursor.lap + 1, 0), None
                else:
                    raise DataError(self._nothing_usable(worker))
            yield _collate(good), cursor
            number += plan.workers

    def _rng(self, *salt: int) -> np.random.Generator:
        return np.random.default_rng([self.plan.seed, *salt])

    def _deal(self, worker: int, cursor: Cursor) -> list[str]:
        """The worker's shards, in the order to be read in this lap."""
        plan, epoch = self.plan, cursor.epoch
        if plan.infinite:
            share = max(1, len(plan.shards) // (plan.world_size * plan.workers))
            picks = self._rng(epoch, 1, plan.rank, worker, cursor.lap).integers(len(plan.shards), size=share)
            return [plan.shards[pick] for pick in picks]
        shards = list(plan.shards)
        if plan.shuffle_buffer == 0:
            return shards[plan.rank :: plan.world_size][worker :: plan.workers]
        if not plan.fixed_shards:
            self._rng(epoch, 2).shuffle(shards)
        shards = shards[plan.rank :: plan.world_size]
        self._rng(epoch, 3, plan.rank).shuffle(shards)
        shards = shards[worker :: plan.workers]
        self._rng(epoch, 4, plan.rank, worker, cursor.lap).shuffle(shards)
        return shards

    def _order(self, worker: int, cursor: Cursor) -> Iterator[Sample]:
        """The whole samples of this lap, shuffled within the buffer. Nothing but headers is read."""
        size = self.plan.shuffle_buffer
        rng = self._rng(cursor.epoch, 5, self.plan.rank, worker, cursor.lap)
        buffer: list[Sample] = []
        for shard in self._deal(worker, cursor):
            for sample in self._open(shard):
                if len(buffer) < size:
                    buffer.append(sample)
                elif size == 0:
                    yield sample
                else:
                    pick = int(rng.integers(size))
                    yield buffer[pick]
                    buffer[pick] = sample
        rng.shuffle(buffer)
        yield from buffer

    def _open(self, shard: str) -> list[Sample]:
        index = index_shard(shard, self.plan.extensions, self.plan.ignored)
        if shard not in self.seen:
            self.seen[shard] = len(index.samples) + len(index.drops)
            for drop in index.drops:
                self._drop(drop)
        return index.samples

    def _read(self, sample: Sample, worker: int, cursor: Cursor) -> list[_Decoded]:
        """The sample, or nothing where it is left out."""
        plan = self.plan
        rng = self._rng(cursor.epoch, 6, plan.rank, worker, cursor.lap, cursor.taken)
        try:
            result = read_sample(sample, plan.formats, plan.transform, plan.resolution, rng)
        except BadSample as bad:
            self._drop(Drop(str(bad), sample.shard, sample.key))
            return []
        return [] if result is None else [_Decoded(*result, sample.key)]

    def _drop(self, drop: Drop) -> None:
        self.known_bad.add((drop.shard, drop.key))
        self.drops.append(drop)
        bad, seen, tolerated = len(self.known_bad), sum(self.seen.values()), self.plan.max_bad_fraction
        if bad > tolerated * max(seen, FEWEST_TO_JUDGE):
            raise DataError(
                f"{bad} of {seen} samples cannot be used; expected at most data.train.max_bad_fraction={tolerated:g} "
                f"of them, or of {FEWEST_TO_JUDGE}. The last: {_describe(drop)}. Members that do not matter can be "
                "listed in data.train.ignored_extensions"
            )

    def _nothing_usable(self, worker: int) -> str:
        last = f"the last drop: {_describe(self.drops[-1])}" if self.drops else "none was dropped as bad"
        return f"no sample for rank {self.plan.rank}, worker {worker} is whole and admitted by the filters; {last}"


def _describe(drop: Drop) -> str:
    return f"{drop.reason}, {drop.key or 'the tar itself'} in {drop.shard}"


def _collate(samples: list[_Decoded]) -> dict[str, Any]:
    images, hints, captions, keys = zip(*samples, strict=True)
    pixels = [torch.from_numpy(np.stack(each)).permute(0, 3, 1, 2).contiguous().float() for each in (images, hints)]
    return {
        "images": pixels[0].div_(127.5).sub_(1),  # [N, 3, H, W] in [-1, 1]
        "hint": pixels[1].div_(255),  # [N, 3, H, W] in [0, 1]
        "captions": list(captions),
        "keys": list(keys),
    }
