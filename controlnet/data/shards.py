"""Which shards there are, and which whole samples each of them holds.

A shard is an uncompressed tar; the members `KEY.jpg`, `KEY.txt` and `KEY.png` that stand next to each other are one
sample. webdataset's own reader streams a tar and joins neighbours by name: a tar that ends early then gives a sample
without its caption, or the image of one shard with the caption of the next, and no position can be resumed. Here the
headers of a shard are read first, which says exactly what is whole, and members are read by offset afterwards.
"""

from __future__ import annotations

import glob
import io
import os
import pickle
import pickletools
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

from controlnet.common import tar


class DataError(ValueError):
    """The data cannot be used as configured; the message names the key, what came and what was expected."""


GIT_LFS = b"version https://git-lfs"  # the beginning of the placeholder of a file that Git LFS has not fetched
_LARGEST_WDINFO = 1 << 28  # bytes; the names of a million shards take a quarter of it
_LINK = -1  # in place of an offset
Stamp = tuple[int, int, int, int]  # what tells a file from another that takes its name: device, inode, size, mtime


class Sample(NamedTuple):
    """A whole sample: where the bytes of its members lie, in the file that had this stamp."""

    shard: str
    key: str
    members: dict[str, tuple[int, int]]  # role ("image", "caption", "hint") -> offset, size in bytes
    stamp: Stamp | None = None


class Drop(NamedTuple):
    """A sample, or with an empty key a shard, that cannot be used.

    Attributes:
        reason: of a short list; drops are counted under it.
        shard, key: which.
        detail: what came, such as the extension that was not expected.
    """

    reason: str
    shard: str
    key: str
    detail: str = ""

    def __str__(self) -> str:
        what = f"{self.reason} ({self.detail})" if self.detail else self.reason
        return f"{what}, {self.key or 'the tar itself'} in {self.shard}"


class ShardIndex(NamedTuple):
    """What a shard holds, in the order of the tar."""

    samples: list[Sample]
    drops: list[Drop]


class ShardList(NamedTuple):
    """All shards of a training set, and how many samples they are said to hold (None: nobody said)."""

    paths: list[str]
    sample_count: int | None


class _PlainUnpickler(pickle.Unpickler):
    """Reads numbers, strings, lists and dicts. Whatever would import, call or build anything is refused."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, pid):
        raise pickle.UnpicklingError("it refers to an object outside the file")


def _check_claims(data: bytes) -> None:
    """UnpicklingError for a pickle that makes its reader allocate more than the file holds: by a string, a frame or an
    entry of its memo that it only claims."""
    for opcode, argument, _ in pickletools.genops(data):
        if (opcode.name == "FRAME" or "PUT" in opcode.name) and argument > len(data):
            raise pickle.UnpicklingError(f"it claims {argument} where it has {len(data)} bytes")


def read_wdinfo(path: str) -> tuple[list[str], int]:
    """Read one of NeMo's `wdinfo*.pkl` without executing anything that it contains.

    Returns:
        the relative paths of the shards, and their total number of samples.

    Raises:
        DataError: the file is not a plain pickle of {tar_files: [str], total_key_count: int, chunk_size: int}.
    """
    expected = "a pickled dict {tar_files: [str], total_key_count: int, chunk_size: int}"
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > _LARGEST_WDINFO:
                raise pickle.UnpicklingError(f"it has {size} bytes; expected at most {_LARGEST_WDINFO}")
            data = file.read(size)
        _check_claims(data)
        info = _PlainUnpickler(io.BytesIO(data)).load()
    except OSError as error:
        raise DataError(f"data.train.dataset_path: cannot read {path}: {error.strerror}") from error
    except Exception as error:  # a damaged pickle can raise nearly any exception
        raise DataError(f"data.train.dataset_path: {path} is refused: {error}; expected {expected}") from error
    if not isinstance(info, dict) or not isinstance(info.get("tar_files"), list):
        raise DataError(f"data.train.dataset_path: {path} holds a {type(info).__name__}; expected {expected}")
    files, count = info["tar_files"], info.get("total_key_count")
    if count is None and isinstance(info.get("chunk_size"), int):
        count = info["chunk_size"] * len(files)
    if type(count) is not int or count < 0 or not all(type(file) is str for file in files):
        raise DataError(f"data.train.dataset_path: {path} has wrong types inside; expected {expected}")
    return files, count


def list_shards(patterns: str | Sequence[str], root: str | None = None, chunk_size: int | None = None) -> ShardList:
    """The shards that `data.train.dataset_path` names.

    Args:
        patterns: one or more of: a tar file, a glob, a brace list (`{000..011}.tar`), a NeMo `wdinfo*.pkl`.
        root: folder that relative paths start from. None is the working directory, and a pkl's own folder for its tars.
        chunk_size: samples in a shard, for shards that no pkl describes; None when not known.

    Raises:
        DataError: nothing is named, or something named is missing.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns or [])
    if not patterns:
        raise DataError("data.train.dataset_path is empty; expected tar files, globs, brace lists or wdinfo*.pkl")
    paths, counts = [], []
    for pattern in patterns:
        located = os.path.join(root or "", pattern)
        if pattern.endswith(".pkl"):
            files, count = read_wdinfo(located)
            found = [os.path.join(root or os.path.dirname(located), file) for file in files]
            counts.append(count)
        else:
            found = [path for name in _expand_braces(located) for path in (sorted(glob.glob(name)) or [name])]
            counts.append(None if chunk_size is None else chunk_size * len(found))
        paths += found
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise DataError(
            f"data.train.dataset_path: {len(missing)} of {len(paths)} shards are missing: {_what_is(missing[0])}"
        )
    if not paths:
        raise DataError(f"data.train.dataset_path names no shard: {', '.join(patterns)}")
    twice = [path for path, count in Counter(map(os.path.realpath, paths)).items() if count > 1]
    if twice:
        raise DataError(f"data.train.dataset_path names a shard twice: {twice[0]}")
    return ShardList(paths, None if None in counts else sum(counts))


