"""Sentinel values around every allocation of a kernel's launcher, so that a write outside of it is seen."""

from contextlib import contextmanager
from unittest import mock

import torch

_MARGIN = 1 << 18  # bytes on either side
_SENTINEL = 42
_empty, _empty_like = torch.empty, torch.empty_like  # PyTorch's own, inside a block as well


@contextmanager
def guarded_empty():
    """Inside the block, torch.empty and torch.empty_like return tensors in the middle of a larger buffer.

    The margins around each keep their sentinel, or leaving the block fails. The tensors themselves hold NaN.
    """
    buffers = []

    def guarded(*size, dtype=None, device=None, memory_format=torch.contiguous_format, **_):
        shape = size[0] if size and not isinstance(size[0], int) else size
        strides = _empty(shape, device="meta", memory_format=memory_format).stride()
        return _inside(shape, strides, dtype or torch.get_default_dtype(), device)

    def _inside(shape, strides, dtype, device):
        meta = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
        size = meta.numel() * dtype.itemsize
        buffer = torch.full((size + 2 * _MARGIN,), _SENTINEL, dtype=torch.uint8, device=device)
        buffers.append((buffer, size))
        inner = buffer[_MARGIN : _MARGIN + size].view(dtype).as_strided(shape, strides)
        return inner.fill_(torch.nan) if dtype.is_floating_point else inner

    def guarded_like(t, *, dtype=None, device=None, **_):
        strides = _empty_like(t, device="meta").stride()
        return _inside(t.shape, strides, dtype or t.dtype, device or t.device)

    with mock.patch.object(torch, "empty", guarded), mock.patch.object(torch, "empty_like", guarded_like):
        yield
    for buffer, size in buffers:
        margins = torch.cat((buffer[:_MARGIN], buffer[_MARGIN + size :]))
        assert (margins == _SENTINEL).all(), "something was written outside of a tensor that the op allocated"
