"""torch.ops.cnkernels.group_norm_silu and its backward: schema, validation, fake kernels, autograd."""

import math

import torch
from torch import Tensor

from cnkernels import dispatch, layout, plans, register
from cnkernels.group_norm_silu import reference
from cnkernels.register import expect

_NAME = "group_norm_silu"
_FORWARD, _BACKWARD = plans.Plans(), plans.Plans()


def _validate(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, activation, addend: Tensor | None
) -> None:
    register.expect_floating(_NAME, "x", x)
    expect(x.dim() >= 3, _NAME, "x", "[N, C, *spatial] with at least 3 dimensions", f"shape {list(x.shape)}")
    channels = x.shape[1]
    divides = groups > 0 and channels % groups == 0
    expect(divides, _NAME, "groups", f"a divisor of the {channels} channels of `x`", groups)
    expect(eps >= 0 and math.isfinite(eps), _NAME, "eps", "finite and not negative", eps)
    expect(activation in ("silu", None), _NAME, "activation", '"silu" or None', repr(activation))
    register.expect_parameter(_NAME, "weight", weight, (channels,), x)
    register.expect_parameter(_NAME, "bias", bias, (channels,), x)
    register.expect_parameter(_NAME, "addend", addend, (x.shape[0], channels), x)


def forward(x, groups, weight, bias, eps, activation, addend) -> tuple[Tensor, Tensor, Tensor]:
    tensors = plans.of(x), plans.of(weight), plans.of(bias), plans.of(addend)
    key = (tensors, groups, eps, activation, dispatch.current())
    plan = _FORWARD.get(key) or _FORWARD.add(key, _plan_forward(x, groups, weight, bias, eps, activation, addend))
    return plan(x, groups, weight, bias, eps, activation, addend)


def _plan_forward(x, groups, weight, bias, eps, activation, addend):
    _validate(x, groups, weight, bias, eps, activation, addend)
    if x.numel() == 0 or x.is_meta:
        return fake_forward
    if not _readable(x, weight, bias, addend):
        return _forward_of_copies
    kernels = dispatch.implementation(_NAME, x)
    return plans.of_backend(kernels, "group_norm_silu_fwd", x, groups, weight, bias, eps, activation, addend)


