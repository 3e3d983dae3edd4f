"""Attention in plain PyTorch: the definition that every other backend is checked against.

It materialises the [B, H, Sq, Sk] probabilities and computes in float32 (float64 inputs stay float64).
"""

import torch


def attention_fwd(q, k, v, scale):
    """Compute softmax(scale * q @ k^T) @ v and the log-sum-exp of every row of logits.

    Args:
        q: [B, Sq, H, D], any floating dtype, any strides.
        k, v: [B, Sk, H, D], dtype of q.
        scale: float multiplied into the logits.

    Returns:
        out [B, Sq, H, D], contiguous, q's dtype; lse [B, H, Sq], natural logarithm, float32 (float64 iff q is float64).
    """
    compute = _compute_dtype(q)
    logits = _logits(q, k, scale, compute)  # [B, H, Sq, Sk]
    lse = torch.logsumexp(logits, dim=-1)  # [B, H, Sq]
    out = torch.softmax(logits, dim=-1) @ _heads_first(v, compute)  # [B, H, Sq, D]
    return _heads_inside(out, q.dtype), lse


def attention_bwd(dout, q, k, v, out, lse, scale, need):
    """Gradients of attention_fwd's out with respect to those of q, k, v that `need` asks for.

    With P = softmax(logits) and dP = dout @ v^T:
        dv = P^T @ dout,  dS = P * (dP - rowsum(P * dP)),  dq = scale * dS @ k,  dk = scale * dS^T @ q.

    Args:
        dout: [B, Sq, H, D], q's dtype, any strides.
        q, k, v, scale: as given to attention_fwd; out, lse: what it returned.
        need: three bools for (q, k, v).

    Returns:
        (dq, dk, dv), contiguous, in the shape and dtype of their tensor; None where `need` is False.

    Notes:
        rowsum(P * dP) equals rowsum(out * dout), but without the rounding of out to its dtype.
    """
    need_q, need_k, need_v = need
    compute = _compute_dtype(q)
    dout = _heads_first(dout, compute)  # [B, H, Sq, D]
    p = torch.softmax(_logits(q, k, scale, compute), dim=-1)  # [B, H, Sq, Sk]; without the rounding of lse
    dq = dk = dv = None
    if need_v:
        dv = _heads_inside(p.transpose(-1, -2) @ dout, v.dtype)
    if need_q or need_k:
        dp = dout @ _heads_first(v, compute).transpose(-1, -2)  # [B, H, Sq, Sk]
        ds = p * (dp - (p * dp).sum(dim=-1, keepdim=True)) * scale
        if need_q:
            dq = _heads_inside(ds @ _heads_first(k, compute), q.dtype)
        if need_k:
            dk = _heads_inside(ds.transpose(-1, -2) @ _heads_first(q, compute), k.dtype)
    return dq, dk, dv


def _compute_dtype(tensor):
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _heads_first(tensor, dtype):
    return tensor.to(dtype).transpose(1, 2)  # [B, H, S, D]


def _heads_inside(tensor, dtype):
    return tensor.transpose(1, 2).to(dtype).contiguous()  # [B, S, H, D]


def _logits(q, k, scale, dtype):
    return _heads_first(q, dtype) @ _heads_first(k, dtype).transpose(-1, -2) * scale
