"""zero_conv_add on csrc/zero_conv_add*.cu, one layer or a group of them in one launch."""

import math
from collections.abc import Callable, Sequence
from itertools import chain
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
    scale: Scale = 1.0  # float, or contiguous float32 [] or [N]
    out: Tensor | None = None  # [N, Cout, H, W], may be a channel slice of a larger channels_last tensor


def zero_conv_add_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, scale: Scale, out: Tensor | None = None
) -> Tensor:
    return zero_conv_add_group_fwd([(x, weight, bias, residual, scale, out)])[0]


def zero_conv_add_fwd_plan(x, weight, bias, residual, scale, out) -> Callable[..., None]:
    """A function that computes zero_conv_add_fwd for tensors like these; `out` is given."""
    run = zero_conv_add_group_fwd_plan([(x, weight, bias, residual, scale, out)])
    return lambda *call: run((call,))


def zero_conv_add_group_fwd(calls: Sequence[tuple]) -> list[Tensor]:
    """[zero_conv_add_fwd(*call) for call in calls], up to 16 of one memory format in one launch.

    Args:
        calls: of one dtype and device; residuals in the memory format of x.
    """
    layers = [_with_out(Layer(*call)) for call in calls]
    zero_conv_add_group_fwd_plan(layers)(layers)
    return [layer.out for layer in layers]


def zero_conv_add_group_fwd_plan(calls: Sequence[tuple]) -> Callable[[Sequence[tuple]], None]:
    """A function that computes the outputs of calls like these, all of which are given."""
    layers = [Layer(*call) for call in calls]
    x = layers[0].x
    structs = [_describe(extension.module_for(x.device), layer, layer.out) for layer in layers]
    new_partials = _split_depths(x, structs)
    launch = _launcher("zero_conv_add_fwd", x, structs)
    is_tensor = [isinstance(layer.scale, Tensor) for layer in layers]

    def operands_of(call, new_partial, is_tensor):
        x, weight, bias, residual, scale, out = call
        return x, weight, bias, residual, scale.contiguous() if is_tensor else None, out, new_partial()

    def run(calls):
        operands = [operands_of(*given) for given in zip(calls, new_partials, is_tensor, strict=True)]
        launch(
            operands, [1.0 if given[4] is not None else call[4] for given, call in zip(operands, calls, strict=True)]
        )

    return run


def zero_conv_add_bwd(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, scale: Scale, need: tuple[bool, bool, bool, bool]
) -> Gradients:
    return zero_conv_add_group_bwd([(dout, x, weight, bias, scale, need)])[0]


def zero_conv_add_bwd_plan(dout, x, weight, bias, scale, need) -> Callable[..., Gradients]:
    """A function that computes zero_conv_add_bwd for tensors like these."""
    run = zero_conv_add_group_bwd_plan([(dout, x, weight, bias, scale, need)])
    return lambda *call: run((call,))[0]


def zero_conv_add_group_bwd(calls: Sequence[tuple]) -> list[Gradients]:
    """[zero_conv_add_bwd(*call) for call in calls]: one launch for all dx, one for all dweight, then the sums.

    With a scale per sample, dweight takes float32 workspace of at least N times the size of the weight.
    """
    return zero_conv_add_group_bwd_plan(calls)(calls)


def zero_conv_add_group_bwd_plan(calls: Sequence[tuple]) -> Callable[[Sequence[tuple]], list[Gradients]]:
    """A function that computes the gradients of calls like these."""
    layers = [Layer(x, weight, bias, None, scale) for _, x, weight, bias, scale, _ in calls]
    x = layers[0].x
    library = extension.module_for(x.device)
    douts = [layout.match(call[0], layer.x) for layer, call in zip(layers, calls, strict=True)]
    structs = [_describe(library, layer, dout) for layer, dout in zip(layers, douts, strict=True)]
    allocators = [_workspace(library, *given) for given in zip(structs, layers, calls, strict=True)]
    launch = _launcher("zero_conv_add_bwd", x, structs)
    is_tensor = [isinstance(layer.scale, Tensor) for layer in layers]
    matches = [dout is call[0] for dout, call in zip(douts, calls, strict=True)]

    def operands_of(call, allocators, is_tensor, matches):
        dout, x, weight, bias, scale, (need_x, need_weight, need_bias, need_scale) = call
        new_partial, new_dots, new_sums = allocators
        scale = scale.contiguous() if is_tensor else None
        return (
            dout if matches else layout.match(dout, x), x, weight, bias, scale,
            torch.empty_like(x) if need_x else None,
            torch.empty_like(weight) if need_weight else None,
            torch.empty_like(bias) if need_bias else None,
            torch.empty_like(scale) if need_scale else None,
            new_partial(), new_dots(), new_sums(),
        )  # fmt: skip

    def run(calls):
        operands = [operands_of(*given) for given in zip(calls, allocators, is_tensor, matches, strict=True)]
        launch(
            operands, [1.0 if given[4] is not None else call[4] for given, call in zip(operands, calls, strict=True)]
        )
        return [given[5:9] for given in operands]

    return run


