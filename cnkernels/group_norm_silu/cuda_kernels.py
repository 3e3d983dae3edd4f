"""group_norm_silu on csrc/group_norm_silu*.cu: outputs and workspace, the cut into blocks, the call."""

import math
from types import ModuleType

import torch
from torch import Tensor

from cnkernels import extension, layout

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]

_MAX_THREADS = 256
_MAX_CLUSTER = 8  # the largest that every GPU with clusters schedules
_SECTOR = 32  # bytes: what global memory moves at least
_CLUSTER_SHARED = 200 * 1024  # bytes per block, under sm_90's 227 KiB


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
    cut = plan(library, x, groups, library.group_norm_silu_fwd_shared, (x, y))
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
    cut = plan(library, x, groups, library.group_norm_silu_bwd_shared, (x, dy, dx))
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


def plan(library: ModuleType, x: Tensor, groups: int, shared_bytes, tensors: tuple[Tensor | None, ...]):
    """How the launch cuts `x` (csrc/group_norm_slab.cuh): the cluster form where the GPU has it and the slabs fit.

    Args:
        shared_bytes: (dtype, cut) -> bytes of shared memory per block of the cluster form.
        tensors: those that the kernels read or write in vectors.
    """
    samples, channels = x.shape[:2]
    positions = x.numel() // (samples * channels)
    channels_last = layout.is_channels_last(x)
    vector = 16 // x.element_size()
    row = channels if channels_last else positions
    vectors = row % vector == 0 and all(t is None or t.data_ptr() % 16 == 0 for t in tensors)
    span = _span(channels, channels // groups, x.element_size(), vector if vectors else 1, channels_last)
    cut = library.GroupNormCut(
        samples=samples,
        channels=channels,
        positions=positions,
        groups=groups,
        span=span,
        threads=_threads(span, channels_last),
        channels_last=channels_last,
        vectors=vectors,
    )
    slabs = samples * math.ceil(channels / span)
    dtype = extension.dtype_of(library, x)
    if vectors and _has_clusters(library, x.device):
        cut.cluster = True
        for size in (1, 2, 4, _MAX_CLUSTER):
            cut.splits = size
            fits = shared_bytes(dtype, cut) <= _CLUSTER_SHARED
            if fits and (
                slabs * size >= extension.multiprocessors(x.device) or size * 64 >= positions or size == _MAX_CLUSTER
            ):
                return cut
    cut.cluster = False
    enough = 4 * extension.multiprocessors(x.device) // slabs  # blocks per slab that fill the GPU
    cut.splits = max(1, min(enough, positions // 64, 64))
    return cut


def _span(channels: int, group: int, itemsize: int, vector: int, channels_last: bool) -> int:
    """Channels per block: one group where its positions lie together, else whole groups that are whole sectors too."""
    if not channels_last:
        return group
    for unit in (math.lcm(group, _SECTOR // itemsize), math.lcm(group, vector)):
        if vector > 1 and channels % unit == 0:
            return unit
    if vector > 1:
        return channels
    return min(channels, group * max(1, _SECTOR // itemsize // group))


def _threads(span: int, channels_last: bool) -> int:
    """All of them, or in the contiguous format a warp per channel such that the rounds over a group come out even."""
    if channels_last:
        return _MAX_THREADS
    warps = _MAX_THREADS // 32
    return 32 * math.ceil(span / math.ceil(span / warps))


def _has_clusters(library: ModuleType, device: torch.device) -> bool:
    """On sm_90 and later, if compiled for it; and in the CPU execution, so that the cluster form is tested."""
    if device.type == "cpu":
        return True
    major, minor = torch.cuda.get_device_capability(device)
    compiled = (int(arch.rstrip("af")) for arch in library.architectures.split(";"))
    return any(90 <= arch <= 10 * major + minor for arch in compiled)


def _channels(library: ModuleType, tensor: Tensor | None):
    is_float = tensor is not None and tensor.dtype == torch.float32
    return library.ChannelTensor(address=extension.address(tensor), is_float=is_float)
