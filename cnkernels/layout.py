"""Memory formats: the two that every op serves without a copy, and the one copy that others get."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def allocator(
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Callable[[], Tensor]:
    """A function that allocates such a tensor. Its strides are computed once: torch.empty takes twice as long."""
    inner_first = (1, 3, 2, 0) if memory_format is torch.channels_last else reversed(range(len(shape)))
    shape, strides, step = tuple(shape), [0] * len(shape), 1
    for dimension in inner_first:
        strides[dimension], step = step, step * max(shape[dimension], 1)
    strides = tuple(strides)
    return lambda: torch.empty_strided(shape, strides, dtype=dtype, device=device)


def memory_format_of(dense: Tensor) -> torch.memory_format:
    return torch.channels_last if is_channels_last(dense) else torch.contiguous_format


def is_channels_last(x: Tensor) -> bool:
    """True when `x` [N, C, H, W] is stored NHWC and not NCHW as well (one channel or one pixel is both)."""
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def dense(x: Tensor) -> Tensor:
    """`x` itself when contiguous or channels_last, otherwise a contiguous copy."""
    return x if x.is_contiguous() or is_channels_last(x) else x.contiguous()


def match(x: Tensor, like: Tensor) -> Tensor:
    """`x` in the memory format of the dense tensor `like` of the same shape; copied only if it differs."""
    return x.contiguous(memory_format=memory_format_of(like))


def adjacent(t: Tensor) -> Tensor:
    """`t` where the elements of its last dimension are adjacent in memory, otherwise a contiguous copy."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors may share an element. Channel slices of one NHWC buffer that do not meet are apart."""
    if a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr() or a.numel() == 0 or b.numel() == 0:
        return False
    (a_first, a_last), (b_first, b_last) = _extent(a), _extent(b)
    if a_last < b_first or b_last < a_first:
        return False
    if a.dim() != 4 or a.stride() != b.stride() or a.stride(1) != 1:
        return True
    pixel = a.stride(3)
    if pixel == 0 or a.stride(0) % pixel or a.stride(2) % pixel:
        return True
    apart = (b.storage_offset() - a.storage_offset()) % pixel  # channels from a's first to b's first
    return apart < a.shape[1] or apart + b.shape[1] > pixel


def _extent(t: Tensor) -> tuple[int, int]:
    """First and last element of the storage that `t` reaches."""
    first = t.storage_offset()
    return first, first + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
