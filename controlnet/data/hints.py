"""Hints: what a ControlNet sees, from a picture, a map of class ids or an array."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageColor
from torch import Tensor

from controlnet.data import images
from controlnet.data.arrays import MAGIC, read_npy
from controlnet.data.images import ImageError
from controlnet.data.palettes import Palette, PaletteError, palette

KINDS = ("picture", "labels")
PICTURE_CHANNELS = (1, 3, 4)  # gray, RGB, RGBA; any other number comes from .npy
DARK = 16  # of 255: a hint whose largest value is below this is reported as nearly black


class HintReader(NamedTuple):
    """How the bytes of a hint become [H, W, channels].

    Attributes:
        channels: `hint_channels` of the ControlNet.
        palette: colours the class ids of label maps; None where hints are pictures.
        ground: what is transparent in a hint is laid on this colour, unless the hint has 4 channels.
    """

    channels: int = 3
    palette: Palette | None = None
    ground: tuple[int, int, int] = images.WHITE

    @classmethod
    def from_config(cls, hint: Mapping[str, Any] | None, channels: int = 3) -> HintReader:
        """Read `data.train.hint`.

        Args:
            hint: keys `kind` (picture or labels), `palette` (ade20k, cocostuff or a file; see `palettes.palette`),
                `ground` (a colour by name, such as white, or "#rrggbb").
            channels: `hint_channels`.

        Raises:
            ValueError: naming the key.
        """
        hint, where = hint or {}, "data.train.hint"
        unknown = set(hint) - {"kind", "palette", "ground"}
        if unknown:
            raise ValueError(f"{where} has the key {min(unknown)!r}; expected kind, palette and ground")
        kind, name = hint.get("kind") or "picture", hint.get("palette")
        if kind not in KINDS:
            raise ValueError(f"{where}.kind is {kind!r}; expected {' or '.join(KINDS)}")
        if channels < 1:
            raise ValueError(f"hint_channels is {channels}; expected 1 or more")
        if (kind == "labels") != (name is not None):
            raise ValueError(
                f"{where} has kind {kind} and palette {name}; a palette belongs to kind labels, and only there"
            )
        if kind == "labels" and channels != 3:
            raise ValueError(
                f"{where}.kind is labels, which are coloured in RGB, but hint_channels is {channels}, not 3"
            )
        try:
            ground = ImageColor.getrgb(hint.get("ground") or "white")[:3]
            return cls(channels, None if name is None else palette(str(name)), ground)
        except PaletteError as error:
            raise ValueError(f"{where}.palette: {error}") from error
        except (ValueError, AttributeError, TypeError) as error:
            raise ValueError(f"{where}.ground is {hint['ground']!r}; expected a colour, white or #rrggbb") from error

    def open(self, data: bytes, first: str | None = None) -> Image.Image | np.ndarray:
        """A hint of which only the header has been interpreted; its size is `size_of` it.

        Raises:
            ImageError: it is no picture that is read, and no array.
        """
        if data.startswith(MAGIC):
            return read_npy(data, (2, 3), "[H, W] or [H, W, C] of numbers")
        if self.channels not in PICTURE_CHANNELS:
            raise ImageError(f"is no .npy, which alone can have {self.channels} channels")
        return images.open_picture(data, first)

    def decode(self, opened: Image.Image | np.ndarray, notes: list[str] | None = None) -> np.ndarray:
        """The hint [H, W, channels]: uint8, or float32 where it has more than 8 bits, then 1 is white.

        Args:
            opened: from `open`.
            notes: what a person should be told of this hint is appended.

        Raises:
            ImageError: it cannot be used.
        """
        notes = [] if notes is None else notes
        if isinstance(opened, np.ndarray):
            return self._array(opened)
        picture = images.upright(opened)
        if self.palette is not None:
            return _coloured(picture, self.palette)
        pixels = self._pixels(picture, notes)
        if images.is_deep(picture):
            notes.append("a hint has 16 bits: 65535 becomes 1")
        if _is_dark(picture, pixels):
            notes.append(
                f"a hint is almost black: its largest value is {_brightest(pixels):.3g} of 255. If it is a map of class"
                " ids, set data.train.hint={kind: labels, palette: ade20k}, or cocostuff, or a file of colours"
            )
        return pixels

    def _pixels(self, picture: Image.Image, notes: list[str]) -> np.ndarray:
        if images.is_deep(picture):
            pixels = images.deep_pixels(picture)[..., None].repeat(self.channels, -1)
            if self.channels == 4:
                pixels[..., 3] = 1
            return pixels
        if self.channels == 4:
            images.rgb(picture)  # refuses what it refuses everywhere
            return np.asarray(picture.convert("RGBA"))
        pixels = np.asarray(images.rgb(picture, self.ground))
        if images.has_alpha(picture) and pixels.size and (pixels == pixels[0, 0]).all():
            notes.append(
                f"a transparent hint has one colour once it lies on its ground, {self.ground}: nothing of it is seen."
                " Set data.train.hint.ground to another colour"
            )
        return np.asarray(Image.fromarray(pixels).convert("L"))[..., None] if self.channels == 1 else pixels

    def _array(self, array: np.ndarray) -> np.ndarray:
        if self.palette is not None:
            return _colours(array, self.palette)
        pixels = array[..., None] if array.ndim == 2 else array
        if pixels.shape[2] != self.channels:
            raise ImageError(f"has {pixels.shape[2]} channels, where hint_channels is {self.channels}")
        if pixels.dtype == np.uint8:
            return pixels
        if pixels.dtype == bool:
            return pixels.astype(np.uint8) * 255
        if pixels.dtype == np.uint16:
            return pixels.astype(np.float32) / 65535
        if pixels.dtype.kind != "f":
            raise ImageError(f"is an array of {pixels.dtype}; expected uint8, uint16, bool or floating-point numbers")
        pixels = pixels.astype(np.float32)
        if not np.isfinite(pixels).all():
            raise ImageError("is an array with NaN or infinity")
        return pixels


def size_of(opened: Image.Image | np.ndarray) -> tuple[int, int]:
    """(width, height) as they are stored."""
    return (opened.shape[1], opened.shape[0]) if isinstance(opened, np.ndarray) else opened.size


def unit(pixels: np.ndarray) -> Tensor:
    """float32 [C, H, W] of pixels [H, W, C]; uint8 255 becomes 1."""
    tensor = torch.from_numpy(np.array(pixels.transpose(2, 0, 1), dtype=np.float32, order="C"))
    return tensor.div_(255) if pixels.dtype == np.uint8 else tensor


def read_hint(path: Path | str, size: tuple[int, int] | None = None, reader: HintReader | None = None) -> Tensor:
    """A hint [1, channels, H, W] in [0, 1] from a file, decoded as training decodes it.

    Args:
        path: a JPEG, PNG, WebP or PNM file, or a .npy of [H, W] or [H, W, channels].
        size: (width, height) to bring it to, by the nearest pixel: the colours of a label map stay pure.
        reader: by default hints are RGB pictures.

    Raises:
        FileNotFoundError, PermissionError, IsADirectoryError: as `open` has them.
        ValueError: naming the file and why it cannot be used.
    """
    reader, notes = reader or HintReader(), []
    with open(path, "rb") as file:
        data = file.read(images.MAX_BYTES + 1)  # bounded, since a device file is endless
    if len(data) > images.MAX_BYTES:
        raise ValueError(f"the hint {path} has more than {images.MAX_BYTES} bytes")
    try:
        pixels = reader.decode(reader.open(data), notes)
    except ImageError as error:
        raise ValueError(f"the hint {path} cannot be read as an image: it {_sentence(error)}") from error
    for note in notes:
        warnings.warn(f"{path}: {note}", stacklevel=2)
    if size is not None:
        pixels = nearest(pixels, size, (0, 0, *size))
    return unit(pixels)[None]


def _sentence(error: ImageError) -> str:
    reason = str(error)
    return "is no JPEG, PNG, WebP, PNM or .npy that can be read" if reason == "not readable" else reason


def nearest(pixels: np.ndarray, size: tuple[int, int], box: tuple[int, int, int, int]) -> np.ndarray:
    """The part `box` of pixels [H, W, C] brought to `size` by the nearest pixel; only that part is made.

    Args:
        size: (width, height) of the whole.
        box: (left, top, right, bottom) within it.
    """
    height, width = pixels.shape[:2]
    if (width, height) == size:
        return pixels[box[1] : box[3], box[0] : box[2]]
    columns = (2 * np.arange(box[0], box[2]) + 1) * width // (2 * size[0])  # the pixel that the centre falls into
    rows = (2 * np.arange(box[1], box[3]) + 1) * height // (2 * size[1])
    return pixels[rows].take(columns, axis=1)


def _coloured(picture: Image.Image, palette: Palette) -> np.ndarray:
    if picture.mode not in ("1", "L", "P") and not images.is_deep(picture):
        raise ImageError(f"is a picture of mode {picture.mode}; a label map has one channel of class ids")
    return _colours(np.asarray(picture), palette)  # of a P: the indices, whatever colours the file gives them


def _colours(ids: np.ndarray, palette: Palette) -> np.ndarray:
    if ids.ndim == 3 and ids.shape[2] == 1:
        ids = ids[..., 0]
    if ids.ndim != 2 or ids.dtype.kind not in "bui" or ids.min() < 0:
        raise ImageError(f"is an array {ids.shape} of {ids.dtype}; a label map is [H, W] of class ids")
    try:
        return palette(ids.astype(np.intp))
    except PaletteError as error:
        raise ImageError(str(error)) from error


def _brightest(pixels: np.ndarray) -> float:
    return float(pixels.max()) * (1 if pixels.dtype == np.uint8 else 255)


def _is_dark(picture: Image.Image, pixels: np.ndarray) -> bool:
    """Whether it shows something that nobody will see. All black says: nothing there; 255 alone may mean unlabelled."""
    if picture.mode == "L":
        below = np.asarray(picture)
        below = below[below < 255]
        return below.size > 0 and 0 < below.max() < DARK
    return 0 < _brightest(pixels[..., :3]) < DARK
