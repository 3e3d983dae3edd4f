"""Damaged pictures and arrays: a sample of the size that was asked for, or one reason why there is none."""

import collections
import io
import random
import struct
import tempfile
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from controlnet.data.hints import HintReader
from controlnet.data.samples import BadSample, Transform, read_sample
from controlnet.data.shards import index_shard
from tests.controlnet.shard_files import write_tar

EXTENSIONS = (("jpg", "image"), ("txt", "caption"), ("png", "hint"))
READERS = (
    HintReader(),
    HintReader(1),
    HintReader(4),
    HintReader(5),
    HintReader.from_config({"kind": "labels", "palette": "ade20k"}),
)
SIZE = 24
SECONDS = 5


def _saved(picture: Image.Image, image_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, image_format, **options)
    return buffer.getvalue()


def whole() -> list[bytes]:
    """Good files of every format, mode and depth that is read."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (SIZE, SIZE, 4), dtype=np.uint8)
    picture, alpha = Image.fromarray(pixels[..., :3]), Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6
    arrays = io.BytesIO()
    np.save(arrays, rng.random((SIZE, SIZE, 5)))
    return [
        *(_saved(picture, image_format, exif=exif) for image_format in ("JPEG", "PNG", "WEBP")),
        *(_saved(alpha, image_format) for image_format in ("PNG", "WEBP")),
        _saved(alpha.convert("LA"), "PNG"),
        _saved(picture.convert("L"), "PNG"),
        _saved(picture.convert("P"), "PNG", transparency=0),
        _saved(picture.convert("CMYK"), "JPEG"),
        _saved(Image.fromarray(rng.integers(0, 65536, (SIZE, SIZE), dtype=np.uint16)), "PNG"),
        _saved(picture, "PPM"),
        b"P5 %d %d 65535 " % (SIZE, SIZE) + rng.bytes(2 * SIZE * SIZE),
        arrays.getvalue(),
    ]


def _claims_another_size(content: bytearray, rng: random.Random) -> None:
    """A PNG whose header is right in itself and says another size."""
    if content[:4] == b"\x89PNG":
        content[16:24] = struct.pack(">II", *(rng.choice([0, 1, 60, 65535, 1 << 31]) for _ in range(2)))
        content[29:33] = struct.pack(">I", zlib.crc32(bytes(content[12:29])))


def damage(good: bytes, rng: random.Random) -> bytes:
    content, place = bytearray(good), rng.randrange(len(good))
    kind = rng.randrange(5)
    if kind == 0:
        content[place] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del content[place:]
    elif kind == 2:
        for at in rng.choices(range(min(64, len(content))), k=4):  # the header
            content[at] = rng.randrange(256)
    elif kind == 3:
        content[place : place + rng.randrange(40)] = rng.randbytes(rng.randrange(40))
    else:
        _claims_another_size(content, rng)
    return bytes(content)


def campaign(rounds: int, seed: int) -> dict[str, int]:
    rng, goods = random.Random(seed), whole()
    counts: collections.Counter[str] = collections.Counter()
    transform = Transform(16, (16, 16), True, 0.5)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about what it finds odd
        for _ in range(rounds):
            image, hint = rng.choice(goods), rng.choice(goods)
            image, hint = (damage(image, rng), hint) if rng.random() < 0.5 else (image, damage(hint, rng))
            path = write_tar(Path(folder) / "0.tar", [("a.jpg", image), ("a.txt", b"red"), ("a.png", hint)])
            index_shard.cache_clear()
            (sample,) = index_shard(str(path), EXTENSIONS).samples
            reader, begin = rng.choice(READERS), time.process_time()
            try:
                decoded = read_sample(sample, {}, transform, None, np.random.default_rng(0), reader)
                right = decoded.image.shape == (16, 16, 3) and decoded.hint.shape == (16, 16, reader.channels)
                outcome = "read" if right and np.isfinite(decoded.hint).all() else "accepted damage"
            except BadSample:
                outcome = "dropped"
            except Exception:
                outcome = "raised"
            counts["hung" if time.process_time() - begin > SECONDS else outcome] += 1
    return counts
