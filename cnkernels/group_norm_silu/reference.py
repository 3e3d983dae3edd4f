"""Group norm, addend before and SiLU after, in plain PyTorch. Computed in float32 (float64 in, float64 out)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from cnkernels import layout

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def group_norm_silu_fwd(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str | None,
    addend: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    h = _shifted(x, addend)  # [N, C, *spatial]
    var, mean = torch.var_mean(_by_group(h, groups), dim=(2, 3), correction=0)  # [N, groups]
    rstd = torch.rsqrt(var + eps)
    z = _affine(_normed(h, mean, rstd), weight, bias)
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
    h, dz = _shifted(x, addend), _wide(dy, x)
    normed = _normed(h, mean, rstd)
    if activation == "silu":
        z = _affine(normed, weight, bias)
        gate = torch.sigmoid(z)
        dz = dz * gate * (1 + z * (1 - gate))
    over_pixels = (0, *range(2, x.dim()))
    dweight = (dz * normed).sum(over_pixels).to(weight.dtype) if need[1] else None
    dbias = dz.sum(over_pixels).to(bias.dtype) if need[2] else None
    if not (need[0] or need[3]):
        return None, dweight, dbias, None
    dnormed, normed = (_by_group(t, groups) for t in (_affine(dz, weight, None), normed))
    mean_d = dnormed.mean((2, 3), keepdim=True)
    mean_dn = (dnormed * normed).mean((2, 3), keepdim=True)
    dh = ((dnormed - mean_d - normed * mean_dn) * rstd[..., None, None]).reshape(x.shape)
    dx = layout.match(dh.to(x.dtype), x) if need[0] else None
    daddend = dh.flatten(2).sum(2).to(addend.dtype) if need[3] else None
    return dx, dweight, dbias, daddend


def statistics_as_functions(x: Tensor, groups: int, addend: Tensor | None, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and this rstd, [N, groups], as differentiable functions of x and addend; rstd says what eps was."""
    var, mean = torch.var_mean(_by_group(_shifted(x, addend), groups), dim=(2, 3), correction=0)
    eps = (rstd**-2 - var).detach()
    return mean, torch.rsqrt(var + eps)


def _wide(t: Tensor, like: Tensor) -> Tensor:
    return t.to(torch.float64 if like.dtype == torch.float64 else torch.float32)


def _shifted(x: Tensor, addend: Tensor | None) -> Tensor:
    """x + addend[n, c], widened."""
    h = _wide(x, x)
    return h if addend is None else h + _wide(addend, x).reshape(*addend.shape, *[1] * (x.dim() - 2))


def _by_group(h: Tensor, groups: int) -> Tensor:
    return h.reshape(h.shape[0], groups, h.shape[1] // groups, -1)  # [N, groups, C / groups, pixels]


def _normed(h: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    return ((_by_group(h, mean.shape[1]) - mean[..., None, None]) * rstd[..., None, None]).reshape(h.shape)


def _affine(h: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    per_channel = (1, -1, *[1] * (h.dim() - 2))
    h = h if weight is None else h * _wide(weight, h).reshape(per_channel)
    return h if bias is None else h + _wide(bias, h).reshape(per_channel)
