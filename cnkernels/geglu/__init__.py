"""The gated linear unit of the transformer's feed-forward: value * gelu(gate), from one packed projection."""

import torch
from torch import Tensor

from cnkernels import plans
from cnkernels.geglu import registration


def geglu(projected: Tensor) -> Tensor:
    """Splits the last dimension into value and gate, and gates.

        value, gate = projected.chunk(2, dim=-1)
        out = value * gate * 0.5 * (1 + erf(gate / sqrt(2)))        (the exact GELU, not the tanh approximation)

    Args:
        projected: [..., 2C], float32, float16, bfloat16 or float64; copied once
            unless its last dimension is contiguous.

    Returns:
        out, [..., C], contiguous, of projected's dtype.

    Raises:
        ValueError: an argument does not fit; the message names it, what was expected and what came.

    Notes:
        Differentiable, deterministic; saves only `projected`. Under autocast it runs in the dtype of `projected`.
        Shazeer, "GLU Variants Improve Transformer", 2020.
    """
    if not plans.straight(projected):
        return torch.ops.cnkernels.geglu(projected)
    return registration.Eager.record(projected) if plans.recorded(projected) else registration.forward(projected)
