"""torch.ops.cnkernels.zero_conv_add, its out variant and its backward: schema, validation, fake kernels, autograd.

The scale comes as an optional tensor and a float: kernels get the tensor (float32, [] or [N]) or else the float.
"""

import torch
from torch import Tensor

from cnkernels import dispatch, layout, register
from cnkernels.errors import expect

_NAME = "zero_conv_add"


def _validate(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, scale: Tensor | None) -> None:
    register.expect_floating(_NAME, "x", x)
    expect(x.dim() == 4, _NAME, "x", "[N, Cin, H, W]", f"shape {list(x.shape)}")
    fits = weight.dim() == 4 and weight.shape[1:] == (x.shape[1], 1, 1)
    expect(fits, _NAME, "weight", f"[Cout, {x.shape[1]}, 1, 1]", f"shape {list(weight.shape)}")
    channels = weight.shape[0]
    _expect_like(x, "weight", weight, weight.shape)
    if bias is not None:
        _expect_like(x, "bias", bias, (channels,))
    if residual is not None:
        _expect_like(x, "residual", residual, _out_shape(x, weight))
    if scale is not None:
        n = x.shape[0]
        fits = scale.dim() == 0 or scale.shape == (n,) or scale.shape == (n, 1, 1, 1)
        expect(fits, _NAME, "scale", f"a float or of shape [], [{n}] or [{n}, 1, 1, 1]", f"shape {list(scale.shape)}")
        expect(scale.is_floating_point(), _NAME, "scale", "a floating point tensor", scale.dtype)
        expect(scale.device == x.device, _NAME, "scale", f"on the device of `x`, {x.device}", scale.device)


def _expect_like(x: Tensor, argument: str, tensor: Tensor, shape) -> None:
    expect(
        tuple(tensor.shape) == tuple(shape), _NAME, argument, f"of shape {list(shape)}", f"shape {list(tensor.shape)}"
    )
    expect(tensor.dtype == x.dtype, _NAME, argument, f"of the dtype of `x`, {x.dtype}", tensor.dtype)
    expect(tensor.device == x.device, _NAME, argument, f"on the device of `x`, {x.device}", tensor.device)


def _validate_out(out: Tensor, x: Tensor, weight: Tensor, *others: Tensor | None) -> None:
    _expect_like(x, "out", out, _out_shape(x, weight))
    width = out.shape[3]
    even = out.shape[2] == 1 or out.stride(2) == width * out.stride(3)
    expect(
        even and 0 not in out.stride(),
        _NAME,
        "out",
        "without overlap and with evenly strided pixels",
        f"strides {out.stride()}",
    )
    for argument, tensor in zip(("x", "weight", "bias", "residual", "scale"), (x, weight, *others), strict=True):
        overlap = tensor is not None and layout.overlap(out, tensor)
        expect(not overlap, _NAME, "out", f"apart from `{argument}` in memory", "a tensor that overlaps it")


def expect_no_gradient(*tensors: Tensor | None) -> None:
    """`out=` cannot be differentiated through, as in PyTorch."""
    tracked = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    expect(not tracked, _NAME, "out", "None where a gradient is recorded", "a tensor")


def _out_shape(x: Tensor, weight: Tensor) -> tuple[int, ...]:
    return (x.shape[0], weight.shape[0], *x.shape[2:])


def _new_out(x: Tensor, weight: Tensor) -> Tensor:
    """An empty output in x's memory format."""
    fmt = torch.channels_last if layout.is_channels_last(layout.dense(x)) else torch.contiguous_format
    return torch.empty(_out_shape(x, weight), dtype=x.dtype, device=x.device, memory_format=fmt)


def _kernel_scale(scale: Tensor | None, factor: float, x: Tensor) -> Tensor | float:
    if scale is None:
        return factor
    scale = scale.to(register.wide_dtype(x.dtype))
    return scale if scale.dim() == 0 else scale.reshape(-1)


def _forward(x, weight, bias, residual, scale, factor):
    _validate(x, weight, bias, residual, scale)
    return _run(x, weight, bias, residual, scale, factor, _new_out(x, weight))


