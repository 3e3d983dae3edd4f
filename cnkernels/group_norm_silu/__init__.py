"""Group normalisation, with an addend before it and SiLU after it in the same pass."""

import torch
from torch import Tensor

from cnkernels import plans
from cnkernels.group_norm_silu import registration


def group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str | None = "silu",
    addend: Tensor | None = None,
) -> Tensor:
    """Group norm of `x + addend`, then SiLU.

        h = x + addend[:, :, None, ...]
        z = (h - mean) / sqrt(var + eps) * weight + bias        mean, biased var over the channels and pixels of a group
        y = z * sigmoid(z)                                      (y = z when `activation` is None)

    Args:
        x: [N, C, *spatial], float32, float16, bfloat16 or float64. Contiguous and channels_last are read as they are;
            any other layout is copied once.
        groups: number of groups; divides C.
        weight, bias: [C] or None, of x's dtype or float32.
        eps: added to the variance.
        activation: "silu" or None.
        addend: [N, C] or None, of x's dtype or float32: added before the norm, such as a timestep embedding.

    Returns:
        y, of x's shape, dtype and memory format. Statistics are float32 (float64 for float64).

    Raises:
        ValueError: an argument does not fit; the message names it, what was expected and what came.

    Notes:
        Differentiable in x, weight, bias and addend; only the gradients asked for are computed, and all are
        deterministic. Saved for backward: x, mean, rstd (and the parameters). Under autocast x keeps its own dtype.
        Wu and He, "Group Normalization", 2018.
    """
    plain = type(groups) is int and type(eps) is float and (activation is None or type(activation) is str)
    if not (plain and plans.straight(x, weight, bias, addend)):
        return torch.ops.cnkernels.group_norm_silu(x, groups, weight, bias, eps, activation, addend)[0]
    if plans.recorded(x, weight, bias, addend):
        return registration.Eager.record(x, groups, weight, bias, eps, activation, addend)
    return registration.forward(x, groups, weight, bias, eps, activation, addend)[0]
