"""Packs a folder of pictures into shards with computed hints, and checks them: python examples/make_shards.py"""

import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from controlnet import shards

with tempfile.TemporaryDirectory() as folder:
    images = Path(folder) / "images"
    images.mkdir()
    for number in range(4):
        pixels = np.zeros((64, 96, 3), np.uint8)
        pixels[16:48, 8 * number : 8 * number + 32] = 200
        Image.fromarray(pixels).save(images / f"{number:06}.jpg")
        (images / f"{number:06}.txt").write_text(f"a gray square, {number} steps to the right")
    shards.main([str(images), f"{folder}/shards", "--hint", "canny", "--workers", "1"])
    shards.main(["--check", f"{folder}/shards/*.tar"])
