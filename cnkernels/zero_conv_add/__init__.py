"""ControlNet's zero convolution, its scale and the skip connection that it is added to, as one matrix product."""

import torch
from torch import Tensor

from cnkernels import register
from cnkernels.zero_conv_add import registration


def zero_conv_add(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    scale: float | Tensor = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """A 1x1 convolution, scaled and added to a residual.

        out[n, o, p] = residual[n, o, p] + scale[n] * (sum_c weight[o, c] * x[n, c, p] + bias[o])

    Args:
        x: [N, Cin, H, W], float32, float16, bfloat16 or float64. Contiguous and channels_last are read as they are;
            any other layout is copied once.
        weight: [Cout, Cin, 1, 1], of x's dtype.
        bias: [Cout] or None, of x's dtype.
        residual: [N, Cout, H, W] or None, of x's dtype; copied once if its memory format is not x's.
        scale: a float, or a floating point tensor of shape [], [N] or [N, 1, 1, 1] on x's device: read on the device,
            so that changing it recompiles nothing.
        out: None, or where to write: [N, Cout, H, W], of x's dtype, with evenly strided pixels, such as a channel slice
            of a larger channels_last tensor. It overlaps no other argument. Not differentiable.

    Returns:
        `out`, or a new tensor of x's dtype and memory format.

    Raises:
        ValueError: an argument does not fit; the message names it, what was expected and what came.

    Notes:
        Differentiable in x, weight, bias, residual and scale; only the gradients asked for are computed, and all are
        deterministic; the gradient of `residual` is the upstream gradient itself. Saved for backward: weight, bias,
        scale, and x where weight or scale needs a gradient. Under autocast x, weight, bias and residual are cast to
        autocast's dtype.
        Zhang et al., "Adding Conditional Control to Text-to-Image Diffusion Models", 2023.
    """
    x, weight, bias, residual = register.autocast(x, weight, bias, residual)
    if torch.compiler.is_compiling() and not isinstance(scale, Tensor):
        # A Python float that reaches an op is burnt into the graph; one that multiplies a tensor stays symbolic.
        scale = torch.ones((), device=x.device) * scale
    factor, scale = (1.0, scale) if isinstance(scale, Tensor) else (scale, None)
    if out is None:
        return torch.ops.cnkernels.zero_conv_add(x, weight, bias, residual, scale, factor)
    registration.expect_no_gradient(x, weight, bias, residual, scale)
    torch.ops.cnkernels.zero_conv_add_out(x, weight, bias, residual, scale, factor, out)
    return out
