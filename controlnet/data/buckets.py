"""Aspect buckets: pictures are cropped to the size of a list whose shape is nearest theirs, and batched by it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from controlnet.data.images import MAX_PIXELS
from controlnet.data.samples import Placement, Transform, flip_probability, height_and_width, placed
from controlnet.data.shards import DataError

_WHERE = "data.train.buckets"
_KEYS = ("sizes", "area", "step", "max_aspect", "random_crop")


class Buckets(NamedTuple):
    """The joint transform where a batch has one of several sizes. It stands where `samples.Transform` does.

    A picture goes to the bucket whose aspect ratio is nearest in the logarithm, is resized until it covers that size,
    up or down (`data.train.filterings.resolution` leaves small pictures out), and cropped to it.

    Attributes:
        sizes: (height, width) of each bucket.
        random_crop: the crop lies anywhere; otherwise in the centre.
        flip: probability of a horizontal flip.
    """

    sizes: tuple[tuple[int, int], ...]
    random_crop: bool
    flip: float

    @classmethod
    def from_config(cls, buckets: Mapping[str, Any], augmentations: Mapping[str, Any], factor: int) -> Buckets:
        """Read `data.train.buckets`.

        Args:
            buckets: `sizes`, a list of "height, width"; or `area` in pixels with `step` (64 pixels, between sizes) and
                `max_aspect` (2, of the longer side to the shorter): all sizes of at most that area. `random_crop`.
            augmentations: `data.train.augmentations`, of which only `horizontal_flip` goes with buckets.
            factor: what height and width must be divisible by.

        Raises:
            DataError: naming the key.
        """
        unknown = [key for key in buckets if key not in _KEYS]
        if unknown:
            raise DataError(f"{_WHERE} has the key {unknown[0]!r}; expected {', '.join(_KEYS)}")
        other = [key for key, value in augmentations.items() if value is not None and key != "horizontal_flip"]
        if other:
            raise DataError(f"data.train.augmentations.{other[0]} is set, but {_WHERE} decides the size; leave one out")
        sizes, area, random_crop = buckets.get("sizes"), buckets.get("area"), buckets.get("random_crop") or False
        if (sizes is None) == (area is None):
            raise DataError(f"{_WHERE}: expected exactly one of sizes={sizes} and area={area}")
        if not isinstance(random_crop, bool):
            raise DataError(f"{_WHERE}.random_crop is {random_crop!r}; expected true or false")
        if sizes is None:
            sizes = _of_area(area, buckets.get("step", 64), buckets.get("max_aspect", 2), factor)
        elif isinstance(sizes, (str, int)) or not len(sizes):
            raise DataError(f"{_WHERE}.sizes is {sizes!r}; expected a list, such as ['1024, 1024', '896, 1152']")
        else:
            sizes = tuple(height_and_width(size, f"{_WHERE}.sizes") for size in sizes)
        for height, width in sizes:
            if height % factor or width % factor:
                raise DataError(f"{_WHERE} has {height} x {width}; expected multiples of the factor {factor}")
        if len(set(sizes)) < len(sizes):
            raise DataError(f"{_WHERE}.sizes has a size twice: {sizes}")
        return cls(sizes, random_crop, flip_probability(augmentations))

    def place(self, size: tuple[int, int], rng: np.random.Generator) -> Placement:
        """Where the crop lies in a picture of `size` (width, height).

        Raises:
            BadSample: the resized picture would have more than `images.MAX_PIXELS`.
        """
        draws = rng.random(3)
        width, height = size
        aspect = math.log(width / height)
        bucket = min(self.sizes, key=lambda each: abs(math.log(each[1] / each[0]) - aspect))
        scale = max(bucket[0] / height, bucket[1] / width)
        resized = max(bucket[1], round(width * scale)), max(bucket[0], round(height * scale))
        return placed(resized, bucket, draws if self.random_crop else None, draws[2] < self.flip)


def transform_of(train: Mapping[str, Any], factor: int) -> Transform | Buckets:
    """The joint transform of image and hint that `data.train` describes.

    Raises:
        DataError: naming the key.
    """
    augmentations = train.get("augmentations") or {}
    if train.get("buckets") is None:
        return Transform.from_config(augmentations, factor)
    return Buckets.from_config(train["buckets"], augmentations, factor)


def _of_area(area: Any, step: Any, max_aspect: Any, factor: int) -> tuple[tuple[int, int], ...]:
    """Every (height, width) in steps whose area is at most this one and whose width is the largest such."""
    if type(area) is not int or area > MAX_PIXELS or type(step) is not int or step < 1 or step % factor:
        raise DataError(
            f"{_WHERE} has area={area!r} and step={step!r}; expected pixels, the step in multiples of {factor}"
        )
    if not isinstance(max_aspect, (int, float)) or isinstance(max_aspect, bool) or not max_aspect >= 1:
        raise DataError(f"{_WHERE}.max_aspect is {max_aspect!r}; expected 1 or more")
    sizes = []
    for height in range(step, math.isqrt(int(max(area, 0) * max_aspect)) + 1, step):
        width = area // height // step * step
        if width and max(height / width, width / height) <= max_aspect:
            sizes.append((height, width))
    if not sizes:
        raise DataError(
            f"{_WHERE}: no size in steps of {step} has an area of {area} and an aspect of up to {max_aspect}"
        )
    return tuple(sizes)
