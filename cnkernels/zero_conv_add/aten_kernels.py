"""residual + scale * (1x1 convolution + bias) of PyTorch's own kernels: one matrix product, then one pass."""

import torch
from torch import Tensor

from cnkernels import layout, onednn
from cnkernels.zero_conv_add import reference

Scale = float | Tensor


def zero_conv_add_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, scale: Scale, out: Tensor | None = None
) -> Tensor:
    y = _conv1x1(*_computable(x, weight, bias))
    if out is None:
        out = torch.empty_like(y, dtype=x.dtype)
    scale = _broadcast(scale)
    if residual is None:
        return torch.mul(y, scale, out=out)
    if isinstance(scale, Tensor):
        return torch.addcmul(residual, y, scale, out=out)
    return torch.add(residual, y, alpha=scale, out=out)


def zero_conv_add_bwd(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, scale: Scale, need: tuple[bool, bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """As the reference's."""
    dx = dweight = dbias = dscale = None
    if need[3]:  # rarely asked for
        *_, dscale = reference.zero_conv_add_bwd(dout, x, weight, bias, scale, (False, False, False, True))
    if not any(need[:3]):
        return None, None, None, dscale
    channels_last = layout.is_channels_last(x)
    dout = dout.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    factor = _broadcast(scale)
    scaled = dout if not isinstance(factor, Tensor) and factor == 1 else (dout * factor).to(dout.dtype)
    scaled, wide_x, wide_weight = _computable(scaled, x, weight)
    if need[0]:
        dx = layout.match(_conv1x1(scaled, wide_weight.transpose(0, 1).contiguous(), None).to(x.dtype), x)
    if need[1]:
        dweight = _weight_gradient(scaled, wide_x).to(weight.dtype).view(weight.shape)
    if need[2]:
        dbias = scaled.sum((0, 2, 3), dtype=torch.float32).to(bias.dtype)
    return dx, dweight, dbias, dscale


def _conv1x1(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In x's memory format."""
    if not layout.is_channels_last(x):
        return onednn.conv1x1(x, weight, bias)
    n, _, height, width = x.shape
    y = onednn.linear(_rows(x), weight.flatten(1), bias)
    return y.view(n, height, width, weight.shape[0]).permute(0, 3, 1, 2)


def _weight_gradient(dout: Tensor, x: Tensor) -> Tensor:
    """[N, Cout, H, W], [N, Cin, H, W] in the same memory format -> [Cout, Cin]."""
    if layout.is_channels_last(x):
        return _rows(dout).t() @ _rows(x)
    # Samples are added in float32: a product of half precision would be rounded once for each.
    products = torch.bmm(dout.flatten(2), x.flatten(2).transpose(1, 2))
    return products.sum(0, dtype=torch.float32)


def _rows(x: Tensor) -> Tensor:
    """The pixels of a channels_last image, [N * H * W, C]: a view."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _computable(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Widened on a CPU that has no product of their dtype: PyTorch's would be a plain loop."""
    first = tensors[0]
    if first.device.type != "cpu" or onednn.serves(first):
        return tensors
    return tuple(t if t is None else t.float() for t in tensors)


def _broadcast(scale: Scale) -> Scale:
    """Over [N, C, H, W]. On a CPU a single factor is read: it costs no synchronisation there."""
    if not isinstance(scale, Tensor):
        return scale
    if scale.dim() == 0:
        return scale.item() if scale.device.type == "cpu" else scale
    return scale.view(-1, 1, 1, 1)
