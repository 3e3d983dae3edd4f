"""Attention of PyTorch's own kernels. On a CPU its flash attention forward, and backward head by head in float32.

Results that are not finite are computed again by the reference's formulas, all heads together: flash attention has NaN
in other places. Its backward is not used: it takes probabilities from the rounded log-sum-exp.

In bfloat16 most of the time goes into exponentials and their passes over memory; `_fwd_fused` has none, where the CPU
has products of bfloat16. Softmax needs exp(s - c) with any c of a row, if nothing overflows and nothing that counts
underflows; for t well below zero sigmoid(t) is exp(t); and oneDNN takes a sigmoid of a product's accumulators. So
exp(s - c) comes out of the product q k^T itself, where c is one more column of q beside a column of ones of k. In
float32 this would lose the digits that s - c has before its point.

Which is faster depends on the processor and on how busy its caches are: a rule decides, or `cnkernels.tune`.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cnkernels import onednn
from cnkernels.attention import reference
from cnkernels.configurations import rule

_flash_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BLOCK = 1 << 19  # scores of one block, for each thread
_MANY = 512  # fewer queries or keys do not repay what `_fused_operands` costs
_DEPTH = 8.0  # sigmoid(t) for t <= -8 is exp(t) to a fifth of a rounding of bfloat16
_LEAST = 87.0  # exp(-87) is the last that bfloat16, as float32, holds as a normal number
_FEW = 1 << 16  # scores of a head: with fewer, going head by head takes longer than computing
_SCORES = 1 << 25  # that are there at once where all heads go together
_EVEN = 256.0  # up to here bfloat16 rounds c by no more than a half


def attention_fwd(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return attention_fwd_plan(q, k, v, scale)(q, k, v, scale)


def attention_fwd_plan(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Callable[..., tuple[Tensor, Tensor]]:
    """The implementation for tensors like these."""
    if q.device.type != "cpu":
        return _fwd_together
    return _fwd_fused if implementation_of(q, k).fused else _fwd_flash


@dataclass(frozen=True)
class Implementation:
    """Of a forward pass on a CPU."""

    fused: bool  # else PyTorch's flash attention


@rule("attention on a CPU", lambda own, *_: [Implementation(False)] if own.fused else [])
def implementation_of(q: Tensor, k: Tensor) -> Implementation:
    """Fused in bfloat16, where the CPU has products of it, for many queries and keys."""
    many = min(q.shape[1], k.shape[1]) >= _MANY
    return Implementation(q.dtype == torch.bfloat16 and onednn.serves(q) and many)


def _fwd_flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = _flash_attention(*(t.transpose(1, 2) for t in (q, k, v)), scale=scale)
    if not (lse.sum() + out.sum(dtype=torch.float32)).isfinite().item():
        return _fwd_together(q, k, v, scale)
    return out.transpose(1, 2).contiguous(), lse.contiguous()


def attention_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, need: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if _go_together(q, k):
        return _bwd_together(dout, q, k, v, out, lse, scale, need)
    gradients = tuple(
        torch.empty(t.shape, dtype=t.dtype) if wanted else None for t, wanted in zip((q, k, v), need, strict=True)
    )
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            one_head = _bwd_of_head(*(t[b, :, h].float().contiguous() for t in (dout, q, k, v)), scale, need)
            for whole, part in zip(gradients, one_head, strict=True):
                if whole is not None:
                    whole[b, :, h] = part
    return gradients


def _go_together(q: Tensor, k: Tensor) -> bool:
    """Whether all heads go together: on another device, and where a head is small."""
    return q.device.type != "cpu" or q.shape[1] * k.shape[1] < _FEW


def _bwd_of_head(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, need: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of [S, D] float32 tensors, by the reference's formulas; zero where not needed."""
    dq, dk, dv = (torch.zeros_like(t) for t in (q, k, v))
    k_by_dim = k.t().contiguous()
    for block in _blocks(q, k):
        p = torch.softmax(onednn.linear(q[block], k).mul_(scale), 1)
        if need[2]:
            dv.addmm_(p.t(), dout[block])
        if not (need[0] or need[1]):
            continue
        dp = onednn.linear(dout[block], v)
        ds = dp.sub_((p * dp).sum(1, keepdim=True)).mul_(p).mul_(scale)
        if need[0]:
            dq[block] = onednn.linear(ds, k_by_dim)
        if need[1]:
            dk.addmm_(ds.t(), q[block])
    return dq, dk, dv


