"""One sample: bytes -> image, hint and caption, with one joint resize, crop and flip of image and hint."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from PIL import Image

from controlnet.data import images
from controlnet.data.hints import HintReader, nearest, size_of
from controlnet.data.images import ImageError
from controlnet.data.shards import DataError, Sample, stamp_of


class BadSample(Exception):
    """This sample cannot be used; the message is the reason under which it is counted."""


class ReplacedShard(BadSample):
    """The file under the shard's name is another than the one that was indexed."""

    def __init__(self):
        super().__init__("shard replaced while it was read")


class Placement(NamedTuple):
    """What part of a picture, at what size, is used.

    Attributes:
        size: (width, height) that the whole picture is brought to.
        box: (left, top, right, bottom) of the part of it that is used.
        flip: whether that part is then mirrored from left to right.
    """

    size: tuple[int, int]
    box: tuple[int, int, int, int]
    flip: bool

    def image(self, picture: Image.Image) -> np.ndarray:
        """uint8 [H, W, 3] of an RGB picture, bicubically; only the part that is used is made."""
        if self.size == picture.size:
            part = picture.crop(self.box)
        else:
            steps = (picture.width / self.size[0], picture.height / self.size[1])
            ends = [min(at * steps[i % 2], picture.size[i % 2]) for i, at in enumerate(self.box)]
            shape = self.box[2] - self.box[0], self.box[3] - self.box[1]
            part = picture.resize(shape, Image.Resampling.BICUBIC, box=ends)
        pixels = np.asarray(part)
        return pixels[:, ::-1] if self.flip else pixels

    def hint(self, pixels: np.ndarray) -> np.ndarray:
        """[H, W, C] of a hint's pixels, by the nearest one, so that labels stay labels."""
        part = nearest(pixels, self.size, self.box)
        return part[:, ::-1] if self.flip else part

    def time_ids(self, original: tuple[int, int]) -> tuple[int, ...]:
        """What SDXL is told: height and width of the original, top and left of the crop, height and width of the crop.

        The crop counts in the resized picture, and in the mirrored one where it is mirrored.

        Args:
            original: (width, height).
        """
        left, top, right, bottom = self.box
        left = self.size[0] - right if self.flip else left
        return original[1], original[0], top, left, bottom - top, right - self.box[0]


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

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of the results: one."""
        return (self.crop,)

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
        crop = height_and_width(center if anywhere is None else anywhere, where)
        if crop[0] % factor or crop[1] % factor:
            raise DataError(f"{where}: the crop is {crop[0]} x {crop[1]}; expected multiples of the factor {factor}")
        resize = augmentations.get("resize_smallest_side")
        if resize is not None and resize < min(crop):
            raise DataError(f"{where}.resize_smallest_side is {resize}; expected at least the crop's {min(crop)}")
        return cls(resize, crop, anywhere is not None, flip_probability(augmentations))

    def place(self, size: tuple[int, int], rng: np.random.Generator) -> Placement:
        """Where the crop lies in a picture of `size` (width, height).

        Raises:
            BadSample: the crop does not fit, or the resized picture would have more than `images.MAX_PIXELS`.
        """
        draws = rng.random(3)
        if self.resize is not None:
            scale = self.resize / min(size)
            size = tuple(max(self.resize, round(side * scale)) for side in size)
        return placed(size, self.crop, draws if self.random_crop else None, draws[2] < self.flip)


def placed(size: tuple[int, int], crop: tuple[int, int], draws: np.ndarray | None, flip: bool) -> Placement:
    """A crop (height, width) of a picture resized to `size`: where two numbers in [0, 1) say, or in the centre.

    Raises:
        BadSample: it does not fit, or the resized picture would have more than `images.MAX_PIXELS`.
    """
    spare_x, spare_y = size[0] - crop[1], size[1] - crop[0]
    if spare_x < 0 or spare_y < 0:
        raise BadSample("smaller than the crop")
    if size[0] * size[1] > images.MAX_PIXELS:  # an extremely long, thin picture
        raise BadSample(f"resized, has more than {images.MAX_PIXELS} pixels")
    left, top = spare_x // 2, spare_y // 2
    if draws is not None:
        left, top = int(draws[0] * (spare_x + 1)), int(draws[1] * (spare_y + 1))
    return Placement(size, (left, top, left + crop[1], top + crop[0]), bool(flip))


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


def height_and_width(value, where: str) -> tuple[int, int]:
    """(height, width) of "512, 512", a list of two, or one number for both; DataError for anything else."""
    parts = value.split(",") if isinstance(value, str) else [value] if isinstance(value, int) else list(value)
    try:
        sides = [int(part) for part in parts]
    except (TypeError, ValueError):
        sides = []
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise DataError(f"{where}: the crop is {value!r}; expected height and width in pixels, like 512 or '512, 512'")
    return sides[0], sides[-1]


def flip_probability(augmentations: Mapping) -> float:
    """`horizontal_flip` of `data.train.augmentations`: true is 0.5; DataError for what is no probability."""
    flip = augmentations.get("horizontal_flip") or 0.0
    flip = 0.5 if flip is True else float(flip)
    if not 0 <= flip <= 1:
        raise DataError(f"data.train.augmentations.horizontal_flip is {flip}; expected a probability, true or false")
    return flip


class Decoded(NamedTuple):
    """A sample as a batch takes it.

    Attributes:
        image: uint8 [H, W, 3].
        hint: [H, W, hint channels], uint8, or float32 with 1 for white.
        caption: text.
        placement: what part of the picture this is.
        original: (width, height) of the whole picture.
    """

    image: np.ndarray
    hint: np.ndarray
    caption: str
    placement: Placement
    original: tuple[int, int]

    @property
    def time_ids(self) -> tuple[int, ...]:
        """Six numbers; see `Placement.time_ids`."""
        return self.placement.time_ids(self.original)

    @property
    def size(self) -> tuple[int, ...]:
        """Samples of one size make a batch."""
        return self.image.shape[:2]


def read_sample(
    sample: Sample,
    formats: Mapping[str, str],
    transform: Transform,
    resolution: Resolution | None,
    rng: np.random.Generator,
    hints: HintReader | None = None,
    notes: list[str] | None = None,
) -> Decoded | None:
    """Decode and transform a sample.

    Args:
        sample: from `shards.index_shard`.
        formats: Pillow's format to try first, for the roles "image" and "hint".
        transform: the joint transform, or anything with its `place`.
        resolution: images of other sizes are left out; None takes all.
        rng: where crop and flip come from.
        hints: how hints are decoded; by default RGB pictures.
        notes: what a person should be told is appended.

    Returns:
        the sample; None when `resolution` leaves it out.

    Raises:
        BadSample: it cannot be decoded, or image and hint differ in size.
    """
    found = decode(read_members(sample), formats, hints or HintReader(), resolution, notes)
    if found is None:
        return None
    picture, hint, caption = found
    placement = transform.place(picture.size, rng)
    return Decoded(placement.image(picture), placement.hint(hint), caption, placement, picture.size)


def decode(
    data: Mapping[str, bytes],
    formats: Mapping[str, str],
    hints: HintReader,
    resolution: Resolution | None = None,
    notes: list[str] | None = None,
) -> tuple[Image.Image, np.ndarray, str] | None:
    """The whole image in RGB, the whole hint [H, W, C] and the caption of the roles "image", "hint" and "caption".

    Sizes are compared before anything is decoded; the EXIF orientation may then still trade width and height.

    Args, Returns None, Raises: as `read_sample`.
    """
    try:
        caption = data["caption"].decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise BadSample("caption not UTF-8") from error
    picture = _of("image", images.open_picture, data["image"], formats.get("image"))
    opened = _of("hint", hints.open, data["hint"], formats.get("hint"))
    if sorted(picture.size) != sorted(size_of(opened)):
        raise BadSample("image and hint differ in size")
    if resolution is not None and not resolution.admits(picture.size):
        return None
    stored = picture.size
    picture = _of("image", images.upright, picture)
    hint = _of("hint", hints.decode, opened, notes)
    if size_of(hint) != picture.size:
        turned = stored != picture.size and stored == size_of(hint)
        raise BadSample("image turned by its EXIF orientation, hint not" if turned else "image and hint differ in size")
    return _of("image", images.rgb, picture), hint, caption


def check_sample(sample: Sample, formats: Mapping[str, str], hints: HintReader, notes: list[str] | None = None) -> None:
    """Raises BadSample where training could not use the sample, whatever its crop."""
    decode(read_members(sample), formats, hints, None, notes)


def _of(role: str, step, *arguments):
    """step(*arguments); an ImageError becomes a BadSample that names the role."""
    try:
        return step(*arguments)
    except ImageError as error:
        raise BadSample(f"{role} {error}") from error


def read_members(sample: Sample) -> dict[str, bytes]:
    """The bytes of each role, of the shard that was indexed and no other under its name."""
    data = {}
    try:
        with open(sample.shard, "rb") as shard:
            if sample.stamp is not None and stamp_of(os.fstat(shard.fileno())) != sample.stamp:
                raise ReplacedShard
            for role, (at, length) in sample.members.items():
                if length > images.MAX_BYTES:
                    raise BadSample(f"{role} has more than {images.MAX_BYTES} bytes")
                shard.seek(at)
                data[role] = shard.read(length)
                if len(data[role]) != length:
                    raise BadSample("member cut short")
    except OSError as error:
        raise BadSample("shard unreadable") from error
    return data
