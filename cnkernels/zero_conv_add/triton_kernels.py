"""zero_conv_add in Triton: residual + scale * (1x1 convolution + bias) as one matrix product, and its gradients."""

import torch
from torch import Tensor

from cnkernels import layout
from cnkernels.aot_case import AotCase
from cnkernels.zero_conv_add.triton_backward import dscale_launch, dweight_launch, sum_launch
from cnkernels.zero_conv_add.triton_common import Scale, pixel_strides
from cnkernels.zero_conv_add.triton_forward import product_launch


def zero_conv_add_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, scale: Scale, out: Tensor | None = None
) -> Tensor:
    if out is None:
        out = _empty(x, weight.shape[0])
    if out.numel():
        product_launch(x, weight, bias, residual, scale, out)()
    return out


def zero_conv_add_bwd(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, scale: Scale, need: tuple[bool, bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of (x, weight, bias, scale), None where not needed. The residual's is `dout` itself.

    `dout` is read in place when contiguous, channels_last or a channel slice of either; otherwise it is copied once.
    """
    dout = _readable(dout)
    dx = dweight = dbias = dscale = None
    if need[0]:
        dx = _empty(x, x.shape[1])
        product_launch(dout, weight.transpose(0, 1), None, None, scale, dx)()
    if need[1] or need[2]:
        launch, dweight, dbias = dweight_launch(dout, x, weight, scale, need[1], need[2])
        launch()
        dweight, dbias = _summed(dweight, weight), _summed(dbias, weight)
    if need[3]:
        launch, dots = dscale_launch(dout, x, weight, bias)
        launch()
        dscale = dots.sum((0, 2)) if scale.dim() else dots.sum()
    return dx, dweight, dbias, dscale


def _summed(partial: Tensor | None, weight: Tensor) -> Tensor | None:
    """The sum of the splits, in the weight's dtype."""
    if partial is None or partial.shape[0] == 1:
        return None if partial is None else partial[0]
    out = torch.empty(partial.shape[1:], dtype=weight.dtype, device=partial.device)
    sum_launch(partial, out)()
    return out


def _empty(x: Tensor, channels: int) -> Tensor:
    """An empty [N, channels, H, W] in the memory format of `x`."""
    fmt = torch.channels_last if layout.is_channels_last(x) else torch.contiguous_format
    shape = (x.shape[0], channels, *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=fmt)


def _readable(t: Tensor) -> Tensor:
    """`t` where its pixels are evenly strided and pixels or channels are adjacent; otherwise a channels_last copy."""
    _, pixel, channel = pixel_strides(t)
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
    name = f"{n}x{channels}x{side}x{side} {str(dtype).removeprefix('torch.')} {kind}"
    dweight, partial, _ = dweight_launch(x, x, weight, scale, True, True)
    launches = {
        "forward": product_launch(x, weight, bias, x, scale, x),
        "dx": product_launch(x, weight.transpose(0, 1), None, None, scale, x),
        "dweight": dweight,
        "dscale": dscale_launch(x, x, weight, bias)[0],
    }
    half = dtype != torch.float32  # float32 is multiplied outside the matrix units
    cases = [launch.case(f"zero_conv_add {job} {name}", half) for job, launch in launches.items()]
    if partial.shape[0] > 1:
        cases.append(sum_launch(partial, weight).case(f"zero_conv_add sum {name}"))
    return cases
