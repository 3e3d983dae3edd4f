"""torch.ops.cnkernels.attention and its backward: schema, validation, fake kernels, autograd."""

import torch
from torch import Tensor

from cnkernels import dispatch, layout, register
from cnkernels.errors import expect

_NAME = "attention"


def _validate(q: Tensor, k: Tensor, v: Tensor) -> None:
    register.expect_floating(_NAME, "q", q)
    expect(q.dim() == 4, _NAME, "q", "[B, Sq, H, D]", f"shape {list(q.shape)}")
    expect(q.shape[3] > 0, _NAME, "q", "[B, Sq, H, D] with D >= 1", f"shape {list(q.shape)}")
    batch, _, heads, head_dim = q.shape
    for argument, tensor in (("k", k), ("v", v)):
        expect(tensor.dtype == q.dtype, _NAME, argument, f"of q's dtype {q.dtype}", tensor.dtype)
        expect(tensor.device == q.device, _NAME, argument, f"on q's device {q.device}", tensor.device)
        fits = (
            tensor.dim() == 4
            and (tensor.shape[0], *tensor.shape[2:]) == (batch, heads, head_dim)
            and tensor.shape[1] >= 1
        )
        expect(fits, _NAME, argument, f"[{batch}, Sk, {heads}, {head_dim}] with Sk >= 1", f"shape {list(tensor.shape)}")
    expect(v.shape[1] == k.shape[1], _NAME, "v", f"of k's length {k.shape[1]}", v.shape[1])


def _forward(q, k, v, scale):
    _validate(q, k, v)
    if q.numel() == 0:
        return _fake_forward(q, k, v, scale)
    q, k, v = map(layout.adjacent, (q, k, v))  # kernels take any other stride
    return dispatch.implementation(_NAME, q, head_dim=q.shape[3]).attention_fwd(q, k, v, scale)


def _fake_forward(q, k, v, scale):
    _validate(q, k, v)
    batch, length, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, length), dtype=register.wide_dtype(q.dtype))


def _backward(dout, q, k, v, out, lse, scale, need):
    if q.numel() == 0:
        return [torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in register.needed((q, k, v), need)]
    dout, q, k, v = map(layout.adjacent, (dout, q, k, v))
    kernels = dispatch.implementation(_NAME, q, head_dim=q.shape[3])
    return register.needed(kernels.attention_bwd(dout, q, k, v, out, lse, scale, tuple(need)), need)


def _fake_backward(dout, q, k, v, out, lse, scale, need):
    return [t.new_empty(t.shape) for t in register.needed((q, k, v), need)]


def _setup_context(ctx, inputs, output):
    q, k, v, ctx.scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, out, lse)


def _autograd(ctx, dout, dlse):
    if dout is None:
        return None, None, None, None
    need = list(ctx.needs_input_grad[:3])
    gradients = torch.ops.cnkernels.attention_backward(dout, *ctx.saved_tensors, ctx.scale, need)
    return *register.spread(gradients, need), None


register.op(
    _NAME,
    "(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
    setup_context=_setup_context,
    autograd=_autograd,
)
register.op(
    f"{_NAME}_backward",
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale, bool[] need) -> Tensor[]",
    _backward,
    _fake_backward,
)