def _launcher(name: str, x: Tensor, structs: list[object]) -> Callable[[list[tuple], list[float]], None]:
    """A function that launches `name` of the extension on the operands and factors of layers like these structs'."""
    device = x.device
    library, stream_of, index = extension.module_for(device), extension.stream_of(device), device.index or 0
    dtype, blocks = extension.dtype_of(library, x), _blocks(device)
    launch, launches = getattr(library, name), _launches(library, structs)

    def run(operands, factors):
        stream = stream_of(*chain.from_iterable(operands))
        addresses = [[0 if t is None else t.data_ptr() for t in given] for given in operands]
        if len(launches) == 1:
            launch(structs, dtype, blocks, index, stream, addresses, factors)
            return
        for chosen, some in launches:
            launch(some, dtype, blocks, index, stream, [addresses[i] for i in chosen], [factors[i] for i in chosen])

    return run


def _blocks(device: torch.device) -> int:
    return _BLOCKS_PER_MULTIPROCESSOR * extension.multiprocessors(device)


def _no_workspace() -> None:
    return None


def _split_depths(x: Tensor, structs: Sequence[object]) -> list[Callable[[], Tensor | None]]:
    """Cuts the depths where all tiles together leave multiprocessors idle; the allocator of each layer's workspace."""
    library = extension.module_for(x.device)
    dtype, multiprocessors = extension.dtype_of(library, x), extension.multiprocessors(x.device)
    tiles = sum(library.zero_conv_fwd_tiles(dtype, struct) for struct in structs)
    allocators = []
    for struct in structs:
        steps = math.ceil(struct.in_channels / _DEPTH)
        struct.depth_splits = max(1, min(steps // _STEPS_PER_SPLIT, multiprocessors // max(1, tiles)))
        size = struct.depth_splits, struct.samples, struct.out_channels, struct.positions
        split = struct.depth_splits > 1
        allocators.append(layout.allocator(size, torch.float32, x.device) if split else _no_workspace)
    return allocators


def _launches(library: ModuleType, structs: Sequence[object]) -> list[tuple[list[int], list[object]]]:
    """The numbers and structs of the layers of each launch: a table has a limit, and a kernel reads one format."""
    launches = []
    for channels_last in (False, True):
        alike = [i for i, struct in enumerate(structs) if struct.channels_last == channels_last]
        for first in range(0, len(alike), library.ZERO_CONV_GROUP):
            chosen = alike[first : first + library.ZERO_CONV_GROUP]
            launches.append((chosen, [structs[i] for i in chosen]))
    return launches


def _with_out(layer: Layer) -> Layer:
    if layer.out is not None:
        return layer
    x, channels = layer.x, layer.weight.shape[0]
    memory_format = torch.channels_last if layout.is_channels_last(x) else torch.contiguous_format
    shape = (x.shape[0], channels, *x.shape[2:])
    return layer._replace(out=torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format))


def _describe(library: ModuleType, layer: Layer, out: Tensor) -> object:
    """The struct of csrc/launchers.h for a layer, its output in the strides of `out`."""
    x, scale = layer.x, layer.scale
    return library.ZeroConv(
        samples=x.shape[0],
        in_channels=x.shape[1],
        out_channels=layer.weight.shape[0],
        positions=x.shape[2] * x.shape[3],
        channels_last=layout.is_channels_last(x),
        out_sample=out.stride(0),
        out_channel=out.stride(1),
        out_position=out.stride(3) if out.shape[3] > 1 else out.stride(2),
        scale_stride=scale.dim() if isinstance(scale, Tensor) else 0,
    )


def _workspace(library: ModuleType, struct: object, layer: Layer, call: tuple) -> tuple[Callable, Callable, Callable]:
    """Cuts the sums of a backward; allocators of its partial dweight, dot products and channel sums, float32."""
    need, blocks = call[-1], _blocks(layer.x.device)
    x = layer.x
    samples, channels, positions = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    out_channels, dtype = layer.weight.shape[0], extension.dtype_of(library, x)

    def allocator(*size: int) -> Callable[[], Tensor]:
        return layout.allocator(size, torch.float32, x.device)

    partial = dots = sums = _no_workspace
    if need[1]:
        ranges = samples if isinstance(layer.scale, Tensor) and layer.scale.dim() else 1  # one scale in each
        steps = math.ceil(positions / _DEPTH) * samples // ranges
        tiles = library.zero_conv_dweight_tiles(dtype, struct)
        struct.splits = ranges * max(1, min(steps // 4, blocks // (tiles * ranges)))
        partial = allocator(struct.splits, out_channels, channels)
    if need[3]:
        dots = allocator(samples, library.zero_conv_dx_tiles(dtype, struct))
    if need[2] or (need[3] and layer.bias is not None):
        struct.sum_parts = max(1, min(positions // 64, blocks // (samples * math.ceil(out_channels / 32))))
        sums = allocator(samples, struct.sum_parts, out_channels)
    return partial, dots, sums