def _what_is(path: str) -> str:
    """A path that is no file, with the cure where there is one."""
    scheme = re.search(r"(^|/)([a-z0-9]+://?|pipe:)", path)
    if os.path.isdir(path):
        return f"{path} is a folder; name the tar files in it, as {os.path.join(path, '*.tar')}"
    if scheme is not None:
        return f"{path} is an address; samples are read by their place in a file, so download the shards"
    return path


def _expand_braces(pattern: str) -> list[str]:
    if "{" not in pattern:
        return [pattern]
    import webdataset  # in the extra `train`; nothing else here needs it

    return webdataset.shardlists.expand_urls(pattern)


class Stock(NamedTuple):
    """What a list of shards holds.

    Attributes:
        shards: those with samples.
        left_out: those without.
        samples: whole samples in the shards whose headers were read.
        drops: what is wrong in them.
    """

    shards: list[str]
    left_out: list[str]
    samples: int
    drops: list[Drop]


def take_stock(
    paths: Sequence[str], extensions: tuple[tuple[str, str], ...], ignored: tuple[str, ...], *, whole: bool
) -> Stock:
    """Which shards hold samples, with a warning about those that hold none.

    Args:
        paths: of the shards.
        extensions, ignored: see `index_shard`.
        whole: read all headers, and count. Otherwise only the first block of each shard is read, which tells an empty
            or compressed one.

    Raises:
        DataError: a shard is compressed.
    """
    stock = Stock([], [], 0, [])
    samples = 0
    for path in paths:
        if not whole and _starts_with_a_header(path):
            stock.shards.append(path)
            continue
        index = index_shard(path, extensions, ignored)
        reasons = [drop.reason for drop in index.drops]
        if "shard compressed" in reasons:
            raise DataError(
                f"data.train.dataset_path: {path} is compressed ({index.drops[0].detail}); samples are read by their"
                " place in the file, which needs a plain tar: decompress it, for example with gunzip"
            )
        if "shard is a Git LFS pointer" in reasons:
            raise DataError(
                f"data.train.dataset_path: {path} is a Git LFS pointer and not the shard itself; run git lfs pull"
            )
        samples += len(index.samples)
        stock.drops.extend(index.drops)
        (stock.shards if index.samples else stock.left_out).append(path)
    if stock.left_out:
        reason = next((f": {drop}" for drop in stock.drops if drop.shard == stock.left_out[0]), ", which is empty")
        warnings.warn(
            f"{len(stock.left_out)} of {len(paths)} shards hold no whole sample and are left out; the first is"
            f" {stock.left_out[0]}{reason}",
            stacklevel=3,
        )
    return stock._replace(samples=samples)


