"""attention in Triton: what each call allocates and launches, and what is compiled ahead of time."""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from cnkernels import layout
from cnkernels.aot_case import AotCase
from cnkernels.attention import reference
from cnkernels.attention.triton_backward import Call, key_launches, query_launch, sum_launch
from cnkernels.attention.triton_common import alignment, compute_capability, named_strides
from cnkernels.attention.triton_forward import forward_launch
from cnkernels.launch import bind

_LOG2E = math.log2(math.e)
_FORWARD = ("q_ptr", "k_ptr", "v_ptr", "out_ptr", "lse_ptr", "scale")
_BACKWARD = (
    "dout_ptr", "q_ptr", "k_ptr", "v_ptr", "lse_ptr", "delta_ptr", "norm_ptr", "out_ptr",
    "dq_ptr", "dk_ptr", "dv_ptr", "scale",
)  # fmt: skip


def attention_fwd(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention and the log-sum-exp of every row, as cnkernels.attention.reference.attention_fwd defines them.

    Args:
        q: [B, Sq, H, D], float32, float16 or bfloat16, D <= 256.
        k, v: [B, Sk, H, D], dtype of q; all with a last dimension of stride 1 and any other strides.
        scale: float multiplied into the scores.

    Returns:
        out [B, Sq, H, D], contiguous, q's dtype; lse float32 [B, H, Sq], natural logarithm.

    Notes:
        The sum over keys runs in a fixed order: repeated runs are bitwise equal. A negative scale costs a copy of q.
        Online softmax: Milakov and Gimelshein, 2018; the skipped rescale is FlashAttention-4's.
    """
    return attention_fwd_plan(q, k, v, scale)(q, k, v, scale)


def attention_fwd_plan(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Callable[..., tuple[Tensor, Tensor]]:
    """What runs attention_fwd for tensors like these and a scale of this sign."""
    if scale < 0:  # row maxima are taken before scaling
        positive = attention_fwd_plan(-q, k, v, -scale)
        return lambda q, k, v, scale: positive(-q, k, v, -scale)
    batch, queries, heads, _ = q.shape
    new_out = layout.allocator(q.shape, q.dtype, q.device)
    new_lse = layout.allocator((batch, heads, queries), torch.float32, q.device)
    unit = alignment(q, k, v)
    strides = named_strides(unit, q=q, k=k, v=v)
    launch = forward_launch(q.shape, k.shape[1], q.element_size(), compute_capability(q), unit, strides)
    launch = launch.bind(q.device, _FORWARD)

    def run(q, k, v, scale):
        out, lse = new_out(), new_lse()
        launch((q, k, v, out, lse, scale * _LOG2E))
        return out, lse

    return run


def attention_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, need: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of attention_fwd's out with respect to those of q, k and v that `need` asks for.

    Args:
        dout: [B, Sq, H, D], q's dtype, last dimension of stride 1.
        q, k, v, scale: as given to attention_fwd; out, lse: what it returned.
        need: three bools for (q, k, v).

    Returns:
        (dq, dk, dv), contiguous, in the shape and dtype of their tensor; None where `need` is False.

    Notes:
        Repeated runs are bitwise equal. With few keys (cross-attention) the queries are split over programs, whose
        partial sums are kept in float32 and added in order.
        Dao, "FlashAttention-2: Faster attention with better parallelism and work partitioning", 2023.
    """
    return attention_bwd_plan(dout, q, k, v, out, lse, scale, need)(dout, q, k, v, out, lse, scale, need)


def attention_bwd_plan(dout, q, k, v, out, lse, scale, need) -> Callable:
    """What runs attention_bwd for tensors like these."""
    if k.shape[1] == 1:  # dS is exactly 0, as two sums of the same products in different orders are not
        return reference.attention_bwd
    need_q, need_k, need_v = need
    dtype, device = q.dtype, q.device
    unit = alignment(dout, q, k, v)
    strides = named_strides(unit, do=dout, q=q, k=k, v=v)
    call = Call(q.shape, k.shape[1], q.element_size(), compute_capability(q), unit, strides)
    exact = dtype == torch.float32
    launches, parts = key_launches(call, need_k, need_v)
    if need_q or need_k or exact:
        launches.insert(0, query_launch(call, need_q))
    launch = bind(launches, device, _BACKWARD)
    new_query, new_key = (layout.allocator(t.shape, dtype, device) for t in (q, k))
    new_parts = new_key if parts == 1 else layout.allocator((parts, *k.shape), torch.float32, device)
    add = None if parts == 1 else sum_launch(k.numel(), parts).bind(device, ("parts_ptr", "sum_ptr"))

    def summed(gradient):
        if gradient is None or add is None:
            return gradient
        total = new_key()
        add((gradient, total))
        return total

    def run(dout, q, k, v, out, lse, scale, need):
        delta = torch.empty_like(lse)
        norm = torch.empty_like(lse) if exact else delta
        dq = new_query() if need_q else None
        dk = new_parts() if need_k else None
        dv = new_parts() if need_v else None
        launch((dout, q, k, v, lse, delta, norm, out, dq, dk, dv, scale))
        return dq, summed(dk), summed(dv)

    return run


def aot_cases() -> list[AotCase]:
    """The kernels of Stable Diffusion's self- and cross-attention at batch 2, for cnkernels.aot: 1.5, 2.1 and XL."""
    cases = []
    for archs, capability in (((80, 86, 89, 120), 8), ((90,), 9), ((100,), 10)):
        for length, heads, head_dim in ((4096, 8, 40), (1024, 8, 80), (256, 8, 160), (64, 8, 160), (4096, 10, 64)):
            for keys in (length, 77):
                name = f"{length}x{keys} heads={heads} head_dim={head_dim} fp16"
                for stem, launch, operands in _launches((2, length, heads, head_dim), keys, capability):
                    case = launch.case(f"{stem} {name}", operands, uses_matrix_units=True)
                    cases.append(replace(case, archs=archs))
    return cases


def _launches(shape: tuple[int, ...], keys: int, capability: int) -> list[tuple[str, object, dict]]:
    """(name, launch, operands) of a float16 call, forward and backward for all three gradients."""
    q = torch.empty(shape, dtype=torch.float16, device="meta")
    k = torch.empty((shape[0], keys, *shape[2:]), dtype=torch.float16, device="meta")
    unit = alignment(q, k)
    strides = named_strides(unit, q=q, k=k, v=k)
    operands = dict.fromkeys((*_FORWARD, *_BACKWARD), torch.float16) | {"scale": 1.0}
    operands |= dict.fromkeys(("lse_ptr", "delta_ptr", "norm_ptr"), torch.float32)
    call = Call(shape, keys, 2, capability, unit, named_strides(unit, do=q) | strides)
    by_keys, parts = key_launches(call, True, True)
    partial = dict.fromkeys(("dk_ptr", "dv_ptr"), torch.float16 if parts == 1 else torch.float32)
    launches = [
        ("fwd", forward_launch(shape, keys, 2, capability, unit, strides), operands),
        ("bwd dq", query_launch(call, True), operands),
    ]
    for launch in by_keys:
        needed = [name for name, need in (("dk", "NEED_K"), ("dv", "NEED_V")) if launch.sizes[need]]
        launches.append((" ".join(("bwd", *needed)), launch, operands | partial))
    return launches
