"""torch.ops.cnkernels.zero_conv_add, its out variant and its backward: schema, validation, fake kernels, autograd.

The scale comes as an optional tensor and a float: kernels get the tensor (float32, [] or [N]) or else the float.
"""

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from cnkernels import dispatch, layout, plans, register
from cnkernels.register import expect
from cnkernels.zero_conv_add import reference

_NAME = "zero_conv_add"
_FORWARD, _FORWARD_OUT, _BACKWARD = plans.Plans(), plans.Plans(), plans.Plans()


def validate(
    name: str, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, scale: Tensor | None
) -> None:
    """Of one layer, all but where it writes; `name` begins the message of an error."""
    register.expect_floating(name, "x", x)
    expect(x.dim() == 4, name, "x", "[N, Cin, H, W]", f"shape {list(x.shape)}")
    fits = weight.dim() == 4 and weight.shape[1:] == (x.shape[1], 1, 1)
    expect(fits, name, "weight", f"[Cout, {x.shape[1]}, 1, 1]", f"shape {list(weight.shape)}")
    channels = weight.shape[0]
    expect_like(name, x, "weight", weight, weight.shape)
    if bias is not None:
        expect_like(name, x, "bias", bias, (channels,))
    if residual is not None:
        expect_like(name, x, "residual", residual, out_shape(x, weight))
    if scale is not None:
        n = x.shape[0]
        fits = scale.dim() == 0 or scale.shape == (n,) or scale.shape == (n, 1, 1, 1)
        expect(fits, name, "scale", f"a float or of shape [], [{n}] or [{n}, 1, 1, 1]", f"shape {list(scale.shape)}")
        expect(scale.is_floating_point(), name, "scale", "a floating point tensor", scale.dtype)
        expect(scale.device == x.device, name, "scale", f"on the device of `x`, {x.device}", scale.device)


def expect_like(name: str, x: Tensor, argument: str, tensor: Tensor, shape) -> None:
    expect(
        tuple(tensor.shape) == tuple(shape), name, argument, f"of shape {list(shape)}", f"shape {list(tensor.shape)}"
    )
    expect(tensor.dtype == x.dtype, name, argument, f"of the dtype of `x`, {x.dtype}", tensor.dtype)
    expect(tensor.device == x.device, name, argument, f"on the device of `x`, {x.device}", tensor.device)


def validate_out(name: str, out: Tensor, x: Tensor, weight: Tensor) -> None:
    """That a layer can write to `out`."""
    expect_like(name, x, "out", out, out_shape(x, weight))
    even = out.shape[2] == 1 or out.stride(2) == out.shape[3] * out.stride(3)
    fits = even and 0 not in out.stride()
    expect(fits, name, "out", "without overlap and with evenly strided pixels", f"strides {out.stride()}")


def expect_no_gradient(name: str, argument: str, *tensors: Tensor | None) -> None:
    """`out=` cannot be differentiated through, as in PyTorch."""
    tracked = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    expect(not tracked, name, argument, "None where a gradient is recorded", "a tensor")


def out_shape(x: Tensor, weight: Tensor) -> tuple[int, ...]:
    return (x.shape[0], weight.shape[0], *x.shape[2:])


def new_out(x: Tensor, weight: Tensor) -> Tensor:
    """An empty output in x's memory format."""
    fmt = layout.memory_format_of(layout.dense(x))
    return torch.empty(out_shape(x, weight), dtype=x.dtype, device=x.device, memory_format=fmt)


def _kernel_scale(scale: Tensor | None, factor: float, dtype: torch.dtype) -> Tensor | float:
    """What the kernels get: a tensor of an accumulator's dtype, [] or [N], or else the float."""
    if scale is None:
        return factor
    scale = scale.to(register.wide_dtype(dtype))
    return scale if scale.dim() == 0 else scale.reshape(-1)


def call_of(x, weight, bias, residual, scale, factor, out):
    """The arguments of the kernels' zero_conv_add_fwd."""
    x = layout.dense(x)
    residual = residual if residual is None else layout.match(residual, x)
    return (x, *register.contiguous(weight, bias), residual, _kernel_scale(scale, factor, x.dtype), out)


def forward(x, weight, bias, residual, scale, factor: float) -> Tensor:
    key = (plans.of(x), plans.of(weight), plans.of(bias), plans.of(residual), plans.of(scale), dispatch.current())
    arguments = (x, weight, bias, residual, scale, factor)
    plan = _FORWARD.get(key) or _FORWARD.add(key, _plan_forward(*arguments))
    return plan(*arguments)


