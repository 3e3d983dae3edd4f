"""value * gelu(gate) of PyTorch's own operations, a slab of rows at a time, so that a slab stays in the cache."""

import math

import torch
from torch import Tensor

from cnkernels.geglu import reference

_SLAB = 1 << 17  # elements of the first tensor for each thread


def geglu_fwd(projected: Tensor) -> Tensor:
    out = torch.empty((*projected.shape[:-1], projected.shape[-1] // 2), dtype=projected.dtype, device=projected.device)
    for slab, rows in _slabs(projected, out):
        value, gate = slab.chunk(2, -1)
        if _overflows(gate):
            rows.copy_(reference.geglu_fwd(slab))
        else:
            torch.ops.aten.gelu.out(gate, out=rows)
            rows.mul_(value)
    return out


def geglu_bwd(dout: Tensor, projected: Tensor) -> Tensor:
    dprojected = torch.empty(projected.shape, dtype=projected.dtype, device=projected.device)
    for upstream, slab, rows in _slabs(dout, projected, dprojected):
        value, gate = slab.chunk(2, -1)
        dvalue, dgate = rows.chunk(2, -1)
        if _overflows(gate):
            rows.copy_(reference.geglu_bwd(upstream, slab))
        else:
            torch.ops.aten.gelu_backward.grad_input(upstream * value, gate, grad_input=dgate)
            torch.ops.aten.gelu.out(gate, out=dvalue)
            dvalue.mul_(upstream)
    return dprojected


def _overflows(gate: Tensor) -> bool:
    """Whether a gate is infinite: PyTorch's gelu makes NaN of it on a CPU, alone of all devices."""
    return gate.device.type == "cpu" and not torch.isfinite(torch.linalg.vector_norm(gate, math.inf)).item()


def _slabs(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """The same rows of all tensors, slab for slab; on a CPU, if all can be seen as rows without a copy."""
    first = tensors[0]
    rows = max(1, _SLAB * torch.get_num_threads() // first.shape[-1])
    if first.device.type != "cpu" or first.dim() < 2 or first.numel() <= rows * first.shape[-1]:
        return [tensors]
    if not all(_is_rows(t) for t in tensors):
        return [tensors]
    return list(zip(*(t.flatten(0, -2).split(rows) for t in tensors), strict=True))


def _is_rows(t: Tensor) -> bool:
    """Whether flattening the leading dimensions is a view."""
    sizes = [(size, stride) for size, stride in zip(t.shape[:-1], t.stride()[:-1], strict=True) if size != 1]
    return all(outer == size * inner for (_, outer), (size, inner) in zip(sizes, sizes[1:], strict=False))
