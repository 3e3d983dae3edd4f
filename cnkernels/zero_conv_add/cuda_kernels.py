"""zero_conv_add on csrc/zero_conv_add*.cu, one layer or a group of them in one launch."""

import math
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from cnkernels import extension, layout

Scale = float | Tensor
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]

_BLOCKS_PER_MULTIPROCESSOR = 2  # of at most 320 threads and 75 KiB of shared memory
_STEPS_PER_SPLIT = 8  # of the forward's depth, at least
_DEPTH = 32  # positions that one step of dweight sums


class Layer(NamedTuple):
    """One zero convolution: the arguments of zero_conv_add_fwd."""

    x: Tensor  # [N, Cin, H, W]
    weight: Tensor  # [Cout, Cin, 1, 1]
    bias: Tensor | None = None  # [Cout]
    residual: Tensor | None = None  # [N, Cout, H, W]
    scale: Scale = 1.0  # float, or float32 [] or [N]
    out: Tensor | None = None  # [N, Cout, H, W], may be a channel slice of a larger channels_last tensor


def zero_conv_add_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, scale: Scale, out: Tensor | None = None
) -> Tensor:
    return zero_conv_add_group_fwd([(x, weight, bias, residual, scale, out)])[0]


def zero_conv_add_group_fwd(calls: Sequence[tuple]) -> list[Tensor]:
    """[zero_conv_add_fwd(*call) for call in calls], up to 16 of one memory format in one launch.

    Args:
        calls: of one dtype and device; residuals in the memory format of x.
    """
    layers = [_with_out(_with_dense_scale(Layer(*call))) for call in calls]
    x = layers[0].x
    library = extension.module_for(x.device)
    calls = [_describe(library, layer, layer.out) for layer in layers]
    partials = _split_depths(library, x, calls)
    library, place = extension.prepare(x, *partials, *(t for layer in layers for t in layer if isinstance(t, Tensor)))
    blocks = _BLOCKS_PER_MULTIPROCESSOR * extension.multiprocessors(x.device)
    for group in _launches(library, calls):
        library.zero_conv_add_fwd(place, extension.dtype_of(library, x), group, blocks)
    return [layer.out for layer in layers]


def zero_conv_add_bwd(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, scale: Scale, need: tuple[bool, bool, bool, bool]
) -> Gradients:
    return zero_conv_add_group_bwd([(dout, x, weight, bias, scale, need)])[0]


def zero_conv_add_group_bwd(calls: Sequence[tuple]) -> list[Gradients]:
    """[zero_conv_add_bwd(*call) for call in calls]: one launch for all dx, one for all dweight, then the sums.

    With a scale per sample, dweight takes float32 workspace of at least N times the size of the weight.
    """
    layers = [_with_dense_scale(Layer(x, weight, bias, None, scale)) for _, x, weight, bias, scale, _ in calls]
    x = layers[0].x
    library = extension.module_for(x.device)
    blocks = _BLOCKS_PER_MULTIPROCESSOR * extension.multiprocessors(x.device)
    douts = [layout.match(call[0], layer.x) for call, layer in zip(calls, layers, strict=True)]
    needs = [call[-1] for call in calls]
    gradients = [_empty_gradients(layer, need) for layer, need in zip(layers, needs, strict=True)]
    calls = [_describe(library, layer, dout) for layer, dout in zip(layers, douts, strict=True)]
    plans = [_workspace(library, *cut, blocks) for cut in zip(calls, layers, needs, strict=True)]
    tensors = [t for made in (*layers, *gradients, *plans) for t in made if isinstance(t, Tensor)]
    library, place = extension.prepare(x, *douts, *tensors)
    for dout, call, made, plan in zip(douts, calls, gradients, plans, strict=True):
        call.dout = dout.data_ptr()
        call.dx, call.dweight, call.dbias, call.dscale = (extension.address(t) for t in made)
        partial, call.splits, dots, sums, call.sum_parts = plan
        call.dweight_partial, call.dot_partial, call.channel_sums = (
            extension.address(t) for t in (partial, dots, sums)
        )
    for group in _launches(library, calls):
        library.zero_conv_add_bwd(place, extension.dtype_of(library, x), group, blocks)
    return gradients


