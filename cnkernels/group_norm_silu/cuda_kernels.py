"""group_norm_silu on csrc/group_norm_silu*.cu: outputs and workspace, the cut into blocks, the call."""

import math
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
    y = torch.empty_like(x)
    mean = torch.empty((x.shape[0], groups), dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    library = extension.module_for(x.device)
    cut = plan(library, x, groups, "fwd", (x, y))
    partial = None if cut.cluster else mean.new_empty((x.shape[0], groups, cut.splits, 2))
    library, place = extension.prepare(x, y, mean, rstd, partial, weight, bias, addend)
    call = library.GroupNormForward(
        dtype=extension.dtype_of(library, x),
        cut=cut,
        x=x.data_ptr(),
        y=y.data_ptr(),
        mean=mean.data_ptr(),
        rstd=rstd.data_ptr(),
        partial=extension.address(partial),
        weight=_channels(library, weight),
        bias=_channels(library, bias),
        addend=_channels(library, addend),
        eps=eps,
        silu=activation == "silu",
    )
    library.group_norm_silu_fwd(place, call)
    return y, mean, rstd


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
    dy = layout.match(dy, x)
    dx, dweight, dbias, daddend = gradients = tuple(
        torch.empty_like(t) if wanted else None for t, wanted in zip((x, weight, bias, addend), need, strict=True)
    )
    library = extension.module_for(x.device)
    cut = plan(library, x, groups, "bwd", (x, dy, dx))
    samples, channels = x.shape[:2]
    partial = None if cut.cluster else mean.new_empty((samples, groups, cut.splits, 2))
    group_sums = mean.new_empty((samples, groups, 2)) if need[3] else None
    channel_partial = mean.new_empty((samples, cut.splits, 3, channels)) if any(need[1:]) else None
    workspace = (partial, group_sums, channel_partial)
    library, place = extension.prepare(x, dy, mean, rstd, weight, bias, addend, *workspace, *gradients)
    call = library.GroupNormBackward(
        dtype=extension.dtype_of(library, x),
        cut=cut,
        x=x.data_ptr(),
        dy=dy.data_ptr(),
        dx=extension.address(dx),
        mean=mean.data_ptr(),
        rstd=rstd.data_ptr(),
        partial=extension.address(partial),
        group_sums=extension.address(group_sums),
        channel_partial=extension.address(channel_partial),
        weight=_channels(library, weight),
        bias=_channels(library, bias),
        addend=_channels(library, addend),
        dweight=_channels(library, dweight),
        dbias=_channels(library, dbias),
        daddend=_channels(library, daddend),
        silu=activation == "silu",
    )
    library.group_norm_silu_bwd(place, call)
    return gradients


def plan(library: ModuleType, x: Tensor, groups: int, direction: str, tensors: tuple[Tensor | None, ...]):
    """How the launch cuts `x` (csrc/group_norm_slab.cuh): the cluster form where the GPU has it and the slabs fit.

    Args:
        direction: "fwd" or "bwd".
        tensors: those that the kernels read or write in vectors.
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
    is_float = tensor is not None and tensor.dtype == torch.float32
    return library.ChannelTensor(address=extension.address(tensor), is_float=is_float)