def _starts_with_a_header(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            block = file.read(tar.BLOCK)
    except OSError:
        return False
    return any(block) and tar.compression(block) is None and not block.startswith(GIT_LFS)


def index_shard(path: str, extensions: tuple[tuple[str, str], ...], ignored: tuple[str, ...] = ()) -> ShardIndex:
    """Find the whole samples of a shard from its headers; no member is read.

    A sample is whole when its members stand next to each other, all of them inside the file, exactly one for each role
    and nothing else. A key that appears in two places is dropped in both. What was found is kept as long as the file
    stays the same.

    Args:
        path: an uncompressed tar.
        extensions: pairs of an extension (all after the first dot, lower case) and the role that it has.
        ignored: extensions of members that may be there and are not read.

    Returns:
        the samples and what was dropped. Never raises for a damaged shard: that is a drop too.
    """
    try:
        stamp = stamp_of(os.stat(path))
    except OSError as error:
        return ShardIndex([], [_unreadable(path, error)])
    return _index(path, extensions, ignored, stamp)


def stamp_of(status: os.stat_result) -> Stamp:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@lru_cache(maxsize=16)
def _index(path: str, extensions: tuple[tuple[str, str], ...], ignored: tuple[str, ...], stamp: Stamp) -> ShardIndex:
    headers, damage = _read_headers(path)
    size, drops = stamp[2], [] if damage is None else [damage]
    runs = [(key, list(run)) for key, run in groupby(headers, key=lambda header: header[0])]
    places = Counter(key for key, _ in runs)
    roles, samples = dict(extensions), []
    for key, run in runs:
        members = [header for header in run if header[1] not in ignored]
        if not members:
            continue
        fault = ("key in two places", "") if places[key] > 1 else _fault(members, roles, size)
        if fault is None:
            found = {roles[extension]: (at, length) for _, extension, at, length in members}
            samples.append(Sample(path, key, found, stamp))
        else:
            drops.append(Drop(fault[0], path, key, fault[1]))
    return ShardIndex(samples, drops)


index_shard.cache_clear = _index.cache_clear


def _fault(members: list[tuple[str, str, int, int]], roles: Mapping[str, str], size: int) -> tuple[str, str] | None:
    """Why these members are not a whole sample, with what came; None when they are."""
    unexpected = [extension for _, extension, _, _ in members if extension not in roles]
    if unexpected:
        return "unexpected member", f".{unexpected[0]}"
    found: dict[str, list[str]] = {}
    for _, extension, _, _ in members:
        found.setdefault(roles[extension], []).append(f".{extension}")
    twice = next((extensions for extensions in found.values() if len(extensions) > 1), None)
    if twice is not None:
        return "duplicate member", " and ".join(twice[:2])
    missing = [role for role in dict.fromkeys(roles.values()) if role not in found]
    if missing:
        return f"missing {missing[0]}", ""
    linked = [extension for _, extension, at, _ in members if at == _LINK]
    if linked:
        return "member is a link", f".{linked[0]}"
    if any(at + length > size for _, _, at, length in members):
        return "member cut short", ""
    return None


def _read_headers(path: str) -> tuple[list[tuple[str, str, int, int]], Drop | None]:
    """The files of a tar as (key, extension, offset, size), and what is wrong with it."""
    headers = []
    try:
        with open(path, "rb") as file:
            start = file.read(len(GIT_LFS))
            packed = tar.compression(start)
            if packed is not None:
                return [], Drop("shard compressed", path, "", packed)
            if start == GIT_LFS:
                return [], Drop("shard is a Git LFS pointer", path, "")
            for member in tar.members(file):
                folder, slash, name = member.name.rpartition("/")
                stem, dot, extension = name.partition(".")
                if stem and dot and (member.regular or member.link):
                    at = member.offset if member.regular else _LINK
                    headers.append((folder + slash + stem, extension.lower(), at, member.size))
    except OSError as error:
        return headers, _unreadable(path, error)
    except tar.TarDamage as damage:
        return headers, Drop("shard damaged", path, "", str(damage))
    return headers, None


def _unreadable(path: str, error: OSError) -> Drop:
    return Drop(f"shard unreadable ({error.strerror})", path, "")