def _split_depths(library: ModuleType, x: Tensor, calls: Sequence[object]) -> list[Tensor]:
    """Cuts the depths where all tiles together leave multiprocessors idle; the workspace that this takes."""
    dtype, multiprocessors = extension.dtype_of(library, x), extension.multiprocessors(x.device)
    tiles = sum(library.zero_conv_fwd_tiles(dtype, call) for call in calls)
    partials = []
    for call in calls:
        steps = math.ceil(call.in_channels / _DEPTH)
        call.depth_splits = max(1, min(steps // _STEPS_PER_SPLIT, multiprocessors // max(1, tiles)))
        if call.depth_splits > 1:
            size = call.depth_splits, call.samples, call.out_channels, call.positions
            partials.append(torch.empty(size, dtype=torch.float32, device=x.device))
            call.depth_partial = partials[-1].data_ptr()
    return partials


def _launches(library: ModuleType, calls: Sequence[object]) -> Iterator[list[object]]:
    """The calls of each launch: a table has a limit, and a kernel reads one memory format."""
    for channels_last in (False, True):
        alike = [call for call in calls if call.channels_last == channels_last]
        for first in range(0, len(alike), library.ZERO_CONV_GROUP):
            yield alike[first : first + library.ZERO_CONV_GROUP]


def _with_out(layer: Layer) -> Layer:
    if layer.out is not None:
        return layer
    x, channels = layer.x, layer.weight.shape[0]
    memory_format = torch.channels_last if layout.is_channels_last(x) else torch.contiguous_format
    shape = (x.shape[0], channels, *x.shape[2:])
    return layer._replace(out=torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format))


def _with_dense_scale(layer: Layer) -> Layer:
    return layer._replace(scale=layer.scale.contiguous()) if isinstance(layer.scale, Tensor) else layer


def _describe(library: ModuleType, layer: Layer, out: Tensor) -> object:
    """The struct of csrc/launchers.h for a layer, its output in the strides of `out`."""
    x, scale = layer.x, layer.scale
    is_tensor = isinstance(scale, Tensor)
    return library.ZeroConv(
        samples=x.shape[0],
        in_channels=x.shape[1],
        out_channels=layer.weight.shape[0],
        positions=x.shape[2] * x.shape[3],
        channels_last=layout.is_channels_last(x),
        x=x.data_ptr(),
        weight=layer.weight.data_ptr(),
        bias=extension.address(layer.bias),
        residual=extension.address(layer.residual),
        out=out.data_ptr(),
        out_sample=out.stride(0),
        out_channel=out.stride(1),
        out_position=out.stride(3) if out.shape[3] > 1 else out.stride(2),
        scale=scale.data_ptr() if is_tensor else 0,
        scale_stride=scale.dim() if is_tensor else 0,
        factor=1.0 if is_tensor else scale,
    )


def _empty_gradients(layer: Layer, need: tuple[bool, bool, bool, bool]) -> Gradients:
    inputs = (layer.x, layer.weight, layer.bias, layer.scale)
    return tuple(torch.empty_like(t) if wanted else None for t, wanted in zip(inputs, need, strict=True))


def _workspace(library: ModuleType, call, layer: Layer, need: tuple[bool, bool, bool, bool], blocks: int):
    """(dweight partials, splits, dot products, channel sums, sum parts), float32, None where not needed."""
    x = layer.x
    samples, channels, positions = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    out_channels, dtype = layer.weight.shape[0], extension.dtype_of(library, x)

    def new(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.float32, device=x.device)

    partial = dots = sums = None
    splits = sum_parts = 1
    if need[1]:
        ranges = samples if isinstance(layer.scale, Tensor) and layer.scale.dim() else 1  # one scale in each
        steps = math.ceil(positions / _DEPTH) * samples // ranges
        tiles = library.zero_conv_dweight_tiles(dtype, call)
        splits = ranges * max(1, min(steps // 4, blocks // (tiles * ranges)))
        partial = new(splits, out_channels, channels)
    if need[3]:
        dots = new(samples, library.zero_conv_dx_tiles(dtype, call))
    if need[2] or (need[3] and layer.bias is not None):
        sum_parts = max(1, min(positions // 64, blocks // (samples * math.ceil(out_channels / 32))))
        sums = new(samples, sum_parts, out_channels)
    return partial, splits, dots, sums, sum_parts
