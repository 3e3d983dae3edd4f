"""value * gelu(gate) of PyTorch's own operations, a slab of rows at a time, so that a slab stays in the cache."""

import torch
from torch import Tensor

from cnkernels.geglu import reference

_SLAB = 1 << 20  # elements of the first tensor, for each thread


def geglu_fwd(projected: Tensor) -> Tensor:
    out = torch.empty((*projected.shape[:-1], projected.shape[-1] // 2), dtype=projected.dtype, device=projected.device)
    for slab, rows in _slabs(projected, out):
        value, gate = slab.chunk(2, -1)
        _gelu_(gate, rows).mul_(value)
        if _suspect(rows):
            rows.copy_(reference.geglu_fwd(slab))
    return out


def geglu_bwd(dout: Tensor, projected: Tensor) -> Tensor:
    dprojected = torch.empty(projected.shape, dtype=projected.dtype, device=projected.device)
    for upstream, slab, rows in _slabs(dout, projected, dprojected):
        value, gate = slab.chunk(2, -1)
        dvalue, dgate = rows.chunk(2, -1)
        torch.mul(torch.ops.aten.gelu(gate), upstream, out=dvalue)
        torch.ops.aten.gelu_backward.grad_input(upstream * value, gate, grad_input=dgate)
        if _suspect(rows):
            rows.copy_(reference.geglu_bwd(upstream, slab))
    return dprojected


def _gelu_(gate: Tensor, out: Tensor) -> Tensor:
    # On a CPU a dense gate gets oneDNN's gelu: twice as fast in bfloat16, too coarse for float32.
    return (
        torch.ops.aten.gelu_(out.copy_(gate))
        if gate.dtype == torch.bfloat16
        else torch.ops.aten.gelu.out(gate, out=out)
    )


def _suspect(result: Tensor) -> bool:
    """Whether there may be a NaN that should be none: on a CPU, PyTorch's gelu makes one of an infinite gate."""
    return result.device.type == "cpu" and not result.sum().isfinite().item()


def _slabs(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """The same rows of all tensors, slab for slab; on a CPU, if all can be seen as rows without a copy."""
    first = tensors[0]
    rows = max(1, _SLAB * torch.get_num_threads() // first.shape[-1])
    if first.device.type != "cpu" or first.numel() <= rows * first.shape[-1] or not all(map(_is_rows, tensors)):
        return [tensors]
    return list(zip(*(t.flatten(0, -2).split(rows) for t in tensors), strict=True))


def _is_rows(t: Tensor) -> bool:
    """Whether flattening the leading dimensions is a view."""
    sizes = [(size, stride) for size, stride in zip(t.shape[:-1], t.stride()[:-1], strict=True) if size != 1]
    return t.dim() > 1 and all(
        outer == size * inner for (_, outer), (size, inner) in zip(sizes, sizes[1:], strict=False)
    )
