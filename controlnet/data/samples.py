"""One sample: bytes -> image, hint and caption, with one joint resize, crop and flip of image and hint."""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from PIL import Image

from controlnet.data.shards import DataError, Sample

# Only these are ever decoded, each by its own decoder of Pillow.
IMAGE_FORMATS = {
    "jpg": "JPEG",
    "jpeg": "JPEG",
    "png": "PNG",
    "webp": "WEBP",
    "ppm": "PPM",
    "pgm": "PPM",
    "pbm": "PPM",
    "pnm": "PPM",
}

# What Pillow's decoders raise on damaged files.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, Image.DecompressionBombError)


class BadSample(Exception):
    """This sample cannot be used; the message is the reason under which it is counted."""


class Transform(NamedTuple):
    """The joint transform of image and hint.

    Attributes:
        resize: length in pixels that the smaller side is brought to; None leaves the size.
        crop: height and width of the result.
        random_crop: the crop lies anywhere; otherwise in the centre.
        flip: probability of a horizontal flip.
    """

    resize: int | None
    crop: tuple[int, int]
    random_crop: bool
    flip: float

    @classmethod
    def from_config(cls, augmentations: Mapping, factor: int) -> Transform:
        """Read `data.train.augmentations`.

        Args:
            augmentations: keys `resize_smallest_side` (pixels), one of `center_crop_h_w` and `random_crop_h_w`
                ("512, 512", a list of two, or one number for both), `horizontal_flip` (a probability, or true for 0.5).
            factor: what height and width must be divisible by.

        Raises:
            DataError: naming the key.
        """
        where = "data.train.augmentations"
        center, anywhere = augmentations.get("center_crop_h_w"), augmentations.get("random_crop_h_w")
        if (center is None) == (anywhere is None):
            raise DataError(f"{where}: expected exactly one of center_crop_h_w={center} and random_crop_h_w={anywhere}")
        crop = _height_and_width(center if anywhere is None else anywhere, where)
        if crop[0] % factor or crop[1] % factor:
            raise DataError(f"{where}: the crop is {crop[0]} x {crop[1]}; expected multiples of the factor {factor}")
        resize = augmentations.get("resize_smallest_side")
        if resize is not None and resize < min(crop):
            raise DataError(f"{where}.resize_smallest_side is {resize}; expected at least the crop's {min(crop)}")
        flip = augmentations.get("horizontal_flip") or 0.0
        flip = 0.5 if flip is True else float(flip)
        if not 0 <= flip <= 1:
            raise DataError(f"{where}.horizontal_flip is {flip}; expected a probability, true or false")
        return cls(resize, crop, anywhere is not None, flip)

    def __call__(
        self, image: Image.Image, hint: Image.Image, rng: np.random.Generator
    ) -> tuple[Image.Image, Image.Image]:
        """Transform both alike: the image bicubically, the hint by nearest neighbour, so that labels stay labels."""
        shift_x, shift_y, flip = rng.random(3)
        width, height = image.size
        if self.resize is not None:
            scale = self.resize / min(width, height)
            width, height = (max(self.resize, round(side * scale)) for side in (width, height))
        spare_x, spare_y = width - self.crop[1], height - self.crop[0]
        if spare_x < 0 or spare_y < 0:
            raise BadSample("smaller than the crop")
        if (width, height) != image.size:
            image = image.resize((width, height), Image.Resampling.BICUBIC)
            hint = hint.resize((width, height), Image.Resampling.NEAREST)
        left, top = spare_x // 2, spare_y // 2
        if self.random_crop:
            left, top = int(shift_x * (spare_x + 1)), int(shift_y * (spare_y + 1))
        box = (left, top, left + self.crop[1], top + self.crop[0])
        image, hint = image.crop(box), hint.crop(box)
        if flip < self.flip:
            image, hint = (each.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for each in (image, hint))
        return image, hint


class Resolution(NamedTuple):
    """`data.train.filterings.resolution`: which images are used.

    Attributes:
        method: "larger" wants both sides >= value, "smaller" both <= value.
        value: in pixels.
    """

    method: str
    value: int

    @classmethod
    def from_config(cls, filterings: Mapping | None) -> Resolution | None:
        resolution = (filterings or {}).get("resolution")
        if resolution is None:
            return None
        method, value = resolution.get("method"), resolution.get("value")
        if method not in ("larger", "smaller") or type(value) is not int:
            where, expected = "data.train.filterings.resolution", "method larger or smaller, and value in pixels"
            raise DataError(f"{where} is method={method!r}, value={value!r}; expected {expected}")
        return cls(method, value)

    def admits(self, size: tuple[int, int]) -> bool:
        return min(size) >= self.value if self.method == "larger" else max(size) <= self.value


def _height_and_width(value, where: str) -> tuple[int, int]:
    parts = value.split(",") if isinstance(value, str) else [value] if isinstance(value, int) else list(value)
    try:
        sides = [int(part) for part in parts]
    except (TypeError, ValueError):
        sides = []
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise DataError(f"{where}: the crop is {value!r}; expected height and width in pixels, like 512 or '512, 512'")
    return sides[0], sides[-1]


def read_sample(
    sample: Sample,
    formats: Mapping[str, str],
    transform: Transform,
    resolution: Resolution | None,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray, str] | None:
    """Decode and transform a sample.

    Args:
        sample: from `shards.index_shard`.
        formats: Pillow's format for the roles "image" and "hint".
        transform: the joint transform.
        resolution: images of other sizes are left out; None takes all.
        rng: where crop and flip come from.

    Returns:
        image [H, W, 3] uint8, hint [H, W, 3] uint8, caption; None when `resolution` leaves the sample out.

    Raises:
        BadSample: it cannot be decoded, or image and hint differ in size.
    """
    data = {}
    try:
        with open(sample.shard, "rb") as shard:
            for role, (at, length) in sample.members.items():
                shard.seek(at)
                data[role] = shard.read(length)
                if len(data[role]) != length:
                    raise BadSample("member cut short")
    except OSError as error:
        raise BadSample("shard unreadable") from error
    try:
        caption = data["caption"].decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise BadSample("caption not UTF-8") from error
    image, hint = (_decode(data[role], formats[role], role) for role in ("image", "hint"))
    if image.size != hint.size:
        raise BadSample("image and hint differ in size")
    if resolution is not None and not resolution.admits(image.size):
        return None
    image, hint = transform(image, hint, rng)
    return np.asarray(image), np.asarray(hint), caption


def _decode(data: bytes, image_format: str, role: str) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=(image_format,))
        image.load()
        if image.mode.startswith(("I", "F")):  # more than 8 bits: converting would clip, not scale
            raise BadSample(f"{role} not 8 bits a channel")
        return image.convert("RGB")
    except _DECODE_ERRORS as error:
        raise BadSample(f"{role} not readable") from error
