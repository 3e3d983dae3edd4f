"""The strength of the control: a number, one for each sample, or a mask over the image."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import cnkernels
from cnkernels.nn import ZeroConv2d

Scale = float | Tensor


def is_mask(scale: Scale) -> bool:
    """True for a scale that varies over the image: [B, 1, h, w] with more than one pixel."""
    return isinstance(scale, Tensor) and scale.dim() == 4 and scale.shape[2:] != (1, 1)


def check_scale(scale: Scale, batch: int) -> None:
    """Raises ValueError for a mask or a batch of numbers that does not fit the batch."""
    if isinstance(scale, Tensor) and scale.dim() == 4:
        if scale.shape[1] != 1 or scale.shape[0] not in (1, batch) or scale.numel() == 0:
            raise ValueError(
                f"scales has a mask of shape {list(scale.shape)}; expected [{batch}, 1, h, w] or [1, 1, h, w]"
            )
        if not scale.is_floating_point():
            raise ValueError(f"scales has a mask of {scale.dtype}; expected floating point")


def controlled(
    zero_convs: Sequence[ZeroConv2d],
    features: Sequence[Tensor],
    residuals: Sequence[Tensor | None],
    scales: Sequence[Scale],
) -> list[Tensor]:
    """Computes residual + scale * zero_conv(feature) of each output; masks are area-averaged to the features' sizes.

    Only a mask is multiplied outside the fused operation. Where the scale is the number 0, the output is the residual
    itself, or zeros, and nothing is computed; a convolution that is being trained gets its gradient of zero all the
    same.
    """
    layers = list(zip(zero_convs, features, residuals, scales, strict=True))
    off = [_is_off(conv, scale) for conv, _, _, scale in layers]
    computed = iter(_computed([layer for layer, is_off in zip(layers, off, strict=True) if not is_off]))
    return [_uncontrolled(*layer[:3]) if is_off else next(computed) for layer, is_off in zip(layers, off, strict=True)]


def _is_off(conv: ZeroConv2d, scale: Scale) -> bool:
    trained = torch.is_grad_enabled() and conv.weight.requires_grad
    return not isinstance(scale, Tensor) and scale == 0 and not trained


def _uncontrolled(conv: ZeroConv2d, feature: Tensor, residual: Tensor | None) -> Tensor:
    n, _, *size = feature.shape
    return feature.new_zeros(n, conv.out_channels, *size) if residual is None else residual


def _computed(layers: Sequence[tuple[ZeroConv2d, Tensor, Tensor | None, Scale]]) -> list[Tensor]:
    if not layers:
        return []
    convs, features, residuals, scales = zip(*layers, strict=True)
    masked = [is_mask(scale) for scale in scales]
    outputs = cnkernels.zero_conv_add_group(
        features,
        [conv.weight for conv in convs],
        [conv.bias for conv in convs],
        [None if mask else residual for residual, mask in zip(residuals, masked, strict=True)],
        [1.0 if mask else _one_pixel(scale) for scale, mask in zip(scales, masked, strict=True)],
    )
    return [
        _masked(output, residual, scale) if mask else output
        for output, residual, scale, mask in zip(outputs, residuals, scales, masked, strict=True)
    ]


def _one_pixel(scale: Scale) -> Scale:
    """Reduces a mask of one pixel to its numbers."""
    return scale.reshape(()) if isinstance(scale, Tensor) and scale.shape == (1, 1, 1, 1) else scale


def _masked(output: Tensor, residual: Tensor | None, mask: Tensor) -> Tensor:
    mask = F.interpolate(mask.float(), size=output.shape[2:], mode="area").to(output)
    return mask * output if residual is None else torch.addcmul(residual, mask, output)


def for_both_halves(
    scales: Scale | Sequence[Scale], batch: int, device: torch.device, *, conditional_only: bool
) -> Scale | list[Scale]:
    """Doubles the scales of a batch for guidance's [unconditional, conditional] batch.

    Args:
        scales: one for all outputs of the ControlNet or a list with one for each: a number, or a tensor 0-d, [batch],
            [batch, 1, h, w] or [1, 1, h, w].
        conditional_only: leave the first half uncontrolled.
    Numbers that are the same for both halves stay numbers.
    """
    if isinstance(scales, (list, tuple)):
        return [for_both_halves(scale, batch, device, conditional_only=conditional_only) for scale in scales]
    shared = not isinstance(scales, Tensor) or scales.dim() == 0 or scales.shape[0] == 1
    if shared and not conditional_only:
        return scales
    row = torch.as_tensor(scales, dtype=torch.float32, device=device)
    row = row.expand(batch, *row.shape[1:])
    return torch.cat([torch.zeros_like(row) if conditional_only else row, row])
