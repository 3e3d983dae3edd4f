"""The decoder of pictures from untrusted bytes, used by training, `generate` and `shards` alike.

The header is read first: the format must be one of `FORMATS`, the size within Pillow's limit. Then, for every use
alike, the EXIF orientation is applied, transparency is laid on a ground, and 16 bits are scaled: 65535 becomes 1.
"""

from __future__ import annotations

import io
import struct

import numpy as np
from PIL import ExifTags, Image

# Only these are ever decoded, whatever the file's name says; each by its own decoder of Pillow.
FORMATS = ("JPEG", "PNG", "WEBP", "PPM")
# Extensions of a sample's image or hint -> the format that is tried first.
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
MAX_PIXELS = 2 * Image.MAX_IMAGE_PIXELS  # where Pillow refuses: 179 million
MAX_BYTES = 1 << 30  # of a file; a hint of 16 channels and as many pixels as a photograph has less
WHITE = (255, 255, 255)

# What Pillow's decoders raise on damaged files.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, Image.DecompressionBombError)

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(ValueError):
    """This picture cannot be used; the message is the reason, to be read after what the picture is."""


def open_picture(data: bytes, first: str | None = None) -> Image.Image:
    """The picture with its format and stored size known and nothing decoded.

    Args:
        data: the file's content.
        first: which of FORMATS to try first.

    Raises:
        ImageError: none of FORMATS, damaged, or of more than MAX_PIXELS pixels.
    """
    order = FORMATS if first is None else (first, *(other for other in FORMATS if other != first))
    try:
        picture = Image.open(io.BytesIO(data), formats=order)
    except Image.DecompressionBombError as error:
        raise ImageError(f"has more than {MAX_PIXELS} pixels") from error
    except DECODE_ERRORS as error:
        raise ImageError("not readable") from error
    if picture.width * picture.height > MAX_PIXELS:
        raise ImageError(f"has more than {MAX_PIXELS} pixels")
    return picture


def upright(picture: Image.Image) -> Image.Image:
    """The decoded picture as its EXIF orientation wants it seen.

    Raises:
        ImageError: it is damaged.
    """
    try:
        picture.load()
    except DECODE_ERRORS as error:
        raise ImageError("not readable") from error
    turn = _UPRIGHT.get(_orientation(picture))
    return picture if turn is None else picture.transpose(turn)


def _orientation(picture: Image.Image) -> int:
    try:
        return picture.getexif().get(ExifTags.Base.Orientation, 1)
    except DECODE_ERRORS:  # a damaged EXIF block says nothing; the picture itself is whole
        return 1


def is_deep(picture: Image.Image) -> bool:
    """Whether its pixels have 16 bits. Pillow has them as "I;16" and its big-endian twin, and those of a PPM as "I"."""
    return picture.mode.startswith("I")


def deep_pixels(picture: Image.Image) -> np.ndarray:
    """The [H, W] pixels of a picture of 16 bits, float32 in [0, 1]: 65535 is 1."""
    return np.asarray(picture).astype(np.float32) / 65535


def has_alpha(picture: Image.Image) -> bool:
    return picture.mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in picture.info


def rgb(picture: Image.Image, ground: tuple[int, int, int] = WHITE) -> Image.Image:
    """The upright picture in 8-bit RGB, what is transparent in it on the ground.

    Raises:
        ImageError: its pixels are floating-point numbers, of which nobody says what white is.
    """
    if picture.mode == "F":
        raise ImageError("has floating-point pixels")
    if is_deep(picture):
        return Image.fromarray(np.rint(deep_pixels(picture) * 255).astype(np.uint8)).convert("RGB")
    if not has_alpha(picture):
        return picture.convert("RGB")
    canvas = Image.new("RGBA", picture.size, (*ground, 255))
    return Image.alpha_composite(canvas, picture.convert("RGBA")).convert("RGB")
