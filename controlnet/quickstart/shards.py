"""Writes the quickstart's scenes as WebDataset shards for training, and draws held-out scenes for scoring."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from controlnet.quickstart.scenes import HINT_COLOURS, scene

TRAINING_SEED, HELD_OUT_SEED = 0, 10_000


class Scenes(NamedTuple):
    """Held-out scenes for scoring."""

    images: Tensor  # uint8 [N, 3, H, W]
    hints: Tensor  # float32 [N, 3, H, W] in [0, 1]
    captions: list[str]
    labels: np.ndarray  # uint8 [N, H, W], index into scenes.CLASSES


def held_out(count: int) -> Scenes:
    """Draws scenes that are in no shard."""
    rng = np.random.default_rng(HELD_OUT_SEED)
    images, captions, labels = zip(*(scene(rng) for _ in range(count)), strict=True)
    stacked = np.stack(labels)
    hints = torch.from_numpy(HINT_COLOURS[stacked]).permute(0, 3, 1, 2).float() / 255
    return Scenes(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), hints, list(captions), stacked)


def write_shards(folder: Path, sizes: Sequence[int]) -> list[Path]:
    """Writes shards of the given numbers of scenes: KEY.jpg the image, KEY.txt the caption, KEY.png the hint.

    The same sizes give the same files, byte for byte, as long as Pillow's encoders do.

    Returns:
        their paths.
    """
    import webdataset

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, size in enumerate(sizes):
        rng = np.random.default_rng(TRAINING_SEED + number)
        paths.append(folder / f"{number:05d}.tar")
        with webdataset.TarWriter(str(paths[-1]), encoder=False, mtime=0) as writer:
            for i in range(size):
                image, caption, labels = scene(rng)
                key = f"{number:05d}-{i:05d}"
                jpg, png = _encoded(image, "JPEG"), _encoded(HINT_COLOURS[labels], "PNG")
                writer.write({"__key__": key, "jpg": jpg, "txt": caption.encode(), "png": png})
    return paths


def _encoded(pixels: np.ndarray, image_format: str) -> bytes:
    options = {"quality": 95, "subsampling": 0} if image_format == "JPEG" else {}
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, image_format, **options)
    return buffer.getvalue()
