"""Writes shards: checks samples as training reads them, computes hints, and skips shards that are finished."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import shlex
import shutil
import signal
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from controlnet.common.extras import require
from controlnet.data import images
from controlnet.data.arrays import MAGIC
from controlnet.data.hints import HintReader
from controlnet.data.images import ImageError
from controlnet.data.samples import BadSample, decode
from controlnet.data.shards import DataError, Drop
from controlnet.data.sources import Item

JOURNAL = "shards.jsonl"
WDINFO = "wdinfo.pkl"


class Making(NamedTuple):
    """How the hint of a sample is made, and what form it must have.

    Attributes:
        hint: "given", "canny", "labels" or "command".
        reader: decodes hints that are there; with a palette for "labels".
        sigma, low, high: of Canny's edges: the blur in pixels, the thresholds of the gradient (1 from black to white).
        command: with {image} and {hint}, of "command".
    """

    hint: str = "given"
    reader: HintReader = HintReader()
    sigma: float = 1.4
    low: float = 0.1
    high: float = 0.2
    command: str = ""

    def settings(self) -> dict[str, Any]:
        """All that decides what is written, for the journal."""
        fields = {name: value for name, value in self._asdict().items() if name != "reader"}
        palette = None if self.reader.palette is None else self.reader.palette.name
        return {**fields, "channels": self.reader.channels, "palette": palette, "ground": list(self.reader.ground)}


class Written(NamedTuple):
    """What a shard holds; a line of the journal."""

    name: str
    samples: int
    size: int
    drops: list[Drop]


def make(item: Item, making: Making) -> dict[str, bytes] | Drop:
    """The members of a sample by extension, or why there is none.

    The image and a hint that is given keep their bytes. The extension says what a member is to training, which reads
    the format from the content: an image is KEY.jpg (KEY.webp), a hint KEY.png or KEY.npy.
    """
    try:
        image = item.image.read()
        caption = item.caption.encode() if isinstance(item.caption, str) else item.caption.read()
        hint = _hint(item, image, making)
        reader = making.reader if making.hint == "given" else HintReader()
        decode({"image": image, "caption": caption, "hint": hint}, {}, reader)
    except ImageError as error:
        return Drop(f"hint {error}", item.image.path, item.key)
    except BadSample as bad:
        return Drop(str(bad), item.image.path, item.key)
    except OSError as error:
        return Drop("file unreadable", error.filename or item.image.path, item.key, error.strerror or "")
    extension = "webp" if image[8:12] == b"WEBP" else "jpg"
    text = caption.decode("utf-8-sig").strip().encode()
    return {extension: image, "txt": text, "npy" if hint.startswith(MAGIC) else "png": hint}


def _hint(item: Item, image: bytes, making: Making) -> bytes:
    """The file of the hint. ImageError says why there is none."""
    if making.hint == "given":
        return item.hint.read()
    if making.hint == "labels":
        return png(making.reader.decode(making.reader.open(item.hint.read())))
    try:
        picture = images.rgb(images.upright(images.open_picture(image)))
    except ImageError as error:
        raise BadSample(f"image {error}") from error
    return png(canny(picture, making)) if making.hint == "canny" else _of_command(picture, making.command)


def canny(picture: Image.Image, making: Making) -> np.ndarray:
    """White edges on black, uint8 [H, W], of an RGB picture."""
    from skimage.feature import canny as edges

    gray = np.asarray(picture.convert("L"), dtype=np.float64) / 255
    return edges(gray, making.sigma, making.low, making.high).astype(np.uint8) * 255


def _of_command(picture: Image.Image, command: str) -> bytes:
    """What a command writes to {hint} when it is given the upright picture as the PNG {image}."""
    with tempfile.TemporaryDirectory() as folder:
        places = {"image": os.path.join(folder, "image.png"), "hint": os.path.join(folder, "hint.png")}
        picture.save(places["image"], compress_level=1)
        words = [word.format(**places) for word in shlex.split(command)]
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        if done.returncode:
            said = (done.stderr.decode(errors="replace").strip().splitlines() or [""])[-1]
            raise ImageError(f"command ended with {done.returncode}: {said[:200]}")
        with contextlib.suppress(FileNotFoundError), open(places["hint"], "rb") as file:
            return file.read()
    raise ImageError("command wrote no {hint}")


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def check_making(making: Making) -> None:
    """Raises DataError or ImportError where no sample could be made so."""
    if making.hint == "canny":
        require("skimage", extra="test", wanted_by="edges are scikit-image's")
    if making.hint == "command":
        try:
            words = [word.format(image="", hint="") for word in shlex.split(making.command)]
        except (ValueError, KeyError, IndexError) as error:
            raise DataError(
                f"--hint-command {making.command!r} cannot be read: {error}; expected {{image}}, {{hint}}"
            ) from error
        if "{hint}" not in making.command or "{image}" not in making.command or not words:
            raise DataError(f"--hint-command is {making.command!r}; expected a command with {{image}} and {{hint}}")
        if shutil.which(words[0]) is None:
            raise DataError(f"--hint-command: there is no command {words[0]!r}")


def write(folder: str, items: Sequence[Item], making: Making, size: int, workers: int) -> Iterator[Written]:
    """Write shards of up to `size` samples; those that an earlier call has finished are not made again.

    Args:
        folder: where they go, and the journal of what each holds.
        items: all samples of all shards, in order.
        making: hints.
        size: samples of a shard before any is dropped.
        workers: processes; 0 is this one.

    Yields:
        each shard once it stands under its name.

    Raises:
        DataError: the folder has shards of other samples or settings.
        OSError: it cannot be written.
    """
    os.makedirs(folder, exist_ok=True)
    journal = os.path.join(folder, JOURNAL)
    done = _read_journal(journal, _fingerprint(items, making, size))
    pool = ProcessPoolExecutor(workers, initializer=_leave_interrupts) if workers else contextlib.nullcontext()
    with pool as processes:
        for number, start in enumerate(range(0, len(items), size)):
            name = f"{number:05d}.tar"
            path = os.path.join(folder, name)
            written = done.get(name)
            if written is None or (written.samples and not _has_size(path, written.size)):
                part = items[start : start + size]
                mapped = processes.map if processes else map
                written = _write_shard(path, part, mapped(make, part, [making] * len(part)))
                _append(journal, {**written._asdict(), "drops": [list(drop) for drop in written.drops]})
            yield written


def _leave_interrupts() -> None:
    """Ignores Ctrl-C, which reaches every process of the terminal; the process that writes handles it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _write_shard(path: str, items: Sequence[Item], made: Iterable[dict[str, bytes] | Drop]) -> Written:
    """The tar appears under its name when it is whole, and not at all without a sample."""
    drops, samples, partial = [], 0, f"{path}.part"
    with tarfile.open(partial, "w", format=tarfile.PAX_FORMAT) as tar:
        for item, members in zip(items, made, strict=True):
            if isinstance(members, Drop):
                drops.append(members)
                continue
            samples += 1
            for extension, content in members.items():
                header = tarfile.TarInfo(f"{item.key}.{extension}")
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))
    if samples:
        os.replace(partial, path)
    else:
        os.unlink(partial)
    return Written(os.path.basename(path), samples, os.path.getsize(path) if samples else 0, drops)


