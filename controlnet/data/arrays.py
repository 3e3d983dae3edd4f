"""Reads .npy files from untrusted sources."""

from __future__ import annotations

import io
import tokenize

import numpy as np

from controlnet.data.images import ImageError

MAGIC = b"\x93NUMPY"

# What NumPy's parser of the header raises.
_HEADER_ERRORS = (ValueError, SyntaxError, TypeError, KeyError, EOFError, RecursionError, MemoryError)
_HEADER_ERRORS += (tokenize.TokenError,)


def read_npy(data: bytes, dims: tuple[int, ...], expected: str) -> np.ndarray:
    """The array of a .npy, sharing memory with it; nothing is unpickled, and nothing allocated on a header's word.

    Args:
        data: the file's content.
        dims: how many dimensions the array may have.
        expected: for the message.

    Raises:
        ImageError: it is damaged, or holds something else.
    """
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, fortran, dtype = read_header[version](file)
    except _HEADER_ERRORS as error:
        raise ImageError("not readable") from error
    if dtype.hasobject or dtype.itemsize == 0 or len(shape) not in dims or min(shape, default=1) < 1:
        raise ImageError(f"is an array {tuple(shape)} of {dtype}; expected {expected}")
    count = int(np.prod(shape, dtype=object))
    if count * dtype.itemsize != len(data) - file.tell():
        raise ImageError("not readable")
    return np.frombuffer(data, dtype, count, file.tell()).reshape(shape, order="F" if fortran else "C")
