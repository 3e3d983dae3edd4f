"""torch.ops.cnkernels.group_norm_silu and its backward: schema, validation, fake kernels, autograd."""

import math

import torch
from torch import Tensor

from cnkernels import dispatch, layout, register
from cnkernels.errors import expect

_NAME = "group_norm_silu"


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


def _forward(x, groups, weight, bias, eps, activation, addend):
    _validate(x, groups, weight, bias, eps, activation, addend)
    x = layout.dense(x)
    if x.numel() == 0:
        return fake_forward(x, groups, weight, bias, eps, activation, addend)
    weight, bias, addend = register.contiguous(weight, bias, addend)
    return dispatch.implementation(_NAME, x).group_norm_silu_fwd(x, groups, weight, bias, eps, activation, addend)


def fake_forward(x, groups, weight, bias, eps, activation, addend):
    _validate(x, groups, weight, bias, eps, activation, addend)
    statistics = register.wide_dtype(x.dtype)
    mean = x.new_zeros((x.shape[0], groups), dtype=statistics)
    return torch.empty_like(layout.dense(x)), mean, torch.zeros_like(mean)


def _backward(dy, x, groups, weight, bias, mean, rstd, activation, addend, need):
    x = layout.dense(x)
    if x.numel() == 0:
        return [torch.zeros_like(t) for t in register.needed((x, weight, bias, addend), need)]
    weight, bias, addend = register.contiguous(weight, bias, addend)
    kernels = dispatch.implementation(_NAME, x)
    gradients = kernels.group_norm_silu_bwd(
        layout.match(dy, x), x, groups, weight, bias, mean, rstd, activation, addend, tuple(need)
    )
    return register.needed(gradients, need)


def _fake_backward(dy, x, groups, weight, bias, mean, rstd, activation, addend, need):
    contiguous = register.contiguous(weight, bias, addend)
    return [torch.empty_like(t) for t in register.needed((layout.dense(x), *contiguous), need)]


def _setup_context(ctx, inputs, output):
    x, ctx.groups, weight, bias, _, ctx.activation, addend = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, addend, mean, rstd)


def _autograd(ctx, dy, dmean, drstd):
    nothing = (None,) * 7
    if dy is None:
        return nothing
    x, weight, bias, addend, mean, rstd = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    need = [wanted[0], wanted[2], wanted[3], wanted[6]]
    gradients = torch.ops.cnkernels.group_norm_silu_backward(
        dy, x, ctx.groups, weight, bias, mean, rstd, ctx.activation, addend, need
    )
    dx, dweight, dbias, daddend = register.spread(gradients, need)
    return dx, None, dweight, dbias, None, None, daddend


register.op(
    _NAME,
    "(Tensor x, int groups, Tensor? weight, Tensor? bias, float eps, str? activation, Tensor? addend) "
    "-> (Tensor, Tensor, Tensor)",
    _forward,
    fake_forward,
    setup_context=_setup_context,
    autograd=_autograd,
)
register.op(
    f"{_NAME}_backward",
    "(Tensor dy, Tensor x, int groups, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, str? activation, "
    "Tensor? addend, bool[] need) -> Tensor[]",
    _backward,
    _fake_backward,
)
