"""Shards for the tests: image, hint and caption of a sample all encode its number."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image


def png(pixels: np.ndarray) -> bytes:
    """The PNG file of [H, W, 3] or [H, W] uint8 pixels."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def jpeg(pixels: np.ndarray, quality: int = 95) -> bytes:
    """The JPEG file of [H, W, 3] uint8 pixels, colours at full resolution."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def members(number: int, size: int = 8) -> dict[str, bytes]:
    """The files of sample `number` (0 to 255) by extension: flat pictures of value `number`, a caption with it."""
    flat = np.full((size, size, 3), number, dtype=np.uint8)
    return {"jpg": jpeg(flat), "txt": f"sample {number}".encode(), "png": png(flat)}


def write_tar(path: Path, files: Iterable[tuple[str, bytes]]) -> Path:
    """A tar of (name, content), in that order; names may repeat."""
    with tarfile.open(path, "w") as archive:
        for name, content in files:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return path


def write_shard(path: Path, numbers: Iterable[int], size: int = 8) -> Path:
    """A shard of whole samples `numbers`, whose keys are the numbers in five digits."""
    return write_tar(
        path,
        [(f"{number:05d}.{ext}", data) for number in numbers for ext, data in members(number, size).items()],
    )