def _plan_forward(x, weight, bias, residual, scale, factor) -> Callable[..., Tensor]:
    validate(_NAME, x, weight, bias, residual, scale)
    if x.is_meta:
        return fake_forward
    new, like = plan_out(x, weight)
    into = plan_into(x, weight, bias, residual, scale, factor, like)

    def run(x, weight, bias, residual, scale, factor):
        out = new(x)
        into(x, weight, bias, residual, scale, factor, out)
        return out

    return run


def plan_out(x: Tensor, weight: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """What allocates the output of a call like this one, and such an output."""
    like = new_out(x, weight)
    if like.shape == x.shape and like.stride() == x.stride():
        return torch.empty_like, like  # the cheapest way
    new = layout.allocator(like.shape, like.dtype, like.device, layout.memory_format_of(layout.dense(x)))
    return lambda x: new(), like


def plan_into(x, weight, bias, residual, scale, factor, out, kernels: ModuleType | None = None) -> Callable[..., None]:
    """What writes the output of such a call, validated, into `out`, with these kernels or those that dispatch says."""
    given = (x, weight, bias, residual, scale, factor, out)
    if out.numel() == 0:
        return lambda *given: None
    call = call_of(*given)
    kernels = dispatch.implementation(_NAME, call[0]) if kernels is None else kernels
    run = plans.of_backend(kernels, "zero_conv_add_fwd", *call)
    as_it_is = (x, weight, bias, residual, factor if scale is None else scale, out)
    if any(a is not b for a, b in zip(call, as_it_is, strict=True)):
        return lambda *given: run(*call_of(*given))
    if scale is None:
        return lambda x, weight, bias, residual, scale, factor, out: run(x, weight, bias, residual, factor, out)
    return lambda x, weight, bias, residual, scale, factor, out: run(x, weight, bias, residual, scale, out)


def forward_out(x, weight, bias, residual, scale, factor: float, out: Tensor) -> None:
    given = (x, weight, bias, residual, scale)
    key = (tuple(map(plans.of, given)), plans.of(out), dispatch.current())
    plan = _FORWARD_OUT.get(key) or _FORWARD_OUT.add(key, _plan_forward_out(*given, factor, out))
    for argument, tensor in zip(("x", "weight", "bias", "residual", "scale"), given, strict=True):
        overlap = tensor is not None and layout.overlap(out, tensor)
        expect(not overlap, _NAME, "out", f"apart from `{argument}` in memory", "a tensor that overlaps it")
    plan(*given, factor, out)


def _plan_forward_out(x, weight, bias, residual, scale, factor, out):
    validate(_NAME, x, weight, bias, residual, scale)
    validate_out(_NAME, out, x, weight)
    return plan_into(x, weight, bias, residual, scale, factor, out)


def fake_forward(x, weight, bias, residual, scale, factor):
    validate(_NAME, x, weight, bias, residual, scale)
    return new_out(x, weight)


def _fake_forward_out(x, weight, bias, residual, scale, factor, out):
    validate(_NAME, x, weight, bias, residual, scale)
    expect_like(_NAME, x, "out", out, out_shape(x, weight))


def _input(x: Tensor | None, dout: Tensor, weight: Tensor, channels_last: bool) -> Tensor:
    """x, dense. If it was not saved, no more of it is read than shape, dtype and memory format: an empty tensor."""
    if x is not None:
        return layout.dense(x)
    shape = (dout.shape[0], weight.shape[1], *dout.shape[2:])
    fmt = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=weight.dtype, device=dout.device, memory_format=fmt)


def backward_call_of(dout, x, weight, bias, scale, factor, channels_last, need):
    """The arguments of the kernels' zero_conv_add_bwd."""
    x = _input(x, dout, weight, channels_last)  # dout comes in any strides
    return (dout, x, *register.contiguous(weight, bias), _kernel_scale(scale, factor, x.dtype), tuple(need))


def is_empty(call) -> bool:
    """Whether such a call has no output or no input: its gradients are zero, and no kernel runs."""
    return call[0].numel() == 0 or call[1].numel() == 0


def zero_gradients(call, scale, need) -> tuple[Tensor | None, ...]:
    """Of a call that is empty."""
    _, x, weight, bias, *_ = call
    given = (x, weight, bias, scale)
    return tuple(torch.zeros_like(t) if wanted else None for t, wanted in zip(given, need, strict=True))


def as_parameters(gradients, weight, scale, need) -> tuple[Tensor | None, ...]:
    """The kernels' (dx, dweight, dbias, dscale), in the strides of the weight and the shape of the scale."""
    dx, dweight, dbias, dscale = gradients
    if need[1] and dweight.stride() != weight.stride():
        # The strides of a 1x1 kernel are ambiguous; DDP copies a gradient whose strides are not the weight's.
        dweight = dweight.as_strided(weight.shape, weight.stride())
    if need[3]:
        dscale = dscale.reshape(scale.shape).to(scale.dtype)
    return dx, dweight, dbias, dscale