def _readable(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether kernels read all of them as they are."""
    return layout.dense(x) is x and all(t is None or t.is_contiguous() for t in parameters)


def _forward_of_copies(x, groups, weight, bias, eps, activation, addend):
    weight, bias, addend = register.contiguous(weight, bias, addend)
    return forward(layout.dense(x), groups, weight, bias, eps, activation, addend)


def fake_forward(x, groups, weight, bias, eps, activation, addend):
    _validate(x, groups, weight, bias, eps, activation, addend)
    statistics = register.wide_dtype(x.dtype)
    mean = x.new_zeros((x.shape[0], groups), dtype=statistics)
    return torch.empty_like(layout.dense(x)), mean, torch.zeros_like(mean)


def backward(dy, x, groups, weight, bias, mean, rstd, activation, addend, need: tuple[bool, bool, bool, bool]):
    """(dx, dweight, dbias, daddend), None where not needed."""
    arguments = (dy, x, groups, weight, bias, mean, rstd, activation, addend, need)
    tensors = plans.of(dy), plans.of(x), plans.of(weight), plans.of(bias), plans.of(addend)
    key = (tensors, plans.of_results(mean, rstd), groups, activation, need, dispatch.current())
    plan = _BACKWARD.get(key) or _BACKWARD.add(key, _plan_backward(*arguments))
    return plan(*arguments)


def _plan_backward(dy, x, groups, weight, bias, mean, rstd, activation, addend, need):
    if x.numel() == 0 or x.is_meta:
        return _zeros
    if not _readable(x, weight, bias, addend) or layout.match(dy, x) is not dy:
        return _backward_of_copies
    return plans.of_backend(
        dispatch.implementation(_NAME, x, direction="backward"),
        "group_norm_silu_bwd",
        *(dy, x, groups, weight, bias, mean, rstd, activation, addend, need),
    )


def _zeros(dy, x, groups, weight, bias, mean, rstd, activation, addend, need):
    given = (layout.dense(x), *register.contiguous(weight, bias, addend))
    return tuple(torch.zeros_like(t) if wanted else None for t, wanted in zip(given, need, strict=True))


def _backward_of_copies(dy, x, groups, weight, bias, mean, rstd, activation, addend, need):
    x = layout.dense(x)
    weight, bias, addend = register.contiguous(weight, bias, addend)
    return backward(layout.match(dy, x), x, groups, weight, bias, mean, rstd, activation, addend, need)


def _packed_backward(dy, x, groups, weight, bias, mean, rstd, activation, addend, need):
    gradients = backward(dy, x, groups, weight, bias, mean, rstd, activation, addend, tuple(need))
    return register.keep_requested(gradients, need)


def _differentiable_backward(dy, x, groups, weight, bias, mean, rstd, activation, addend, need):
    mean, rstd = reference.statistics_as_functions(x, groups, addend, rstd)
    gradients = reference.group_norm_silu_bwd(dy, x, groups, weight, bias, mean, rstd, activation, addend, need)
    return register.keep_requested(gradients, need)


def _fake_backward(dy, x, groups, weight, bias, mean, rstd, activation, addend, need):
    contiguous = register.contiguous(weight, bias, addend)
    return [torch.empty_like(t) for t in register.keep_requested((layout.dense(x), *contiguous), need)]


def call(x, groups, weight, bias, eps, activation, addend) -> tuple[Tensor, Tensor, Tensor]:
    """The op without gradients: y, mean and rstd."""
    if plans.straight(x, weight, bias, addend):
        return forward(x, groups, weight, bias, eps, activation, addend)
    return torch.ops.cnkernels.group_norm_silu(x, groups, weight, bias, eps, activation, addend)


def gradients(dy, x, groups, weight, bias, mean, rstd, activation, addend, need: tuple[bool, bool, bool, bool]):
    """(dx, dweight, dbias, daddend), None where not needed."""
    tensors = (dy, x, weight, bias, mean, rstd, addend)
    if plans.straight(dy) and not plans.recorded(*tensors):
        return backward(dy, x, groups, weight, bias, mean, rstd, activation, addend, need)
    packed = torch.ops.cnkernels.group_norm_silu_backward(
        dy, x, groups, weight, bias, mean, rstd, activation, addend, list(need)
    )
    return register.restore_none(packed, need)


def _keep(ctx, inputs, output):
    x, ctx.groups, weight, bias, _, ctx.activation, addend = inputs
    ctx.save_for_backward(x, weight, bias, addend, *output[1:])


def _setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    _keep(ctx, inputs, output)


def _autograd(ctx, dy, *_):
    if dy is None:
        return (None,) * 7
    x, weight, bias, addend, mean, rstd = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    need = (wanted[0], wanted[2], wanted[3], wanted[6])
    dx, dweight, dbias, daddend = gradients(dy, x, ctx.groups, weight, bias, mean, rstd, ctx.activation, addend, need)
    return dx, None, dweight, dbias, None, None, daddend


Eager = register.eager_function("GroupNormSiLU", forward, _keep, _autograd)

register.op(
    _NAME,
    "(Tensor x, int groups, Tensor? weight, Tensor? bias, float eps, str? activation, Tensor? addend) "
    "-> (Tensor, Tensor, Tensor)",
    forward,
    fake_forward,
    setup_context=_setup_context,
    autograd=_autograd,
)
register.op(
    f"{_NAME}_backward",
    "(Tensor dy, Tensor x, int groups, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, str? activation, "
    "Tensor? addend, bool[] need) -> Tensor[]",
    _packed_backward,
    _fake_backward,
    **register.derivatives_of(_differentiable_backward),
)
