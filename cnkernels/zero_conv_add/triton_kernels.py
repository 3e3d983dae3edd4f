"""zero_conv_add in Triton: what each call allocates and launches, and what is compiled ahead of time."""

from collections.abc import Callable

import torch
from torch import Tensor

from cnkernels import layout
from cnkernels.aot_case import AotCase
from cnkernels.register import dtype_name
from cnkernels.zero_conv_add.triton_backward import dscale_launch, dweight_launch, sum_launch
from cnkernels.zero_conv_add.triton_common import Scale, evenly_strided, scale_operands
from cnkernels.zero_conv_add.triton_forward import product_launch

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]

_PRODUCT = ("x_ptr", "weight_ptr", "bias_ptr", "residual_ptr", "scale_ptr", "out_ptr", "scale")
_DWEIGHT = ("dout_ptr", "x_ptr", "scale_ptr", "dweight_ptr", "dbias_ptr", "scale")
_DSCALE = ("x_ptr", "weight_ptr", "bias_ptr", "dout_ptr", "dots_ptr")
_SUM = ("partial_ptr", "out_ptr")


def zero_conv_add_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, scale: Scale, out: Tensor | None = None
) -> Tensor:
    out = _empty(x, weight.shape[0]) if out is None else out
    if out.numel():
        zero_conv_add_fwd_plan(x, weight, bias, residual, scale, out)(x, weight, bias, residual, scale, out)
    return out


def zero_conv_add_fwd_plan(x, weight, bias, residual, scale, out) -> Callable[..., None]:
    """What runs zero_conv_add_fwd for tensors like these; `out` is given."""
    launch = product_launch(x, weight, residual, scale, out).bind(x.device, _PRODUCT)
    if isinstance(scale, Tensor):
        return lambda x, weight, bias, residual, scale, out: launch((x, weight, bias, residual, scale, out, 1.0))
    return lambda x, weight, bias, residual, scale, out: launch((x, weight, bias, residual, None, out, scale))


def zero_conv_add_bwd(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, scale: Scale, need: tuple[bool, bool, bool, bool]
) -> Gradients:
    """Gradients of (x, weight, bias, scale), None where not needed. The residual's is `dout` itself.

    `dout` is read in place when contiguous, channels_last or a channel slice of either; otherwise it is copied once.
    """
    return zero_conv_add_bwd_plan(dout, x, weight, bias, scale, need)(dout, x, weight, bias, scale, need)


def zero_conv_add_bwd_plan(dout, x, weight, bias, scale, need) -> Callable[..., Gradients]:
    """What runs zero_conv_add_bwd for tensors like these."""
    readable = _readable(dout)
    if readable is not dout:
        plan = zero_conv_add_bwd_plan(readable, x, weight, bias, scale, need)
        return lambda dout, *rest: plan(_readable(dout), *rest)
    input_gradient = _dx_plan(dout, x, weight, scale) if need[0] else None
    weight_gradients = _dweight_plan(dout, x, weight, scale, need[1], need[2]) if need[1] or need[2] else None
    scale_gradient = _dscale_plan(dout, x) if need[3] else None

    def run(dout, x, weight, bias, scale, need):
        scale_ptr, factor = scale_operands(scale)
        dx = input_gradient(dout, x, weight, scale_ptr, factor) if input_gradient else None
        dweight, dbias = weight_gradients(dout, x, scale_ptr, factor) if weight_gradients else (None, None)
        dscale = scale_gradient(dout, x, weight, bias, scale) if scale_gradient else None
        return dx, dweight, dbias, dscale

    return run


def _dx_plan(dout: Tensor, x: Tensor, weight: Tensor, scale: Scale) -> Callable[..., Tensor]:
    launch = product_launch(dout, weight.transpose(0, 1), None, scale, _empty(x, x.shape[1]))
    launch = launch.bind(x.device, _PRODUCT)
    new = layout.allocator(x.shape, x.dtype, x.device, layout.memory_format_of(x))

    def run(dout, x, weight, scale, factor):
        dx = new()
        launch((dout, weight, None, None, scale, dx, factor))
        return dx

    return run


