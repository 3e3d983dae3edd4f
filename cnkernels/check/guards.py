"""Sentinel values around every allocation of a kernel's launcher, so that a write outside of it is seen."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

MARGIN = 1 << 18  # bytes on either side
SENTINEL = 42
_empty, _empty_like, _empty_strided = torch.empty, torch.empty_like, torch.empty_strided  # PyTorch's own


@contextmanager
def guarded() -> Iterator[list[str]]:
    """Inside the block, torch.empty, empty_like and empty_strided return tensors inside a larger buffer, full of NaN.

    Yields:
        A list that holds, once the block is left, one line for each allocation around which something was written.
    """
    buffers: list[tuple[Tensor, int]] = []
    faults: list[str] = []

    def inside(shape, strides, dtype: torch.dtype, device) -> Tensor:
        size = _empty_strided(shape, strides, dtype=dtype, device="meta").numel() * dtype.itemsize
        buffer = torch.full((size + 2 * MARGIN,), SENTINEL, dtype=torch.uint8, device=device)
        buffers.append((buffer, size))
        tensor = buffer[MARGIN : MARGIN + size].view(dtype).as_strided(shape, strides)
        return tensor.fill_(torch.nan) if dtype.is_floating_point else tensor

    def empty(*size, dtype=None, device=None, memory_format=torch.contiguous_format, **_) -> Tensor:
        shape = size[0] if size and not isinstance(size[0], int) else size
        strides = _empty(shape, device="meta", memory_format=memory_format).stride()
        return inside(shape, strides, dtype or torch.get_default_dtype(), device)

    def empty_like(t: Tensor, *, dtype=None, device=None, **_) -> Tensor:
        return inside(t.shape, _empty_like(t, device="meta").stride(), dtype or t.dtype, device or t.device)

    def empty_strided(shape, strides, *, dtype=None, device=None) -> Tensor:
        return inside(shape, strides, dtype or torch.get_default_dtype(), device)

    with (
        mock.patch.object(torch, "empty", empty),
        mock.patch.object(torch, "empty_like", empty_like),
        mock.patch.object(torch, "empty_strided", empty_strided),
    ):
        yield faults
    for buffer, size in buffers:
        margins = torch.cat((buffer[:MARGIN], buffer[MARGIN + size :]))
        if not bool((margins == SENTINEL).all()):
            faults.append("something was written outside of a tensor that the op allocated")
