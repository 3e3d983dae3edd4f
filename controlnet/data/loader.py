"""`build_loader`: from the section `data` of a configuration to the batches of one rank."""

from __future__ import annotations

import atexit
import contextlib
import signal
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from controlnet.data.advice import advice
from controlnet.data.buckets import Buckets, transform_of
from controlnet.data.cached import Cached, encoded_extensions, mismatch, read_manifest
from controlnet.data.hints import HintReader
from controlnet.data.images import IMAGE_FORMATS
from controlnet.data.samples import BadSample, Decoded, Resolution, flip_probability, read_sample
from controlnet.data.shards import DataError, Drop, Stock, index_shard, list_shards, take_stock
from controlnet.data.stream import Cursor, Message, Plan, WorkerStream, judge

DEFAULT_EXTENSIONS = {"image": "jpg;jpeg;webp", "caption": "txt", "hint": "png;npy"}
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
    hint_channels: int = 3,
    tokenize: Callable[[list[str]], torch.Tensor] | None = None,
    encoded: Callable[[], Mapping[str, Any]] = dict,
) -> ShardLoader:
    """The batches of one rank.

    Every rank has the same number of batches in an epoch: the samples there are, over world_size * batch_size. A rank
    or worker whose shards hold fewer than its share goes through them again, in another order; a worker whose shards
    hold none reads its rank's others.

    Args:
        data: the section `data` of a configuration, of which are read
            `num_workers`: processes that decode; 0 decodes in this one;
            `train.dataset_path`: see `shards.list_shards`; shards without a whole sample are left out with a warning;
            `train.augmentations`: see `samples.Transform.from_config`;
            `train.buckets`: batches of several sizes; see `buckets.Buckets.from_config`;
            `train.hint`: see `hints.HintReader.from_config`;
            `train.filterings`: see `samples.Resolution`; its `estimated_portion` (0 to 1) shortens the epoch;
            `train.extensions`: DEFAULT_EXTENSIONS and what is set of {image, caption, hint}; alternatives are written
            "jpg;jpeg". They say which member is what; the format of a picture is read from its content;
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
        hint_channels: of the ControlNet.
        tokenize: captions -> token numbers int64 [N, T], made by the workers as "tokens" of a batch.
        encoded: what the settings of shards of `controlnet.encode` must be, by name; asked for such shards only.

    Raises:
        DataError: no shards, too few for the ranks and workers, sizes that do not fit; all before the first batch.
    """
    train, webdataset, workers = data["train"], data.get("webdataset") or {}, max(1, data.get("num_workers") or 0)
    chunk_size, buffer = webdataset.get("chunk_size"), webdataset.get("shuffle_buffer")
    shards = list_shards(train["dataset_path"], webdataset.get("local_root_path"), chunk_size)
    extensions, formats = read_extensions(train.get("extensions"))
    tree = read_manifest(Path(shards.paths[0]).parent)
    plan = Plan(
        shards=shards.paths,
        extensions=extensions if tree is None else encoded_extensions(tree),
        ignored=tuple(str(extension).lower().lstrip(".") for extension in train.get("ignored_extensions") or ()),
        formats=formats,
        hints=_hint_reader(train.get("hint"), hint_channels),
        transform=transform_of(train, factor),
        resolution=Resolution.from_config(train.get("filterings")),
        max_bad_fraction=_or(train.get("max_bad_fraction"), DEFAULT_MAX_BAD_FRACTION),
        fixed_shards=train.get("data_sharding") is not False,
        infinite=bool(webdataset.get("infinite_sampler")),
        shuffle_buffer=_or(buffer, chunk_size or DEFAULT_SHUFFLE_BUFFER),
        seed=seed,
        rank=rank,
        world_size=world_size,
        workers=workers,
        batch_size=batch_size,
        epoch_batches=0,
        tokenize=tokenize,
    )
    if tree is not None:
        flip = flip_probability(train.get("augmentations") or {})
        plan = plan._replace(cached=_cached(shards.paths, tree, encoded(), flip, hint_channels))
    stock = take_stock(shards.paths, plan.extensions, plan.ignored, whole=shards.sample_count is None)
    portion = (train.get("filterings") or {}).get("estimated_portion") or 1
    count = _count(plan, stock, _or(shards.sample_count, stock.samples) * portion)
    plan = plan._replace(shards=stock.shards, epoch_batches=count // (world_size * batch_size))
    of_rank = set(stock.left_out[rank::world_size])  # no worker opens these, so their drops are counted here
    return ShardLoader(plan, data.get("num_workers") or 0, start, [d for d in stock.drops if d.shard in of_rank])


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _hint_reader(hint: Mapping[str, Any] | None, channels: int) -> HintReader:
    try:
        return HintReader.from_config(hint, channels)
    except ValueError as error:
        raise DataError(str(error)) from error


def _count(plan: Plan, stock: Stock, count: float) -> int:
    """The samples of an epoch, at most `count`; DataError where they, or the shards, are too few for all ranks."""
    count = int(count) if stock.shards else 0
    if count < plan.world_size * plan.batch_size:
        raise DataError(
            f"data.train.dataset_path holds {count} usable samples; expected at least"
            f" {plan.world_size * plan.batch_size}, one batch of {plan.batch_size} for each of {plan.world_size} ranks."
            f" {advice(stock.drops)}".rstrip()
        )
    if not plan.infinite and len(stock.shards) < plan.world_size * plan.workers:
        raise DataError(
            f"data.train.dataset_path has {len(stock.shards)} shards with samples; expected at least"
            f" {plan.world_size * plan.workers}, one for each of {plan.world_size} ranks x {plan.workers} workers."
            " Lower data.num_workers, or cut the data into more shards"
        )
    bad = {(drop.shard, drop.key) for drop in stock.drops}
    judge(len(bad), stock.samples + len(bad), plan.max_bad_fraction, stock.drops)
    return count


def _cached(
    shards: Sequence[str], tree: Mapping[str, Any], wanted: Mapping[str, Any], flip: float, hint_channels: int
) -> Cached:
    """The reader of shards of `controlnet.encode`; DataError where they were made for another configuration."""
    folders = {Path(shard).parent for shard in shards}
    if len(folders) > 1:
        raise DataError(f"data.train.dataset_path names encoded shards and others, in {len(folders)} folders")
    folder = folders.pop()
    problem = mismatch(tree["settings"], wanted)
    if problem is not None:
        raise DataError(f"{folder} was encoded for another configuration: {problem}. Encode the shards again")
    return Cached.of(folder, tree, flip, hint_channels)


def read_extensions(configured: Mapping[str, str] | None) -> tuple[tuple[tuple[str, str], ...], dict[str, str]]:
    """((extension, role), ...), and the format of Pillow's to try first for each role that is a picture."""
    wanted = {**DEFAULT_EXTENSIONS, **(configured or {})}
    where, pairs, formats = "data.train.extensions", [], {}
    for role, extensions in wanted.items():
        if role not in DEFAULT_EXTENSIONS:
            raise DataError(f"{where} names {role!r}; expected {', '.join(DEFAULT_EXTENSIONS)}")
        for extension in str(extensions).lower().split(";"):
            extension = extension.strip().lstrip(".")
            pairs.append((extension, role))
            kind = extension.rpartition(".")[2]
            if role == "caption" and kind == "json":
                raise DataError(f"{where}.caption is {extensions!r}; expected text, such as txt: JSON is not searched")
            if role == "caption" or (role == "hint" and kind == "npy"):
                continue
            if kind not in IMAGE_FORMATS:
                known = ", ".join([*IMAGE_FORMATS, *(["npy"] if role == "hint" else [])])
                raise DataError(f"{where}.{role} is {extensions!r}; expected image formats of {known}")
            formats.setdefault(role, IMAGE_FORMATS[kind])
    if len(dict(pairs)) < len(pairs):
        raise DataError(f"{where} gives one extension two roles: {wanted}")
    return tuple(pairs), formats


class ShardLoader:
    """The batches of one rank; iterating gives those left in this epoch, iterating again those of the next.

    A batch is a dict: "images" float32 [N, 3, H, W] in [-1, 1], "hint" float32 [N, hint channels, H, W] in [0, 1],
    "captions" and "keys" lists of N strings, "time_ids" int64 [N, 6], for SDXL (see `samples.Placement.time_ids`). With
    buckets, H and W differ from batch to batch. `len()` is the number of batches in an epoch.

    Notes: workers ignore SIGTERM and SIGINT, so that the process that they serve can save before it ends. They end with
    `close()` or with the process.
    """

    def __init__(
        self,
        plan: Plan,
        num_workers: int,
        start: Mapping[str, Any] | None = None,
        drops: Sequence[Drop] = (),
    ):
        self._plan = plan
        self._next, self._cursors = 0, [Cursor(0, 0, 0)] * plan.workers
        if start is not None:
            self._resume(start)
        self._drops: set[Drop] = set(drops)
        self._notes: set[str] = set()
        self._num_workers = num_workers
        self._loader = self._open()
        self._messages: Iterator[Message] | None = None

    def _open(self) -> DataLoader:
        """A DataLoader that starts at the present position."""
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
            for note in message.notes:
                self._tell(note)
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
        cursors = [[*cursor[:3], [list(place) for place in cursor.waiting]] for cursor in self._cursors]
        return {"next": self._next, "epoch": self.epoch, "cursors": cursors, "layout": self._layout()}

    def _layout(self) -> dict[str, Any]:
        """The settings that must not change between saving a position and resuming from it."""
        plan = self._plan
        names = ("seed", "rank", "world_size", "workers", "batch_size", "epoch_batches", "shuffle_buffer")
        buckets = [list(size) for size in plan.transform.sizes] if isinstance(plan.transform, Buckets) else None
        return {"shards": len(plan.shards), **{name: getattr(plan, name) for name in names}, "buckets": buckets}

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
            self._cursors = [Cursor.read(*cursor) for cursor in start["cursors"]]

    def _count(self, drop: Drop) -> None:
        if not any((drop.reason, drop.shard) == (known.reason, known.shard) for known in self._drops):
            warnings.warn(f"left out: {drop}", stacklevel=3)
        self._drops.add(drop)

    def _tell(self, note: str) -> None:
        kind = note.partition(":")[0]
        if kind not in self._notes:
            self._notes.add(kind)
            warnings.warn(note, stacklevel=3)


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


class ImageShards:
    """All shards of `data.train`, sample by sample and without augmentation: what `controlnet.encode` reads.

    `flip` is the probability of a flip in training, `sizes` are the (height, width) that a sample can have.

    Args:
        data: as `build_loader`.
        factor, hint_channels: as `build_loader`.

    Raises:
        DataError: as `build_loader`.
    """

    def __init__(self, data: Mapping[str, Any], *, factor: int, hint_channels: int = 3):
        train = data["train"]
        augmentations = train.get("augmentations") or {}
        self._extensions, self._formats = read_extensions(train.get("extensions"))
        self._ignored = tuple(str(each).lower().lstrip(".") for each in train.get("ignored_extensions") or ())
        self._transform = transform_of(train, factor)._replace(flip=0.0)
        self._resolution = Resolution.from_config(train.get("filterings") or {})
        self.flip, self.sizes = flip_probability(augmentations), self._transform.sizes
        try:
            self._hints = HintReader.from_config(train.get("hint"), hint_channels)
        except ValueError as error:
            raise DataError(str(error)) from error
        root = (data.get("webdataset") or {}).get("local_root_path")
        self.shards = list_shards(train["dataset_path"], root)[0]

    def samples(self, shard: str) -> Iterator[tuple[str, Decoded]]:
        """Key and sample of all that is whole and admitted; what is not is a warning for each reason."""
        index, told = index_shard(shard, self._extensions, self._ignored), set()
        rng = np.random.default_rng(0)  # required by the transform; a centre crop does not depend on it
        for drop in index.drops:
            warnings.warn(f"left out: {drop}", stacklevel=2)
        for sample in index.samples:
            try:
                read = read_sample(sample, self._formats, self._transform, self._resolution, rng, self._hints)
            except BadSample as bad:
                if str(bad) not in told:
                    told.add(str(bad))
                    warnings.warn(f"left out: {bad}, {sample.key} in {shard}", stacklevel=2)
                continue
            if read is not None:
                yield sample.key, read

    def count(self, path: Path, extensions: tuple[tuple[str, str], ...]) -> int:
        """The whole samples of a shard with these extensions."""
        return len(index_shard(str(path), extensions).samples)
