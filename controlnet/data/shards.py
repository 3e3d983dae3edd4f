"""Which shards there are, and which whole samples each of them holds.

A shard is an uncompressed tar; the members `KEY.jpg`, `KEY.txt` and `KEY.png` that stand next to each other are one
sample. webdataset's own reader streams a tar and joins neighbours by name: a tar that ends early then gives a sample
without its caption, or the image of one shard with the caption of the next, and no position can be resumed. Here the
headers of a shard are read first, which says exactly what is whole, and members are read by offset afterwards.
"""

from __future__ import annotations

import glob
import os
import pickle
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple


class DataError(ValueError):
    """The data cannot be used as configured; the message names the key, what came and what was expected."""


class Sample(NamedTuple):
    """A whole sample: where the bytes of its members lie."""

    shard: str
    key: str
    members: dict[str, tuple[int, int]]  # role ("image", "caption", "hint") -> offset, size in bytes


class Drop(NamedTuple):
    """A sample, or with an empty key a shard, that cannot be used."""

    reason: str
    shard: str
    key: str


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
            info = _PlainUnpickler(file).load()
    except OSError as error:
        raise DataError(f"data.train.dataset_path: cannot read {path}: {error.strerror}") from error
    except Exception as error:  # a damaged pickle can raise nearly anything; all of it means the same
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
        raise DataError(f"data.train.dataset_path: {len(missing)} of {len(paths)} shards are missing: {missing[0]}")
    if not paths:
        raise DataError(f"data.train.dataset_path names no shard: {', '.join(patterns)}")
    twice = [path for path, count in Counter(map(os.path.realpath, paths)).items() if count > 1]
    if twice:
        raise DataError(f"data.train.dataset_path names a shard twice: {twice[0]}")
    return ShardList(paths, None if None in counts else sum(counts))


def _expand_braces(pattern: str) -> list[str]:
    if "{" not in pattern:
        return [pattern]
    import webdataset  # in the extra `train`; nothing else here needs it

    return webdataset.shardlists.expand_urls(pattern)


@lru_cache(maxsize=16)
def index_shard(path: str, extensions: tuple[tuple[str, str], ...], ignored: tuple[str, ...] = ()) -> ShardIndex:
    """Find the whole samples of a shard from its headers; no member is read.

    A sample is whole when its members stand next to each other, all of them inside the file, exactly one for each role
    and nothing else. A key that appears in two places is dropped in both.

    Args:
        path: an uncompressed tar.
        extensions: pairs of an extension (all after the first dot, lower case) and the role that it has.
        ignored: extensions of members that may be there and are not read.

    Returns:
        the samples and what was dropped. Never raises for a damaged shard: that is a drop too.
    """
    headers, size, damage = _read_headers(path)
    drops = [] if damage is None else [Drop(damage, path, "")]
    runs = [(key, list(run)) for key, run in groupby(headers, key=lambda header: header[0])]
    places = Counter(key for key, _ in runs)
    roles, samples = dict(extensions), []
    for key, run in runs:
        members = [header for header in run if header[1] not in ignored]
        if not members:
            continue
        reason = "key in two places" if places[key] > 1 else _fault(members, roles, size)
        if reason is None:
            samples.append(Sample(path, key, {roles[extension]: (at, length) for _, extension, at, length in members}))
        else:
            drops.append(Drop(reason, path, key))
    return ShardIndex(samples, drops)


def _fault(members: list[tuple[str, str, int, int]], roles: Mapping[str, str], size: int) -> str | None:
    """Why these members are not a whole sample, or None."""
    found = Counter(roles.get(extension) for _, extension, _, _ in members)
    if None in found:
        return "unexpected member"
    if max(found.values()) > 1:
        return "duplicate member"
    missing = [role for role in dict.fromkeys(roles.values()) if role not in found]
    if missing:
        return f"missing {missing[0]}"
    if any(at + length > size for _, _, at, length in members):
        return "member cut short"
    return None


def _read_headers(path: str) -> tuple[list[tuple[str, str, int, int]], int, str | None]:
    """The files of a tar as (key, extension, offset, size), the tar's size in bytes, and what is wrong with it."""
    headers, size = [], 0
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for member in archive:
                    if member.size < 0:  # the reader would go back, and round and round
                        return headers, size, "shard damaged"
                    folder, slash, name = member.name.rpartition("/")
                    stem, dot, extension = name.partition(".")
                    if stem and dot and member.isreg() and not member.issparse():
                        headers.append((folder + slash + stem, extension.lower(), member.offset_data, member.size))
                # tarfile takes a broken header, or no more bytes, for the end; a real end is a block of zeros.
                file.seek(archive.offset)
                whole = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    except OSError as error:
        return headers, size, f"shard unreadable ({error.strerror})" if error.strerror else "shard damaged"
    except (tarfile.TarError, ValueError, OverflowError, EOFError):
        return headers, size, "shard damaged"
    return headers, size, None if whole else "shard damaged"
