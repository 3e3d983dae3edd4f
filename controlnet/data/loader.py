"""`build_loader`: from the section `data` of a configuration to the batches of one rank."""

from __future__ import annotations

import atexit
import contextlib
import signal
import warnings
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader

from controlnet.data.samples import IMAGE_FORMATS, Resolution, Transform
from controlnet.data.shards import DataError, Drop, index_shard, list_shards
from controlnet.data.stream import Cursor, Message, Plan, WorkerStream

DEFAULT_EXTENSIONS = {"image": "jpg", "caption": "txt", "hint": "png"}
DEFAULT_MAX_BAD_FRACTION = 0.05
DEFAULT_SHUFFLE_BUFFER = 1000


def build_loader(
    data: Mapping[str, Any],
    *,
    factor: int,
    batch_size: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    start: Mapping[str, Any] | None = None,
) -> ShardLoader:
    """The batches of one rank.

    Every rank has the same number of batches in an epoch: the samples there are, over world_size * batch_size. A rank
    or worker whose shards hold fewer than its share goes through them again, in another order.

    Args:
        data: the section `data` of a configuration, of which are read
            `num_workers`: processes that decode; 0 decodes in this one;
            `train.dataset_path`: see `shards.list_shards`;
            `train.augmentations`: see `samples.Transform.from_config`;
            `train.filterings`: see `samples.Resolution`; its `estimated_portion` (0 to 1) shortens the epoch;
            `train.extensions`: {image: jpg, caption: txt, hint: png}; alternatives are written "jpg;jpeg";
            `train.ignored_extensions`: members that may be in a sample and are not read;
            `train.max_bad_fraction`: share of unusable samples beyond which an error ends the run;
            `train.data_sharding`: true leaves a rank the same shards in every epoch, false deals them anew;
            `webdataset.infinite_sampler`: true draws the shards with replacement;
            `webdataset.local_root_path`: see `shards.list_shards`;
            `webdataset.chunk_size`: samples in a shard. Without it, and without a pkl, the headers of all shards are
            read once to count them;
            `webdataset.shuffle_buffer`: samples to shuffle among (default: chunk_size, or 1000); 0 keeps all in order.
        factor: what height and width must be divisible by (the first stage's).
        batch_size: samples in a batch of this rank.
        seed: of the order and of the augmentations.
        rank, world_size: which of how many processes this is.
        start: a `ShardLoader.position` of the same rank; the batches that followed it follow here, bit for bit.

    Raises:
        DataError: no shards, too few for the ranks and workers, sizes that do not fit; all before the first batch.
    """
    train, webdataset, workers = data["train"], data.get("webdataset") or {}, max(1, data.get("num_workers") or 0)
    chunk_size, infinite = webdataset.get("chunk_size"), bool(webdataset.get("infinite_sampler"))
    shards, count = list_shards(train["dataset_path"], webdataset.get("local_root_path"), chunk_size)
    if not infinite and len(shards) < world_size * workers:
        raise DataError(
            f"data.train.dataset_path names {len(shards)} shards; expected at least {world_size * workers}, one for "
            f"each of {world_size} ranks x {workers} workers. Lower data.num_workers, or cut the data into more shards"
        )
    extensions, formats = _read_extensions(train.get("extensions"))
    ignored = tuple(str(extension).lower().lstrip(".") for extension in train.get("ignored_extensions") or ())
    filterings = train.get("filterings") or {}
    transform = Transform.from_config(train.get("augmentations") or {}, factor)
    if count is None:
        count = sum(len(index_shard(shard, extensions, ignored).samples) for shard in shards)
    count = int(count * (filterings.get("estimated_portion") or 1))
    if count < world_size * batch_size:
        raise DataError(
            f"data.train.dataset_path holds {count} usable samples; expected at least {world_size * batch_size}, "
            f"one batch of {batch_size} for each of {world_size} ranks"
        )
    buffer, tolerated = webdataset.get("shuffle_buffer"), train.get("max_bad_fraction")
    plan = Plan(
        shards=shards,
        extensions=extensions,
        ignored=ignored,
        formats=formats,
        transform=transform,
        resolution=Resolution.from_config(filterings),
        max_bad_fraction=DEFAULT_MAX_BAD_FRACTION if tolerated is None else float(tolerated),
        fixed_shards=train.get("data_sharding") is not False,
        infinite=infinite,
        shuffle_buffer=(chunk_size or DEFAULT_SHUFFLE_BUFFER) if buffer is None else int(buffer),
        seed=seed,
        rank=rank,
        world_size=world_size,
        workers=workers,
        batch_size=batch_size,
        epoch_batches=count // (world_size * batch_size),
    )
    return ShardLoader(plan, data.get("num_workers") or 0, start)


def _read_extensions(configured: Mapping[str, str] | None) -> tuple[tuple[tuple[str, str], ...], dict[str, str]]:
    """((extension, role), ...) and Pillow's format of each role that is an image."""
    wanted = {**DEFAULT_EXTENSIONS, **(configured or {})}
    where, pairs, formats = "data.train.extensions", [], {}
    for role, extensions in wanted.items():
        if role not in DEFAULT_EXTENSIONS:
            raise DataError(f"{where} names {role!r}; expected {', '.join(DEFAULT_EXTENSIONS)}")
        for extension in str(extensions).lower().split(";"):
            extension = extension.strip().lstrip(".")
            pairs.append((extension, role))
            if role != "caption":
                kind = IMAGE_FORMATS.get(extension.rpartition(".")[2])
                if kind is None or formats.setdefault(role, kind) != kind:
                    known = ", ".join(IMAGE_FORMATS)
                    raise DataError(f"{where}.{role} is {extensions!r}; expected one image format of {known}")
    if len(dict(pairs)) < len(pairs):
        raise DataError(f"{where} gives one extension two roles: {wanted}")
    return tuple(pairs), formats


