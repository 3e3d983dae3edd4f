"""group_norm_silu on csrc/group_norm_silu*.cu: the cut into blocks, outputs and workspace, the call."""

import math
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from cnkernels import extension, layout

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]

_SECTOR = 32  # bytes: what global memory moves at least
_FEW_POSITIONS = 64  # a block is not cut into less


def group_norm_silu_fwd(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str | None,
    addend: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    arguments = (x, groups, weight, bias, eps, activation, addend)
    return group_norm_silu_fwd_plan(*arguments)(*arguments)


def group_norm_silu_fwd_plan(x, groups, weight, bias, eps, activation, addend) -> Callable:
    """A function that computes group_norm_silu_fwd for tensors like these."""
    device, samples = x.device, x.shape[0]
    library, stream_of, index = extension.module_for(device), extension.stream_of(device), device.index or 0
    cut = plan(library, x, groups, "fwd", (x,))
    call = library.GroupNormForward(
        dtype=extension.dtype_of(library, x),
        cut=cut,
        weight=_channels(library, weight),
        bias=_channels(library, bias),
        addend=_channels(library, addend),
        eps=eps,
        silu=activation == "silu",
    )
    launch, address = library.group_norm_silu_fwd, extension.address
    new_statistics = layout.allocator((samples, groups), torch.float32, device)
    new_partial = layout.allocator((samples, groups, cut.splits, 2), torch.float32, device)
    clusters = cut.cluster

    def run(x, groups, weight, bias, eps, activation, addend):
        y = torch.empty_like(x)
        mean = new_statistics()
        rstd = torch.empty_like(mean)
        partial = None if clusters else new_partial()
        stream = stream_of(x, y, mean, rstd, partial, weight, bias, addend)
        launch(
            call, index, stream, x.data_ptr(), y.data_ptr(), mean.data_ptr(), rstd.data_ptr(),
            address(partial), address(weight), address(bias), address(addend),
        )  # fmt: skip
        return y, mean, rstd

    return run


def group_norm_silu_bwd(
    dy: Tensor,
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    activation: str | None,
    addend: Tensor | None,
    need: tuple[bool, bool, bool, bool],
) -> Gradients:
    arguments = (layout.match(dy, x), x, groups, weight, bias, mean, rstd, activation, addend, need)
    return group_norm_silu_bwd_plan(*arguments)(*arguments)


def group_norm_silu_bwd_plan(dy, x, groups, weight, bias, mean, rstd, activation, addend, need) -> Callable:
    """A function that computes group_norm_silu_bwd for tensors like these; dy in the memory format of x."""
    device, (samples, channels) = x.device, x.shape[:2]
    library, stream_of, index = extension.module_for(device), extension.stream_of(device), device.index or 0
    cut = plan(library, x, groups, "bwd", (x, dy))
    need_dx, need_dweight, need_dbias, need_daddend = need
    call = library.GroupNormBackward(
        dtype=extension.dtype_of(library, x),
        cut=cut,
        weight=_channels(library, weight),
        bias=_channels(library, bias),
        addend=_channels(library, addend),
        dweight=_channels(library, weight),
        dbias=_channels(library, bias),
        daddend=_channels(library, addend),
        silu=activation == "silu",
    )
    launch, address = library.group_norm_silu_bwd, extension.address
    new_partial = _allocator(not cut.cluster, (samples, groups, cut.splits, 2), device)
    new_group_sums = _allocator(need_daddend, (samples, groups, 2), device)
    new_channel_partial = _allocator(any(need[1:]), (samples, cut.splits, 3, channels), device)

    def run(dy, x, groups, weight, bias, mean, rstd, activation, addend, need):
        dx = torch.empty_like(x) if need_dx else None
        dweight = torch.empty_like(weight) if need_dweight else None
        dbias = torch.empty_like(bias) if need_dbias else None
        daddend = torch.empty_like(addend) if need_daddend else None
        gradients = dx, dweight, dbias, daddend
        workspace = partial, group_sums, channel_partial = new_partial(), new_group_sums(), new_channel_partial()
        stream = stream_of(x, dy, mean, rstd, weight, bias, addend, *workspace, *gradients)
        launch(
            call, index, stream, x.data_ptr(), dy.data_ptr(), address(dx), mean.data_ptr(), rstd.data_ptr(),
            address(partial), address(group_sums), address(channel_partial), address(weight), address(bias),
            address(addend), address(dweight), address(dbias), address(daddend),
        )  # fmt: skip
        return gradients

    return run


def _allocator(needed: bool, shape: tuple[int, ...], device: torch.device) -> Callable[[], Tensor | None]:
    """A function that allocates float32 workspace where it is needed, and returns None elsewhere."""
    return layout.allocator(shape, torch.float32, device) if needed else lambda: None


def plan(library: ModuleType, x: Tensor, groups: int, direction: str, tensors: tuple[Tensor | None, ...]):
    """How the launch cuts `x` (csrc/group_norm_slab.cuh): the cluster form where the GPU has it and the slabs fit.

    Args:
        direction: "fwd" or "bwd".
        tensors: those that the kernels read in vectors. What they write is newly allocated, and so aligned.
    """
    samples, channels = x.shape[:2]
    positions = x.numel() // (samples * channels)
    channels_last = layout.is_channels_last(x)
    vector = 16 // x.element_size()
    row = channels if channels_last else positions
    vectors = row % vector == 0 and all(t is None or t.data_ptr() % 16 == 0 for t in tensors)
    spans = _spans(channels, channels // groups, x.element_size(), vector if vectors else 1, channels_last)
    cut = library.GroupNormCut(
        samples=samples,
        channels=channels,
        positions=positions,
        groups=groups,
        channels_last=channels_last,
        vectors=vectors,
    )
    limits = extension.limits(x.device)
    if vectors and _has_clusters(library, limits) and _cut_into_clusters(library, x, cut, direction, spans):
        return cut
    cut.cluster, cut.span = False, spans[0]
    cut.threads = _threads(cut.span, channels_last, library.GROUP_NORM_PORTABLE_THREADS)
    slabs = samples * math.ceil(channels / cut.span)
    enough = 4 * limits.multiprocessors // slabs  # blocks per slab that fill the GPU
    cut.splits = max(1, min(enough, positions // _FEW_POSITIONS, 64))
    return cut


def _cut_into_clusters(library: ModuleType, x: Tensor, cut, direction: str, spans: list[int]) -> bool:
    """Gives `cut` the widest span and the smallest cluster that fill the GPU, else those that make the most blocks.

    False where none fits the GPU.
    """
    limits, fit_of = extension.limits(x.device), getattr(library, f"group_norm_silu_{direction}_fit")
    place, dtype = library.Place(device=x.device.index or 0), extension.dtype_of(library, x)
    threads = getattr(library, f"GROUP_NORM_{direction.upper()}_THREADS")
    sizes = [size for size in (1, 2, 4, 8) if size <= limits.max_cluster]
    cut.cluster, most, best = True, 0, None
    for span in spans:
        cut.span, cut.threads = span, _threads(span, cut.channels_last, threads)
        for size in sizes:
            cut.splits = size
            blocks = cut.samples * math.ceil(cut.channels / span) * size
            if fit_of(place, dtype, cut).clusters == 0:
                continue
            if blocks >= limits.multiprocessors or size * _FEW_POSITIONS >= cut.positions:
                return True
            if blocks > most:
                most, best = blocks, (span, cut.threads, size)
    if best is not None:
        cut.span, cut.threads, cut.splits = best
    return best is not None


def _spans(channels: int, group: int, itemsize: int, vector: int, channels_last: bool) -> list[int]:
    """Channels per block, the widest first: one group where its positions lie together, else whole groups.

    Whole groups that are whole sectors too, or narrower, that are whole vectors; those share sectors with their
    neighbours, but make more blocks.
    """
    if not channels_last:
        return [group]
    units = dict.fromkeys(math.lcm(group, size) for size in (_SECTOR // itemsize, vector))
    spans = [unit for unit in units if vector > 1 and channels % unit == 0]
    if spans or vector > 1:
        return spans or [channels]
    return [min(channels, group * max(1, _SECTOR // itemsize // group))]


def _threads(span: int, channels_last: bool, most: int) -> int:
    """All of them, or in the contiguous format a warp per channel such that the rounds over a group come out even."""
    if channels_last:
        return most
    return 32 * math.ceil(span / math.ceil(span / (most // 32)))


def _has_clusters(library: ModuleType, limits) -> bool:
    """Where the GPU has them and the extension has code for them: that of sm_80 does not."""
    if limits.max_cluster == 1:
        return False
    compiled = (int(arch.rstrip("af")) for arch in library.architectures.split(";"))
    return any(90 <= arch <= limits.capability for arch in compiled)


def _channels(library: ModuleType, tensor: Tensor | None):
    return library.ChannelTensor(is_float=tensor is not None and tensor.dtype == torch.float32)
