"""ControlNet's zero convolution, its scale and the skip connection that it is added to, as one matrix product."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cnkernels import plans, register
from cnkernels.register import expect
from cnkernels.zero_conv_add import group, registration


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
    scale, factor = _tensor_or_factor(scale, x)
    given = (x, weight, bias, residual, scale)
    straight = type(factor) is float and plans.straight(*given, out)
    if out is None:
        if not straight:
            return torch.ops.cnkernels.zero_conv_add(*given, factor)
        recorded = plans.recorded(*given)
        return registration.Eager.record(*given, factor) if recorded else registration.forward(*given, factor)
    registration.expect_no_gradient("zero_conv_add", "out", *given)
    if straight:
        registration.forward_out(*given, factor, out)
    else:
        torch.ops.cnkernels.zero_conv_add_out(*given, factor, out)
    return out


def zero_conv_add_group(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    residuals: Sequence[Tensor | None] | None = None,
    scales: float | Tensor | Sequence[float | Tensor] = 1.0,
    outs: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """`zero_conv_add` for several layers, such as all of a ControlNet's; on the cuda backend in one launch.

        outs[i] = zero_conv_add(xs[i], weights[i], biases[i], residuals[i], scales[i])

    Args:
        xs, weights, biases, residuals, outs: for each layer what `zero_conv_add` takes, all of one dtype and device; a
            layer may lack its bias or residual, and a list may be None as a whole.
        scales: one for all layers or one for each.
        outs: no two of them overlap, nor does one overlap an argument of any layer. Not differentiable.

    Returns:
        `outs`, or new tensors, each of the dtype and memory format of its x.

    Raises:
        ValueError: an argument does not fit; the message names it, its layer, what was expected and what came.

    Notes:
        Gradients, what is saved for them, and autocast are as in `zero_conv_add`, layer by layer; a layer whose output
        has no gradient costs nothing. One backend serves the group: the one that serves its largest layer. More than
        16 layers, or layers of both memory formats, take one launch for each 16 and each format.
    """
    count = len(xs)
    expect(count > 0, "zero_conv_add_group", "xs", "of at least one layer", "none")
    scales = scales if isinstance(scales, Sequence) else [scales] * count
    columns = {"xs": xs, "weights": weights, "biases": biases, "residuals": residuals, "scales": scales, "outs": outs}
    for name, column in columns.items():
        fits = column is None or len(column) == count
        expect(fits, "zero_conv_add_group", name, f"of {count} entries, as `xs` is", column if fits else len(column))
    biases, residuals = ([None] * count if column is None else column for column in (biases, residuals))
    layers = [register.autocast(*layer) for layer in zip(xs, weights, biases, residuals, strict=True)]
    tensors, factors = zip(*map(_tensor_or_factor, scales, xs), strict=True)
    rows = [(*layer, tensor, factor) for layer, tensor, factor in zip(layers, tensors, factors, strict=True)]
    flat = [t for row in rows for t in row[:5]]
    straight = all(type(factor) is float for factor in factors) and plans.straight(*flat, *(outs or ()))
    if outs is not None:
        registration.expect_no_gradient("zero_conv_add_group", "outs", *flat)
    if not straight:
        return _through_dispatcher(rows, factors, outs)
    if outs is not None:
        group.forward_out(rows, outs)
        return list(outs)
    return list(group.Eager.apply(rows, *flat)) if plans.recorded(*flat) else group.forward(rows)


def _through_dispatcher(rows: list[tuple], factors: Sequence[float], outs: Sequence[Tensor] | None) -> list[Tensor]:
    lists, given = group.pack([*zip(*(row[:5] for row in rows), strict=True)])
    if outs is None:
        return torch.ops.cnkernels.zero_conv_add_group(*lists, given, factors)
    torch.ops.cnkernels.zero_conv_add_group_out(*lists, given, factors, outs)
    return list(outs)


def _tensor_or_factor(scale: float | Tensor, x: Tensor) -> tuple[Tensor | None, float]:
    """The scale as an op takes it: a tensor, or else a float."""
    if isinstance(scale, Tensor):
        return scale, 1.0
    if torch.compiler.is_compiling():
        # A Python float that reaches an op is burnt into the graph; one that multiplies a tensor stays symbolic.
        return torch.ones((), device=x.device) * scale, 1.0
    return None, float(scale) if type(scale) is int else scale