class ShardLoader:
    """The batches of one rank; iterating gives those left in this epoch, iterating again those of the next.

    A batch is a dict: "images" float32 [N, 3, H, W] in [-1, 1], "hint" float32 [N, 3, H, W] in [0, 1], "captions" and
    "keys" lists of N strings. `len()` is the number of batches in an epoch.

    Notes: workers ignore SIGTERM and SIGINT, so that the process that they serve can save before it ends. They end with
    `close()` or with the process.
    """

    def __init__(self, plan: Plan, num_workers: int, start: Mapping[str, Any] | None = None):
        self._plan = plan
        self._next, self._cursors = 0, [Cursor(0, 0, 0)] * plan.workers
        if start is not None:
            self._resume(start)
        self._drops: set[Drop] = set()
        self._num_workers = num_workers
        self._loader = self._open()
        self._messages: Iterator[Message] | None = None

    def _open(self) -> DataLoader:
        """A loader that goes on where this one stands."""
        return DataLoader(
            WorkerStream(self._plan, self._next, list(self._cursors)),
            batch_size=None,
            num_workers=self._num_workers,
            collate_fn=_as_it_is,
            pin_memory=torch.cuda.is_available(),
        )

    def __len__(self) -> int:
        return self._plan.epoch_batches

    def __iter__(self) -> Iterator[dict[str, Any]]:
        end = (self.epoch + 1) * self._plan.epoch_batches
        if self._messages is None:
            with _blocked_signals():
                self._messages = iter(self._loader)
            # PyTorch and multiprocessing end workers by SIGTERM where they come too late to tell them, and wait for it.
            # These ignore it: they are told before the queues are collected, and before the interpreter's own exit.
            self._end = weakref.finalize(self, _end_workers, self._messages)
            self._end.atexit = False
            atexit.register(self._end)
        while self._next < end:
            message = next(self._messages)
            for drop in message.drops:
                self._count(drop)
            if message.error is not None:
                raise DataError(message.error)
            self._cursors[self._next % self._plan.workers] = message.cursor
            self._next += 1
            yield message.batch

    def close(self) -> None:
        """Ends the workers. Iterating afterwards goes on after the last batch handed out, with new ones."""
        if self._messages is not None:
            self._end()
            atexit.unregister(self._end)
            self._messages, self._loader = None, self._open()

    @property
    def epoch(self) -> int:
        """The epoch of the next batch."""
        return self._next // self._plan.epoch_batches

    @property
    def drops(self) -> dict[str, dict[str, int]]:
        """Samples left out since this loader was built: reason -> shard -> count. A damaged tar counts as one."""
        table: dict[str, dict[str, int]] = {}
        for drop in sorted(self._drops):
            of_reason = table.setdefault(drop.reason, {})
            of_reason[drop.shard] = of_reason.get(drop.shard, 0) + 1
        return table

    @property
    def position(self) -> dict[str, Any]:
        """Where this rank stands, after the last batch handed out. Plain numbers, lists and dicts; its own."""
        cursors = [list(cursor) for cursor in self._cursors]
        return {"next": self._next, "epoch": self.epoch, "cursors": cursors, "layout": self._layout()}

    def _layout(self) -> dict[str, int]:
        """What has to be the same for a position to mean the same batches."""
        plan = self._plan
        names = ("seed", "rank", "world_size", "workers", "batch_size", "epoch_batches", "shuffle_buffer")
        return {"shards": len(plan.shards), **{name: getattr(plan, name) for name in names}}

    def _resume(self, start: Mapping[str, Any]) -> None:
        here, saved = self._layout(), start["layout"]
        changed = [f"{name} was {saved.get(name)}, is {here[name]}" for name in here if saved.get(name) != here[name]]
        if changed:
            what = f"the data order cannot go on ({'; '.join(changed)}): epoch {start['epoch']} starts anew"
            warnings.warn(what, stacklevel=4)
            self._next = start["epoch"] * self._plan.epoch_batches
            self._cursors = [Cursor(start["epoch"], 0, 0)] * self._plan.workers
        else:
            self._next = start["next"]
            self._cursors = [Cursor(*cursor) for cursor in start["cursors"]]

    def _count(self, drop: Drop) -> None:
        if not any((drop.reason, drop.shard) == (known.reason, known.shard) for known in self._drops):
            what = f"left out: {drop.reason}, {drop.key or 'the tar itself'} in {drop.shard}"
            warnings.warn(what, stacklevel=3)
        self._drops.add(drop)


def _end_workers(messages: Iterator[Message]) -> None:
    if hasattr(messages, "_shutdown_workers"):  # there are processes
        messages._shutdown_workers()


def _as_it_is(message: Message) -> Message:
    return message


@contextlib.contextmanager
def _blocked_signals() -> Iterator[None]:
    """SIGTERM and SIGINT wait, here until the end of this, in a process that is started meanwhile as long as it lives.

    A handler that the worker set itself would come too late for a signal that meets it while it starts.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
