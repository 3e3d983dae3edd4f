"""attention on csrc/attention*.cu: float16 and bfloat16, head dimensions 40, 64, 80, 128 and 160."""

from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from cnkernels import extension, layout

HEAD_DIMS = (40, 64, 80, 128, 160)


def attention_fwd(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return attention_fwd_plan(q, k, v, scale)(q, k, v, scale)


def attention_fwd_plan(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Callable[..., tuple[Tensor, Tensor]]:
    """A function that computes attention_fwd for tensors like these, whatever the scale."""
    device, (batch, length, heads, _) = q.device, q.shape
    library, stream_of, index = extension.module_for(device), extension.stream_of(device), device.index or 0
    new_out = layout.allocator(q.shape, q.dtype, device)
    new_lse = layout.allocator((batch, heads, length), torch.float32, device)
    call, launch = _describe(library, q, k, v), library.attention_fwd

    def run(q, k, v, scale):
        out, lse = new_out(), new_lse()
        stream = stream_of(q, k, v, out, lse)
        addresses = q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), lse.data_ptr()
        launch(call, index, stream, *addresses, scale)
        return out, lse

    return run


def attention_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, need: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return attention_bwd_plan(dout, q, k, v, out, lse, scale, need)(dout, q, k, v, out, lse, scale, need)


def attention_bwd_plan(dout, q, k, v, out, lse, scale, need) -> Callable:
    """A function that computes attention_bwd for tensors like these, whatever the scale."""
    device = q.device
    library, stream_of, index = extension.module_for(device), extension.stream_of(device), device.index or 0
    need_q, need_k, need_v = need
    new_query, new_key = (layout.allocator(t.shape, q.dtype, device) for t in (q, k))
    call, launch, address = _describe(library, q, k, v), library.attention_bwd, extension.address
    call.dout = _heads(library, dout.stride())
    call.dq = _heads(library, _dense_strides(q.shape))
    call.dk = call.dv = _heads(library, _dense_strides(k.shape))

    def run(dout, q, k, v, out, lse, scale, need):
        dq = new_query() if need_q else None
        dk = new_key() if need_k else None
        dv = new_key() if need_v else None
        delta = torch.empty_like(lse) if need_q or need_k else lse
        stream = stream_of(q, k, v, out, lse, dout, delta, dq, dk, dv)
        launch(
            call, index, stream, dout.data_ptr(), q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(),
            lse.data_ptr(), delta.data_ptr(), address(dq), address(dk), address(dv), scale,
        )  # fmt: skip
        return dq, dk, dv

    return run


def _describe(library: ModuleType, q: Tensor, k: Tensor, v: Tensor) -> object:
    """The struct of csrc/launchers.h; the output is contiguous."""
    batch, length, heads, head_dim = q.shape
    return library.Attention(
        dtype=extension.dtype_of(library, q),
        batch=batch,
        heads=heads,
        q_length=length,
        k_length=k.shape[1],
        head_dim=head_dim,
        q=_heads(library, q.stride()),
        k=_heads(library, k.stride()),
        v=_heads(library, v.stride()),
        out=_heads(library, _dense_strides(q.shape)),
    )


def _dense_strides(shape: Sequence[int]) -> tuple[int, int, int, int]:
    _, length, heads, head_dim = shape
    return length * heads * head_dim, heads * head_dim, head_dim, 1


def _heads(library: ModuleType, strides: Sequence[int]) -> object:
    """Strides of a tensor [B, S, H, D]."""
    batch, row, head, _ = strides
    return library.HeadTensor(batch=batch, row=row, head=head)