def _dweight_plan(
    dout: Tensor, x: Tensor, weight: Tensor, scale: Scale, need_weight: bool, need_bias: bool
) -> Callable[..., tuple[Tensor | None, Tensor | None]]:
    """The gradients of weight and bias, each in one split or as the sum of several."""
    launch, splits = dweight_launch(dout, x, scale, need_weight)
    launch = launch.bind(x.device, _DWEIGHT)
    dtype, device, shapes = weight.dtype, weight.device, (weight.shape, weight.shape[:1])
    adds = [sum_launch(splits, shape.numel()).bind(device, _SUM) for shape in shapes]

    new = new_parts = [layout.allocator(shape, dtype, device) for shape in shapes]
    if splits > 1:
        new_parts = [layout.allocator((splits, *shape), torch.float32, device) for shape in shapes]

    def summed(partial, new, add):
        if partial is None or splits == 1:
            return partial
        out = new()
        add((partial, out))
        return out

    def run(dout, x, scale, factor):
        dweight = new_parts[0]() if need_weight else None
        dbias = new_parts[1]() if need_bias else None
        launch((dout, x, scale, dweight, dbias, factor))
        return summed(dweight, new[0], adds[0]), summed(dbias, new[1], adds[1])

    return run


def _dscale_plan(dout: Tensor, x: Tensor) -> Callable[..., Tensor]:
    launch, shape = dscale_launch(dout, x)
    launch, new = launch.bind(x.device, _DSCALE), layout.allocator(shape, torch.float32, x.device)

    def run(dout, x, weight, bias, scale):
        dots = new()
        launch((x, weight, bias, dout, dots))
        return dots.sum((0, 2)) if scale.dim() else dots.sum()

    return run


def _empty(x: Tensor, channels: int) -> Tensor:
    """An empty [N, channels, H, W] in the memory format of `x`."""
    shape = (x.shape[0], channels, *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout.memory_format_of(x))


def _readable(t: Tensor) -> Tensor:
    """`t` where its pixels are evenly strided and pixels or channels are adjacent; otherwise a channels_last copy."""
    _, pixel, channel = evenly_strided(t)
    even = 1 in t.shape[2:] or t.stride(2) == t.shape[3] * t.stride(3)
    return t if even and 1 in (pixel, channel) else t.contiguous(memory_format=torch.channels_last)


def aot_cases() -> list[AotCase]:
    """The kernels as SD 1.5's zero convolutions launch them, for `cnkernels.aot`.

    And for one pixel of one channel: sizes and strides of one are constants to the compiler.
    """
    sizes = [(2, 320, 64), (2, 320, 32), (2, 640, 32), (2, 1280, 16), (2, 1280, 8), (16, 320, 64), (16, 640, 32)]
    half = [(*size, dtype) for size in sizes for dtype in (torch.float16, torch.bfloat16)]
    cases = []
    for n, channels, side, dtype in (*half, (2, 320, 64, torch.float32), (1, 1, 1, torch.float32)):
        cases += _cases(n, channels, side, dtype, torch.channels_last, scale=1.0)
        cases += _cases(n, channels, side, dtype, torch.contiguous_format, scale=torch.empty(n, device="meta"))
    return cases


def _cases(n, channels, side, dtype, memory_format, scale) -> list[AotCase]:
    x = torch.empty((n, channels, side, side), dtype=dtype, device="meta", memory_format=memory_format)
    weight, bias = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((channels, channels, 1, 1), channels))
    kind = "nhwc" if memory_format == torch.channels_last else "nchw, scale per sample"
    name = f"{n}x{channels}x{side}x{side} {dtype_name(dtype)} {kind}"
    dweight, splits = dweight_launch(x, x, scale, True)
    scale_ptr, factor = scale_operands(scale)
    operands = {"x_ptr": x, "weight_ptr": weight, "bias_ptr": bias, "residual_ptr": x, "out_ptr": x, "dout_ptr": x}
    operands |= {"scale_ptr": None if scale_ptr is None else torch.float32, "scale": factor}
    operands |= dict.fromkeys(("dots_ptr", "partial_ptr"), torch.float32)
    operands |= dict.fromkeys(("dweight_ptr", "dbias_ptr"), dtype if splits == 1 else torch.float32)
    launches = {
        "forward": (product_launch(x, weight, x, scale, x), operands),
        "dx": (
            product_launch(x, weight.transpose(0, 1), None, scale, x),
            operands | {"bias_ptr": None, "residual_ptr": None},
        ),
        "dweight": (dweight, operands),
        "dscale": (dscale_launch(x, x)[0], operands),
    }
    half = dtype != torch.float32  # float32 is multiplied outside the matrix units
    cases = [launch.case(f"zero_conv_add {job} {name}", given, half) for job, (launch, given) in launches.items()]
    if splits > 1:
        cases.append(sum_launch(splits, weight.numel()).case(f"zero_conv_add sum {name}", operands))
    return cases
