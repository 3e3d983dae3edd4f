"""Group norm, addend before and SiLU after, of PyTorch's own CPU kernels; the reference on any other device.

native_group_norm takes the variance of a channels_last tensor as E[x^2] - E[x]^2, which cancels where the mean is
large, and in float32 is less accurate than its own variance of a contiguous one anywhere. There the moments are those
of each channel, by batch norm's two passes, and the groups' follow from them.
"""

import torch
from torch import Tensor

from cnkernels import layout
from cnkernels.group_norm_silu import reference
from cnkernels.group_norm_silu.reference import Gradients

_RUN = 1024  # pixels in one chain of float32 additions, whose rounding grows with its length


def group_norm_silu_fwd(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str | None,
    addend: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    if x.device.type != "cpu":
        # Elsewhere native_group_norm returns the statistics of half precision inputs in half precision.
        return reference.group_norm_silu_fwd(x, groups, weight, bias, eps, activation, addend)
    given = weight, bias, eps, activation, addend
    weight, bias, addend = _wide(x, weight, bias, addend)
    channels_last = layout.is_channels_last(x)
    by_channel = channels_last and x.dtype == torch.float32
    if not by_channel:
        y, mean, rstd = torch.native_group_norm(_shifted(x, addend), weight, bias, *_sizes(x), groups, eps)
        by_channel = channels_last and _mean_dominates(mean, rstd, 8)
    if by_channel:
        mean, rstd = _statistics(x, groups, eps, addend)
    if _mean_dominates(mean, rstd):
        return reference.group_norm_silu_fwd(x, groups, *given)
    if by_channel:
        y = _normalised(x, mean, rstd, weight, bias, addend)
    if activation == "silu":
        torch.ops.aten.silu_(y)
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
    if x.device.type != "cpu" or _mean_dominates(mean, rstd):
        return reference.group_norm_silu_bwd(dy, x, groups, weight, bias, mean, rstd, activation, addend, need)
    wide_weight, wide_bias, wide_addend = _wide(x, weight, bias, addend)
    dz = dy
    if activation == "silu":
        z = _normalised(x, mean, rstd, wide_weight, wide_bias, wide_addend)
        dz = torch.ops.aten.silu_backward.grad_input(dy, z, grad_input=z)
    h = _shifted(x, wide_addend)
    dh, dweight, dbias = torch.ops.aten.native_group_norm_backward(
        dz, h, mean, rstd, wide_weight, *_sizes(x), mean.shape[1], [need[0] or need[3], need[1], need[2]]
    )
    return (
        layout.match(dh, x) if need[0] else None,
        dweight.to(weight.dtype) if need[1] else None,
        dbias.to(bias.dtype) if need[2] else None,
        dh.flatten(2).sum(2, dtype=torch.float32).to(addend.dtype) if need[3] else None,
    )


def _statistics(x: Tensor, groups: int, eps: float, addend: Tensor | None) -> tuple[Tensor, Tensor]:
    """mean and rstd [N, groups] of x + addend, x channels_last: combined exactly from those of runs of pixels."""
    n, channels, pixels = _sizes(x)
    runs = [run for sample in _rows(x) for run in sample.split(_RUN)]
    mean, var = zip(*(torch.batch_norm_update_stats(run, None, None, 0.0) for run in runs), strict=True)
    by_run = (n, -1, channels)
    mean, var = (torch.stack(t).view(by_run).double() for t in (mean, var))  # [N, runs, C]: few enough to be exact
    if addend is not None:
        mean = mean + addend[:, None]
    share = torch.tensor([len(run) for run in runs[: mean.shape[1]]], dtype=torch.float64) / pixels
    share = (share / (channels // groups)).view(1, -1, 1, 1)
    mean, var = (t.view(n, -1, groups, channels // groups) for t in (mean, var))
    mean_of_group = (mean * share).sum((1, 3))  # [N, groups]
    between = (mean - mean_of_group[:, None, :, None]).square()
    rstd = torch.rsqrt(((var + between) * share).sum((1, 3)) + eps)
    return mean_of_group.float(), rstd.float()


def _mean_dominates(mean: Tensor, rstd: Tensor, deviations: float = 64) -> bool:
    """Whether a mean is so many standard deviations from zero that x * scale + shift would cancel."""
    return bool((mean * rstd).abs().amax() > deviations)


def _normalised(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, addend: Tensor | None
) -> Tensor:
    """((x + addend) - mean) * rstd * weight + bias, in x's dtype and format: batch norm with known statistics."""
    n, channels, _ = _sizes(x)
    mean, scale = (t.repeat_interleave(channels // t.shape[1], 1) for t in (mean, rstd))  # [N, C]
    scale = scale if weight is None else scale * weight
    mean = mean if addend is None else mean - addend
    shift = -mean * scale if bias is None else bias - mean * scale
    zero, one, unused = torch.zeros(channels), torch.ones(channels), torch.empty(0)
    y = torch.empty_like(x)
    for source, target, a, b in zip(_images(x), _images(y), scale, shift, strict=True):
        torch.ops.aten.native_batch_norm.out(
            source, a, b, zero, one, False, 0.0, 0.0, out=target, save_mean=unused, save_invstd=unused
        )
    return y


def _images(x: Tensor) -> list[Tensor]:
    """Each sample, as a batch that batch norm reads in place: [H * W, C] if channels_last, else [1, C, pixels]."""
    return list(_rows(x)) if layout.is_channels_last(x) else [sample.flatten(1)[None] for sample in x]


def _rows(x: Tensor) -> Tensor:
    """The pixels of a channels_last image, [N, H * W, C]: a view."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _shifted(x: Tensor, addend: Tensor | None) -> Tensor:
    if addend is None:
        return x
    return x + addend.to(x.dtype).view(*addend.shape, *[1] * (x.dim() - 2))


def _wide(x: Tensor, weight: Tensor | None, bias: Tensor | None, addend: Tensor | None) -> list[Tensor | None]:
    """In float32. A weight makes native_group_norm's statistics float32, and bias has no gradient without one."""
    weight = torch.ones(x.shape[1]) if weight is None else weight
    return [t if t is None else t.float() for t in (weight, bias, addend)]


def _sizes(x: Tensor) -> tuple[int, int, int]:
    """N, C and pixels."""
    return x.shape[0], x.shape[1], x[0, 0].numel()
