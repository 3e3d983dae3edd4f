"""torch.ops.cnkernels.geglu and its backward: schema, validation, fake kernels, autograd."""

import torch
from torch import Tensor

from cnkernels import dispatch, layout, plans, register
from cnkernels.geglu import reference
from cnkernels.register import expect

_NAME = "geglu"
_FORWARD, _BACKWARD = plans.Plans(), plans.Plans()


def _validate(projected: Tensor) -> None:
    register.expect_floating(_NAME, "projected", projected)
    fits = projected.dim() >= 1 and projected.shape[-1] % 2 == 0
    expect(fits, _NAME, "projected", "[..., 2C], its last dimension even", f"shape {list(projected.shape)}")


def forward(projected: Tensor) -> Tensor:
    key = (plans.of(projected), dispatch.current())
    plan = _FORWARD.get(key) or _FORWARD.add(key, _plan_forward(projected))
    return plan(projected)


def _plan_forward(projected):
    _validate(projected)
    if projected.numel() == 0 or projected.is_meta:
        return fake_forward
    rows = layout.adjacent(projected)
    if rows is not projected:
        return lambda projected: forward(layout.adjacent(projected))
    return plans.of_backend(dispatch.implementation(_NAME, projected), "geglu_fwd", projected)


def fake_forward(projected):
    _validate(projected)
    return projected.new_empty((*projected.shape[:-1], projected.shape[-1] // 2))


def backward(dout: Tensor, projected: Tensor) -> Tensor:
    key = (plans.of(dout), plans.of(projected), dispatch.current())
    plan = _BACKWARD.get(key) or _BACKWARD.add(key, _plan_backward(dout, projected))
    return plan(dout, projected)


def _plan_backward(dout, projected):
    if projected.numel() == 0 or projected.is_meta:
        return _fake_backward
    given = (dout, projected)
    adjacent = tuple(map(layout.adjacent, given))
    if any(a is not b for a, b in zip(adjacent, given, strict=True)):
        return lambda *given: backward(*map(layout.adjacent, given))
    return plans.of_backend(
        dispatch.implementation(_NAME, projected, direction="backward"), "geglu_bwd", dout, projected
    )


def _fake_backward(dout, projected):
    return projected.new_empty(projected.shape)


def call(projected: Tensor) -> Tensor:
    """The op without gradients."""
    return forward(projected) if plans.straight(projected) else torch.ops.cnkernels.geglu(projected)


def gradient(dout: Tensor, projected: Tensor) -> Tensor:
    if plans.straight(dout) and not plans.recorded(dout, projected):
        return backward(dout, projected)
    return torch.ops.cnkernels.geglu_backward(dout, projected)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    _keep(ctx, inputs, output)


def _autograd(ctx, dout):
    if dout is None:
        return None
    return gradient(dout, *ctx.saved_tensors)


Eager = register.eager_function("GEGLU", forward, _keep, _autograd)

register.op(
    _NAME, "(Tensor projected) -> Tensor", forward, fake_forward, setup_context=_setup_context, autograd=_autograd
)
register.op(
    f"{_NAME}_backward",
    "(Tensor dout, Tensor projected) -> Tensor",
    backward,
    _fake_backward,
    **register.derivatives_of(reference.geglu_bwd),
)
