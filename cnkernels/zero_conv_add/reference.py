"""residual + scale * (1x1 convolution + bias) in plain PyTorch. Computed in float32 (float64 in, float64 out)."""

import torch
from torch import Tensor

from cnkernels import layout

Scale = float | Tensor


def zero_conv_add_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, scale: Scale, out: Tensor | None = None
) -> Tensor:
    y = _scaled(_conv1x1(_wide(x), _wide(weight), bias), scale)
    if residual is not None:
        y = y + _wide(residual)
    return layout.match(y.to(x.dtype), x) if out is None else out.copy_(y)


def zero_conv_add_bwd(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, scale: Scale, need: tuple[bool, bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of (x, weight, bias, scale), None where not needed. The residual's is `dout` itself."""
    dtype, dout, wide_x, wide_weight = x.dtype, _wide(dout), _wide(x), _wide(weight)
    scaled = _scaled(dout, scale)  # [N, Cout, H, W]
    dx = dweight = dbias = dscale = None
    if need[0]:
        dx = layout.match(_conv1x1(scaled, wide_weight.transpose(0, 1), None).to(dtype), x)
    if need[1]:
        dweight = torch.matmul(scaled.flatten(2), wide_x.flatten(2).transpose(1, 2)).sum(0)  # [Cout, Cin]
        dweight = dweight.to(weight.dtype).view(weight.shape)
    if need[2]:
        dbias = scaled.sum((0, 2, 3)).to(bias.dtype)
    if need[3]:
        dscale = (dout * _conv1x1(wide_x, wide_weight, bias)).sum((1, 2, 3))  # [N]
        dscale = (dscale if scale.dim() else dscale.sum()).to(scale.dtype)
    return dx, dweight, dbias, dscale


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.float64 if t.dtype == torch.float64 else torch.float32)


def _scaled(y: Tensor, scale: Scale) -> Tensor:
    """y times a float, a 0-d tensor or one factor for each sample."""
    if not isinstance(scale, Tensor):
        return y if scale == 1 else y * scale
    scale = scale.to(y.dtype)
    return y * (scale.view(-1, 1, 1, 1) if scale.dim() else scale)


def _conv1x1(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # A matmul, not F.conv2d: cuDNN may run a float32 convolution in TF32, which would be no reference.
    if layout.is_channels_last(x):
        y = torch.matmul(x.permute(0, 2, 3, 1), weight.flatten(1).t()).permute(0, 3, 1, 2)
    else:
        n, _, height, width = x.shape
        y = torch.matmul(weight.flatten(1), x.flatten(2)).view(n, weight.shape[0], height, width)
    return y if bias is None else y + bias.to(y.dtype).view(1, -1, 1, 1)
