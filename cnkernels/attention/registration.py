"""torch.ops.cnkernels.attention and its backward: schema, validation, fake kernels, autograd."""

import torch
from torch import Tensor

from cnkernels import dispatch, layout, plans, register
from cnkernels.attention import reference
from cnkernels.register import expect

_NAME = "attention"
_FORWARD, _BACKWARD = plans.Plans(), plans.Plans()


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


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    key = (plans.of(q), plans.of(k), plans.of(v), scale < 0, dispatch.current())
    plan = _FORWARD.get(key) or _FORWARD.add(key, _plan_forward(q, k, v, scale))
    return plan(q, k, v, scale)


def _plan_forward(q, k, v, scale):
    _validate(q, k, v)
    if q.numel() == 0 or q.is_meta:
        return _fake_forward
    if not _all_adjacent(q, k, v):  # kernels take any other stride
        return lambda q, k, v, scale: forward(*map(layout.adjacent, (q, k, v)), scale)
    kernels = dispatch.implementation(_NAME, q, k, head_dim=q.shape[3])
    return plans.of_backend(kernels, "attention_fwd", q, k, v, scale)


def _all_adjacent(*tensors: Tensor) -> bool:
    return all(layout.adjacent(t) is t for t in tensors)


def _fake_forward(q, k, v, scale):
    _validate(q, k, v)
    batch, length, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, length), dtype=register.wide_dtype(q.dtype))


def backward(dout, q, k, v, out, lse, scale: float, need: tuple[bool, bool, bool]):
    """(dq, dk, dv), None where not needed."""
    tensors = (dout, q, k, v, out, lse)
    of = plans.of
    key = (of(dout), of(q), of(k), of(v), plans.of_results(out, lse), scale < 0, need, dispatch.current())
    plan = _BACKWARD.get(key) or _BACKWARD.add(key, _plan_backward(*tensors, scale, need))
    return plan(*tensors, scale, need)


def _plan_backward(dout, q, k, v, out, lse, scale, need):
    if q.numel() == 0 or q.is_meta:
        return _zeros
    if not _all_adjacent(dout, q, k, v):
        return lambda dout, q, k, v, *rest: backward(*map(layout.adjacent, (dout, q, k, v)), *rest)
    kernels = dispatch.implementation(_NAME, q, k, head_dim=q.shape[3], direction="backward")
    return plans.of_backend(kernels, "attention_bwd", dout, q, k, v, out, lse, scale, need)


def _zeros(dout, q, k, v, out, lse, scale, need):
    return tuple(
        torch.zeros(t.shape, dtype=t.dtype, device=t.device) if wanted else None
        for t, wanted in zip((q, k, v), need, strict=True)
    )


def _packed_backward(dout, q, k, v, out, lse, scale, need):
    return register.keep_requested(backward(dout, q, k, v, out, lse, scale, tuple(need)), need)


def _differentiable_backward(*arguments):
    return register.keep_requested(reference.attention_bwd(*arguments), arguments[-1])


def _fake_backward(dout, q, k, v, out, lse, scale, need):
    return [t.new_empty(t.shape) for t in register.keep_requested((q, k, v), need)]


def _gradients(dout, q, k, v, out, lse, scale, need):
    tensors = (dout, q, k, v, out, lse)
    if plans.straight(dout) and not plans.recorded(*tensors):
        return backward(*tensors, scale, need)
    return register.restore_none(torch.ops.cnkernels.attention_backward(*tensors, scale, list(need)), need)


def _keep(ctx, inputs, output):
    q, k, v, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output)


def _setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    _keep(ctx, inputs, output)


def _autograd(ctx, dout, _=None):
    if dout is None:
        return None, None, None, None
    return *_gradients(dout, *ctx.saved_tensors, ctx.scale, tuple(ctx.needs_input_grad[:3])), None


Eager = register.eager_function("Attention", forward, _keep, _autograd)

register.op(
    _NAME,
    "(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor, Tensor)",
    forward,
    _fake_forward,
    setup_context=_setup_context,
    autograd=_autograd,
)
register.op(
    f"{_NAME}_backward",
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale, bool[] need) -> Tensor[]",
    _packed_backward,
    _fake_backward,
    **register.derivatives_of(_differentiable_backward),
)