def backward(dout, x, weight, bias, scale, factor: float, channels_last: bool, need: tuple[bool, bool, bool, bool]):
    """(dx, dweight, dbias, dscale), None where not needed."""
    tensors = (dout, x, weight, bias, scale)
    key = (tuple(map(plans.of, tensors)), channels_last, need, dispatch.current())
    plan = _BACKWARD.get(key) or _BACKWARD.add(key, plan_backward(*tensors, factor, channels_last, need))
    return plan(*tensors, factor, channels_last, need)


def plan_backward(dout, x, weight, bias, scale, factor, channels_last, need, kernels: ModuleType | None = None):
    """What computes the gradients of such a call, with these kernels or those that dispatch says."""
    call = backward_call_of(dout, x, weight, bias, scale, factor, channels_last, need)
    if is_empty(call) or weight.is_meta:
        return lambda *given: zero_gradients(backward_call_of(*given), given[4], need)
    kernels = dispatch.implementation(_NAME, call[1], direction="backward") if kernels is None else kernels
    run = plans.of_backend(kernels, "zero_conv_add_bwd", *call)

    def of_any(dout, x, weight, bias, scale, factor, channels_last, need):
        call = backward_call_of(dout, x, weight, bias, scale, factor, channels_last, need)
        return as_parameters(run(*call), call[2], scale, need)

    def of_ready(dout, x, weight, bias, scale, factor, channels_last, need):
        return as_parameters(run(dout, x, weight, bias, factor, need), weight, scale, need)

    ready = x is not None and scale is None and all(a is b for a, b in zip(call[1:4], (x, weight, bias), strict=True))
    return of_ready if ready else of_any


def _packed_backward(dout, x, weight, bias, scale, factor, channels_last, need):
    return register.keep_requested(backward(dout, x, weight, bias, scale, factor, channels_last, tuple(need)), need)


def differentiable_backward(dout, x, weight, bias, scale, factor, channels_last, need):
    call = backward_call_of(dout, x, weight, bias, scale, factor, channels_last, need)
    return register.keep_requested(as_parameters(reference.zero_conv_add_bwd(*call), call[2], scale, need), need)


def fake_backward(dout, x, weight, bias, scale, factor, channels_last, need):
    x = _input(x, dout, weight, channels_last)
    return [torch.empty_like(t) for t in register.keep_requested((x, *register.contiguous(weight, bias, scale)), need)]


def gradients(dout, x, weight, bias, scale, factor: float, channels_last: bool, need: tuple[bool, bool, bool, bool]):
    """(dx, dweight, dbias, dscale), None where not needed."""
    tensors = (dout, x, weight, bias, scale)
    if plans.straight(dout) and not plans.recorded(*tensors):
        return backward(*tensors, factor, channels_last, need)
    packed = torch.ops.cnkernels.zero_conv_add_backward(*tensors, factor, channels_last, list(need))
    return register.restore_none(packed, need)


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    _keep(ctx, inputs, output)


def _keep(ctx, inputs, output):
    x, weight, bias, _, scale, ctx.factor = inputs
    wanted = ctx.needs_input_grad
    ctx.channels_last = layout.is_channels_last(x)
    ctx.save_for_backward(x if wanted[1] or wanted[4] else None, weight, bias, scale)


def _autograd(ctx, dout):
    if dout is None:
        return (None,) * 6
    wanted = ctx.needs_input_grad
    need = (wanted[0], wanted[1], wanted[2], wanted[4])
    dx = dweight = dbias = dscale = None
    if any(need):
        dx, dweight, dbias, dscale = gradients(dout, *ctx.saved_tensors, ctx.factor, ctx.channels_last, need)
    return dx, dweight, dbias, dout if wanted[3] else None, dscale, None


Eager = register.eager_function("ZeroConvAdd", forward, _keep, _autograd)

_ARGUMENTS = "Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? scale, float factor"

register.op(_NAME, f"({_ARGUMENTS}) -> Tensor", forward, fake_forward, setup_context=_setup_context, autograd=_autograd)
register.op(
    f"{_NAME}_out", f"({_ARGUMENTS}, Tensor(a!) out) -> ()", forward_out, _fake_forward_out, differentiable=False
)
register.op(
    f"{_NAME}_backward",
    "(Tensor dout, Tensor? x, Tensor weight, Tensor? bias, Tensor? scale, float factor, bool channels_last, "
    "bool[] need) -> Tensor[]",
    _packed_backward,
    fake_backward,
    **register.derivatives_of(differentiable_backward),
)