def _blocks(q: Tensor, k: Tensor) -> list[slice]:
    """Rows of q whose scores with all of k make one block."""
    rows = max(64, _BLOCK * torch.get_num_threads() // k.shape[0])
    return [slice(first, first + rows) for first in range(0, q.shape[0], rows)]


def _fwd_fused(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    *operands, fusible = _fused_operands(q, k, v, scale)
    if not fusible.any():
        return _fwd_flash(q, k, v, scale)
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
    for (b, h), fits in zip(itertools.product(*map(range, lse.shape[:2])), fusible.flatten().tolist(), strict=True):
        if fits:
            _fused_head(*(t[b, h] for t in operands), out[b, :, h], lse[b, h])
        else:
            one = (slice(b, b + 1), slice(None), slice(h, h + 1))
            out[one], lse[b : b + 1, h : h + 1] = _fwd_flash(q[one], k[one], v[one], scale)
    return out, lse


def _fused_operands(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the fused products multiply, and for which heads they may.

    Returns:
        queries, keys: [B, H, S, 2 D + 1] with queries keys^T = scale * q k^T - c; scale * q is a sum of two bfloat16.
        values: [B, H, D, Sk].
        c: [B, H, Sq], float32 that bfloat16 holds.
        fusible: [B, H], False where exponentials could underflow or a value is not finite.
    """
    wide_q, wide_k = q.transpose(1, 2).float() * scale, k.transpose(1, 2).float()
    # A row's maximum is at least its mean, q . mean(k), and exceeds it by at most |q| max |k - mean(k)|.
    centre = wide_k.mean(2, keepdim=True)  # [B, H, 1, D]
    radius = torch.linalg.vector_norm(wide_k - centre, dim=3).amax(2, keepdim=True)  # [B, H, 1]
    reach = torch.linalg.vector_norm(wide_q, dim=3) * radius  # [B, H, Sq]
    c = (wide_q * centre).sum(3) + reach + _DEPTH
    # The terms that underflow, at most Sk, sum up to less than exp(-_DEPTH) of a row's largest.
    in_range = (reach.amax(2) <= _LEAST - 2 * _DEPTH - math.log(k.shape[1])) & (c.abs().amax(2) <= _EVEN)
    values = v.permute(0, 2, 3, 1).contiguous()
    c = c.to(q.dtype)
    high = wide_q.to(q.dtype)
    low = (wide_q - high).to(q.dtype)
    keys, ones = k.transpose(1, 2), torch.ones((), dtype=q.dtype).expand(*wide_k.shape[:3], 1)
    queries, keys = torch.cat((high, low, -c[..., None]), 3), torch.cat((keys, keys, ones), 3)
    return queries, keys, values, c.float(), in_range & values.isfinite().all(3).all(2)


def _fused_head(queries: Tensor, keys: Tensor, values: Tensor, c: Tensor, out: Tensor, lse: Tensor) -> None:
    """One head of `_fused_operands`; out [Sq, D], lse [Sq]."""
    for block in _blocks(queries, keys):
        p = onednn.linear_sigmoid(queries[block], keys)  # [rows, Sk]: exp(s - c)
        total = p.sum(1, dtype=torch.float32)
        torch.div(onednn.linear(p, values), total[:, None], out=out[block])
        torch.add(total.log_(), c[block], out=lse[block])


def _fwd_together(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The reference, all heads at once, on a part of the queries at a time: on any device, in bounded memory."""
    parts = [reference.attention_fwd(part, k, v, scale) for part in _parts(q, k)]
    out, lse = zip(*parts, strict=True)
    return torch.cat(out, 1), torch.cat(lse, 2)


def _bwd_together(dout, q, k, v, out, lse, scale, need):
    dtype = q.dtype
    dout, q, k, v = (t.float() for t in (dout, q, k, v))
    dq, dk, dv = [], None, None
    for dout_part, q_part in zip(_parts(dout, k), _parts(q, k), strict=True):
        gradients = reference.attention_bwd(dout_part, q_part, k, v, out, lse, scale, need)
        dq.append(gradients[0])
        dk, dv = (part if total is None else total + part for total, part in zip((dk, dv), gradients[1:], strict=True))
    gradients = (torch.cat(dq, 1) if need[0] else None, dk, dv)
    return tuple(g if g is None else g.to(dtype) for g in gradients)


def _parts(rows: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    """Parts of [B, Sq, H, D] whose scores with all of k are `_SCORES` or fewer."""
    each = rows.shape[0] * rows.shape[2] * k.shape[1]
    return rows.split(max(1, _SCORES // each), dim=1)
