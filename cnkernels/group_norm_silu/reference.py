"""Group norm, addend before and SiLU after, in plain PyTorch. Computed in float32 (float64 in, float64 out)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from cnkernels import layout

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _wide(t: Tensor | None, like: Tensor) -> Tensor | None:
    return None if t is None else t.to(torch.float64 if like.dtype == torch.float64 else torch.float32)


def _shifted(x: Tensor, addend: Tensor | None) -> Tensor:
    """x + addend[n, c], widened."""
    h = _wide(x, x)
    return h if addend is None else h + _wide(addend, x).reshape(*addend.shape, *[1] * (x.dim() - 2))


def group_norm_silu_fwd(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str | None,
    addend: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    n, channels = x.shape[:2]
    h = _shifted(x, addend)  # [N, C, *spatial]
    z, mean, rstd = torch.native_group_norm(
        h, _wide(weight, x), _wide(bias, x), n, channels, h.numel() // (n * channels), groups, eps
    )
    y = F.silu(z) if activation == "silu" else z
    return layout.match(y.to(x.dtype), x), mean, rstd


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
    n, channels = x.shape[:2]
    per_channel = (1, channels, *[1] * (x.dim() - 2))
    per_group = (n, groups, channels // groups, -1)
    h, dz = _shifted(x, addend), _wide(dy, x)
    normed = ((h.reshape(per_group) - mean[..., None, None]) * rstd[..., None, None]).reshape(x.shape)
    if activation == "silu":
        z = normed if weight is None else normed * _wide(weight, x).reshape(per_channel)
        z = z if bias is None else z + _wide(bias, x).reshape(per_channel)
        gate = torch.sigmoid(z)
        dz = dz * gate * (1 + z * (1 - gate))
    over_pixels = (0, *range(2, x.dim()))
    dweight = (dz * normed).sum(over_pixels).to(weight.dtype) if need[1] else None
    dbias = dz.sum(over_pixels).to(bias.dtype) if need[2] else None
    if not (need[0] or need[3]):
        return None, dweight, dbias, None
    dnormed = dz if weight is None else dz * _wide(weight, x).reshape(per_channel)
    dnormed, normed = dnormed.reshape(per_group), normed.reshape(per_group)
    mean_d = dnormed.mean((2, 3), keepdim=True)
    mean_dn = (dnormed * normed).mean((2, 3), keepdim=True)
    dh = ((dnormed - mean_d - normed * mean_dn) * rstd[..., None, None]).reshape(x.shape)
    dx = layout.match(dh.to(x.dtype), x) if need[0] else None
    daddend = dh.flatten(2).sum(2).to(addend.dtype) if need[3] else None
    return dx, dweight, dbias, daddend