def _forward_out(x, weight, bias, residual, scale, factor, out):
    _validate(x, weight, bias, residual, scale)
    _validate_out(out, x, weight, bias, residual, scale)
    _run(x, weight, bias, residual, scale, factor, out)


def _run(x, weight, bias, residual, scale, factor, out):
    if out.numel() == 0:
        return out
    x = layout.dense(x)
    weight, bias = register.contiguous(weight, bias)
    residual = residual if residual is None else layout.match(residual, x)
    kernels = dispatch.implementation(_NAME, x)
    return kernels.zero_conv_add_fwd(x, weight, bias, residual, _kernel_scale(scale, factor, x), out)


def _fake_forward(x, weight, bias, residual, scale, factor):
    _validate(x, weight, bias, residual, scale)
    return _new_out(x, weight)


def _fake_forward_out(x, weight, bias, residual, scale, factor, out):
    _validate(x, weight, bias, residual, scale)
    _expect_like(x, "out", out, _out_shape(x, weight))


def _input(x: Tensor | None, dout: Tensor, weight: Tensor, channels_last: bool) -> Tensor:
    """x, dense. If it was not saved, no more of it is read than shape, dtype and memory format: an empty tensor."""
    if x is not None:
        return layout.dense(x)
    shape = (dout.shape[0], weight.shape[1], *dout.shape[2:])
    fmt = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=weight.dtype, device=dout.device, memory_format=fmt)


def _backward(dout, x, weight, bias, scale, factor, channels_last, need):
    x = _input(x, dout, weight, channels_last)
    if dout.numel() == 0 or x.numel() == 0:
        return [torch.zeros_like(t) for t in register.needed((x, weight, bias, scale), need)]
    weight, bias = register.contiguous(weight, bias)  # dout comes in any strides
    dx, dweight, dbias, dscale = dispatch.implementation(_NAME, x).zero_conv_add_bwd(
        dout, x, weight, bias, _kernel_scale(scale, factor, x), tuple(need)
    )
    if need[1]:  # the strides of a 1x1 kernel are ambiguous; DDP copies a gradient whose strides are not the weight's
        dweight = dweight.as_strided(weight.shape, weight.stride())
    if need[3]:
        dscale = dscale.reshape(scale.shape).to(scale.dtype)
    return register.needed((dx, dweight, dbias, dscale), need)


def _fake_backward(dout, x, weight, bias, scale, factor, channels_last, need):
    x = _input(x, dout, weight, channels_last)
    return [torch.empty_like(t) for t in register.needed((x, *register.contiguous(weight, bias, scale)), need)]


def _setup_context(ctx, inputs, output):
    x, weight, bias, _, scale, ctx.factor = inputs
    wanted = ctx.needs_input_grad
    ctx.set_materialize_grads(False)
    ctx.channels_last = layout.is_channels_last(x)
    ctx.save_for_backward(x if wanted[1] or wanted[4] else None, weight, bias, scale)


def _autograd(ctx, dout):
    if dout is None:
        return (None,) * 6
    wanted = ctx.needs_input_grad
    need = [wanted[0], wanted[1], wanted[2], wanted[4]]
    gradients = (
        torch.ops.cnkernels.zero_conv_add_backward(dout, *ctx.saved_tensors, ctx.factor, ctx.channels_last, need)
        if any(need)
        else []
    )
    dx, dweight, dbias, dscale = register.spread(gradients, need)
    return dx, dweight, dbias, dout if wanted[3] else None, dscale, None


_ARGUMENTS = "Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? scale, float factor"

register.op(
    _NAME, f"({_ARGUMENTS}) -> Tensor", _forward, _fake_forward, setup_context=_setup_context, autograd=_autograd
)
register.op(
    f"{_NAME}_out", f"({_ARGUMENTS}, Tensor(a!) out) -> ()", _forward_out, _fake_forward_out, differentiable=False
)
register.op(
    f"{_NAME}_backward",
    "(Tensor dout, Tensor? x, Tensor weight, Tensor? bias, Tensor? scale, float factor, bool channels_last, "
    "bool[] need) -> Tensor[]",
    _backward,
    _fake_backward,
)
