"""What each worker reads, in which order: a function of (seed, epoch, rank, worker), resumable at any batch.

The batches of a rank are numbered 0, 1, 2, ... and worker `number % workers` makes each. In an epoch a worker goes
through its shards, shuffles within a buffer, and starts another lap where its shards hold fewer good samples than its
share of the epoch. Where they hold none it reads its rank's others. A sample waits until its batch, of one size, is
full; with buckets some wait when a batch goes out, also over the end of an epoch. How far a worker has come is thus
three numbers (epoch, lap, samples taken) and the places of the samples that wait, sent with every batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from controlnet.data.advice import advice
from controlnet.data.buckets import Buckets
from controlnet.data.cached import Cached, CachedSample
from controlnet.data.hints import HintReader, unit
from controlnet.data.samples import BadSample, Decoded, ReplacedShard, Resolution, Transform, read_sample
from controlnet.data.shards import DataError, Drop, Sample, index_shard

FEWEST_TO_JUDGE = 100  # below this many samples, a bad fraction is taken of this many

# Laps are numbered from 0 in the worker's own shards, from LAPS in its rank's, from 2 * LAPS in all there are.
LAPS = 1 << 20
OWN, RANKS, ALL = range(3)


class Plan(NamedTuple):
    """The settings that determine order and content of a rank's batches; see `loader.build_loader`."""

    shards: list[str]
    extensions: tuple[tuple[str, str], ...]  # (extension, role)
    ignored: tuple[str, ...]
    formats: dict[str, str]  # role -> Pillow's name of the image format to try first
    hints: HintReader
    transform: Transform | Buckets
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
    cached: Cached | None = None  # the shards are of controlnet.encode
    tokenize: Callable[[list[str]], torch.Tensor] | None = None  # captions -> int64 [N, T]

    @property
    def dealt_anew(self) -> bool:
        """Whether a rank has other shards in another epoch."""
        return self.infinite or not (self.fixed_shards or self.shuffle_buffer == 0)


class Place(NamedTuple):
    """Which sample of a worker: the `taken`-th of a lap of an epoch."""

    epoch: int
    lap: int
    taken: int


class Cursor(NamedTuple):
    """How far a worker has come.

    Attributes:
        epoch, lap, taken: samples taken, good or bad, in this lap through its shards in this epoch.
        waiting: the samples that wait for their batch to be full, bucket by bucket.
    """

    epoch: int
    lap: int
    taken: int
    waiting: tuple[Place, ...] = ()

    @classmethod
    def read(cls, epoch: int, lap: int, taken: int, waiting: list[list[int]] = ()) -> Cursor:
        """From the lists that a saved position holds."""
        return cls(epoch, lap, taken, tuple(Place(*place) for place in waiting))

    @property
    def place(self) -> Place:
        return Place(self.epoch, self.lap, self.taken)


class Message(NamedTuple):
    """What a worker sends: a batch or an error, where the worker stands now, what it dropped since its last batch."""

    batch: dict[str, Any] | None
    cursor: Cursor | None
    drops: list[Drop]
    notes: list[str]  # what a person should be told, once
    error: str | None = None


class _Taken(NamedTuple):
    decoded: Decoded | CachedSample
    key: str
    place: Place