def write_wdinfo(folder: str, shards: Sequence[Written], size: int) -> str:
    """The list of the shards as NeMo has it, which `data.train.dataset_path` takes; its path."""
    path = os.path.join(folder, WDINFO)
    full = [shard for shard in shards if shard.samples]
    info = {
        "tar_files": [shard.name for shard in full],
        "total_key_count": sum(shard.samples for shard in full),
        "chunk_size": size,
    }
    with open(f"{path}.part", "wb") as file:
        pickle.dump(info, file)
    os.replace(f"{path}.part", path)
    return path


def _fingerprint(items: Sequence[Item], making: Making, size: int) -> str:
    digest = hashlib.sha256(json.dumps({**making.settings(), "size": size}, sort_keys=True).encode())
    for item in items:
        digest.update(repr(item).encode(errors="surrogateescape"))
    return digest.hexdigest()


def _read_journal(path: str, fingerprint: str) -> dict[str, Written]:
    """What an earlier call finished; begins a journal where there is none."""
    if not os.path.exists(path):
        _append(path, {"fingerprint": fingerprint})
        return {}
    with open(path, encoding="utf-8") as file:
        lines = [line for line in file.read().split("\n") if line]
    rows: list[Mapping[str, Any]] = []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):  # the last line of a call that was killed
            rows.append(json.loads(line))
    if not rows or rows[0].get("fingerprint") != fingerprint:
        raise DataError(
            f"{os.path.dirname(path)} holds shards of other samples or settings (by its {JOURNAL}); expected a new"
            " folder, or one that was begun with these"
        )
    found = [
        Written(row["name"], row["samples"], row["size"], [Drop(*drop) for drop in row["drops"]]) for row in rows[1:]
    ]
    return {written.name: written for written in found}


def _append(path: str, row: Mapping[str, Any]) -> None:
    """A line, on its own even after one that was cut off, and on the disk."""
    with open(path, "a+b") as file:
        file.seek(0, os.SEEK_END)
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _has_size(path: str, size: int) -> bool:
    try:
        return os.path.getsize(path) == size
    except OSError:
        return False
