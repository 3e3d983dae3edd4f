"""Scaled dot-product attention on [B, S, H, D] tensors, for any head dimension."""

import torch
from torch import Tensor

from cnkernels import plans, register
from cnkernels.attention import registration


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Softmax attention of every head.

        out[b, :, h] = softmax(scale * q[b, :, h] @ k[b, :, h]^T) @ v[b, :, h]

    Args:
        q: [B, Sq, H, D], float32, float16, bfloat16 or float64.
        k, v: [B, Sk, H, D], of q's dtype. Sq and Sk are independent; Sk >= 1.
            q, k and v are read in place whatever their strides (a slice of a packed projection, a transposed view),
            as long as the last dimension has stride 1; otherwise they are copied once.
        scale: multiplies the scores; D ** -0.5 when None.

    Returns:
        out, [B, Sq, H, D], contiguous, of q's dtype.

    Raises:
        ValueError: an argument does not fit; the message names it, what was expected and what came.

    Notes:
        Differentiable in q, k and v; only the gradients asked for are computed, and all are deterministic.
        Saved for backward: q, k, v, out and the log-sum-exp of each row (float32).
        Under autocast q, k and v are cast to autocast's dtype.
        Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; Dao et al., "FlashAttention", 2022.
    """
    q, k, v = register.autocast(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if type(scale) is not float or not plans.straight(q, k, v):
        return torch.ops.cnkernels.attention(q, k, v, scale)[0]
    if plans.recorded(q, k, v):
        return registration.Eager.record(q, k, v, scale)
    return registration.forward(q, k, v, scale)[0]