_Waiting = dict[tuple[int, int], list[_Taken]]  # height and width -> the samples of that size, fewer than a batch


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
        self.notes: list[str] = []
        self.told: set[str] = set()
        self.known_bad: set[tuple[str, str]] = set()
        self.seen: dict[str, int] = {}  # samples, good or bad, in each shard opened so far

    def __iter__(self) -> Iterator[Message]:
        info = get_worker_info()
        number = self.first + (0 if info is None else info.id)
        worker = number % self.plan.workers
        try:
            for batch, cursor in self._batches(worker, number):
                drops, notes, self.drops, self.notes = self.drops, self.notes, [], []
                yield Message(batch, cursor, drops, notes)
        except DataError as error:
            yield Message(None, None, self.drops, self.notes, str(error))

    def _batches(self, worker: int, number: int) -> Iterator[tuple[dict[str, Any], Cursor]]:
        plan, cursor = self.plan, self.cursors[worker]
        waiting, samples, found = self._waiting(worker, cursor), None, False
        while True:
            epoch = number // plan.epoch_batches
            if cursor.epoch != epoch:
                cursor, samples = Cursor(epoch, 0, 0), None
            batch = None
            while batch is None:
                if samples is None:
                    samples = itertools.islice(self._order(worker, cursor), cursor.taken, None)
                    found = cursor.taken > 0
                sample = next(samples, None)
                if sample is None:
                    cursor, samples = Cursor(epoch, self._next_lap(worker, cursor.lap, found), 0), None
                    continue
                cursor = cursor._replace(taken=cursor.taken + 1)
                taken = self._read(sample, worker, cursor.place)
                if taken is not None:
                    found, batch = True, self._join(waiting, taken)
            cursor = cursor._replace(waiting=tuple(each.place for row in waiting.values() for each in row))
            yield _collate(batch, self.plan), cursor
            number += plan.workers

    def _join(self, waiting: _Waiting, taken: _Taken) -> list[_Taken] | None:
        """Adds a sample to those of its size; the batch that it completes, if it does."""
        size = taken.decoded.size
        row = waiting.setdefault(size, [])
        row.append(taken)
        return waiting.pop(size) if len(row) == self.plan.batch_size else None

    def _waiting(self, worker: int, cursor: Cursor) -> _Waiting:
        """The samples that wait at a cursor, read again."""
        waiting: _Waiting = {}
        laps: dict[tuple[int, int], list[Sample]] = {}
        for epoch, lap, taken in cursor.waiting:
            if (epoch, lap) not in laps:
                last = max(place.taken for place in cursor.waiting if (place.epoch, place.lap) == (epoch, lap))
                laps[epoch, lap] = list(itertools.islice(self._order(worker, Cursor(epoch, lap, 0)), last))
            of_lap = laps[epoch, lap]
            again = self._read(of_lap[taken - 1], worker, Place(epoch, lap, taken)) if taken <= len(of_lap) else None
            if again is not None:
                self._join(waiting, again)
        return waiting

    def _next_lap(self, worker: int, lap: int, found: bool) -> int:
        """The lap after this one, which held a sample or did not; DataError where no other can."""
        if found:
            return lap + 1
        plan, reach = self.plan, lap // LAPS
        if reach == OWN and plan.workers > 1 and not plan.infinite:
            return RANKS * LAPS
        if reach < ALL and plan.dealt_anew:
            return ALL * LAPS
        raise DataError(
            f"no sample for rank {plan.rank}, worker {worker} is whole and admitted by the filters; "
            + (advice(self.drops) or "none was dropped as bad")
        )

    def _rng(self, *salt: int) -> np.random.Generator:
        return np.random.default_rng([self.plan.seed, *salt])

    def _deal(self, worker: int, cursor: Cursor) -> list[str]:
        """The shards to be read in this lap, in order."""
        plan, epoch, reach = self.plan, cursor.epoch, cursor.lap // LAPS
        if plan.infinite and reach == OWN:
            share = max(1, len(plan.shards) // (plan.world_size * plan.workers))
            picks = self._rng(epoch, 1, plan.rank, worker, cursor.lap).integers(len(plan.shards), size=share)
            return [plan.shards[pick] for pick in picks]
        shards, in_order = list(plan.shards), plan.shuffle_buffer == 0
        if plan.dealt_anew:
            self._rng(epoch, 2).shuffle(shards)
        if reach < ALL:
            shards = shards[plan.rank :: plan.world_size]
        if not in_order:
            self._rng(epoch, 3, plan.rank).shuffle(shards)
        if reach < RANKS:
            shards = shards[worker :: plan.workers]
        if not in_order:
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

    def _read(self, sample: Sample, worker: int, place: Place) -> _Taken | None:
        """The sample, or nothing where it is left out."""
        plan, notes = self.plan, []
        rng = self._rng(place.epoch, 6, plan.rank, worker, place.lap, place.taken)
        try:
            try:
                decoded = self._decode(sample, rng, notes)
            except ReplacedShard:
                decoded = self._read_replaced(sample, rng, notes)
        except BadSample as bad:
            self._drop(Drop(str(bad), sample.shard, sample.key))
            return None
        for note in notes:
            kind = note.partition(":")[0]
            if kind not in self.told:
                self.told.add(kind)
                self.notes.append(f"{note} (first: {sample.key} in {sample.shard})")
        return None if decoded is None else _Taken(decoded, sample.key, place)

    def _decode(self, sample: Sample, rng: np.random.Generator, notes: list[str]) -> Decoded | CachedSample | None:
        plan = self.plan
        if plan.cached is not None:
            return plan.cached.read(sample, rng)
        return read_sample(sample, plan.formats, plan.transform, plan.resolution, rng, plan.hints, notes)

    def _read_replaced(
        self, sample: Sample, rng: np.random.Generator, notes: list[str]
    ) -> Decoded | CachedSample | None:
        """The sample of the same key in the file that now has the shard's name."""
        plan = self.plan
        for again in index_shard(sample.shard, plan.extensions, plan.ignored).samples:
            if again.key == sample.key:
                return self._decode(again, rng, notes)
        raise ReplacedShard

    def _drop(self, drop: Drop) -> None:
        self.known_bad.add((drop.shard, drop.key))
        self.drops.append(drop)
        judge(len(self.known_bad), sum(self.seen.values()), self.plan.max_bad_fraction, self.drops)


def judge(bad: int, seen: int, tolerated: float, drops: list[Drop]) -> None:
    """DataError, with advice on the drops, where more of the samples seen are bad than `max_bad_fraction` tolerates."""
    if bad > tolerated * max(seen, FEWEST_TO_JUDGE):
        raise DataError(
            f"{bad} of {seen} samples cannot be used; expected at most data.train.max_bad_fraction={tolerated:g} "
            f"of them, or of {FEWEST_TO_JUDGE}. {advice(drops)}"
        )


def _collate(samples: list[_Taken], plan: Plan) -> dict[str, Any]:
    decoded = [sample.decoded for sample in samples]
    if plan.cached is not None:
        return {**plan.cached.collate(decoded), "keys": [sample.key for sample in samples]}
    images = torch.from_numpy(np.stack([each.image for each in decoded])).permute(0, 3, 1, 2).contiguous().float()
    captions = [each.caption for each in decoded]
    tokens = {} if plan.tokenize is None else {"tokens": plan.tokenize(captions)}
    return {
        **tokens,
        "images": images.div_(127.5).sub_(1),  # [N, 3, H, W] in [-1, 1]
        "hint": torch.stack([unit(each.hint) for each in decoded]),  # [N, C, H, W] in [0, 1]
        "captions": captions,
        "keys": [sample.key for sample in samples],
        "time_ids": torch.tensor([each.time_ids for each in decoded]),  # [N, 6]
    }
