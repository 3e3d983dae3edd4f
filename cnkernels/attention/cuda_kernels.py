"""attention on csrc/attention*.cu: float16 and bfloat16, head dimensions 40, 64, 80, 128 and 160."""

from types import ModuleType

import torch
from torch import Tensor

from cnkernels import extension

HEAD_DIMS = (40, 64, 80, 128, 160)


def attention_fwd(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    batch, length, heads, _ = q.shape
    lse = torch.empty((batch, heads, length), dtype=torch.float32, device=q.device)
    library, place = extension.prepare(q, k, v, out, lse)
    library.attention_fwd(place, _describe(library, q, k, v, out, lse, scale))
    return out, lse


def attention_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, need: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    gradients = tuple(
        torch.empty(t.shape, dtype=t.dtype, device=t.device) if wanted else None
        for t, wanted in zip((q, k, v), need, strict=True)
    )
    delta = torch.empty_like(lse) if need[0] or need[1] else lse
    library, place = extension.prepare(q, k, v, out, lse, dout, delta, *gradients)
    call = _describe(library, q, k, v, out, lse, scale)
    call.dout, call.delta = _heads(library, dout), delta.data_ptr()
    call.dq, call.dk, call.dv = (_heads(library, t) for t in gradients)
    library.attention_bwd(place, call)
    return gradients


def _describe(library: ModuleType, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float) -> object:
    batch, length, heads, head_dim = q.shape
    return library.Attention(
        dtype=extension.dtype_of(library, q),
        batch=batch,
        heads=heads,
        q_length=length,
        k_length=k.shape[1],
        head_dim=head_dim,
        scale=scale,
        q=_heads(library, q),
        k=_heads(library, k),
        v=_heads(library, v),
        out=_heads(library, out),
        lse=lse.data_ptr(),
    )


def _heads(library: ModuleType, tensor: Tensor | None) -> object:
    """Address and strides of a tensor [B, S, H, D]."""
    if tensor is None:
        return library.HeadTensor()
    batch, row, head, _ = tensor.stride()
    return library.HeadTensor(address=tensor.data_ptr(), batch=batch, row=row, head=head)
