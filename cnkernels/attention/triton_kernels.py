"""attention in Triton: the launchers, and the launches that are compiled ahead of time."""

import math

import torch
import triton

from cnkernels.attention import reference, triton_backward, triton_forward
from cnkernels.attention.triton_common import alignment, compute_capability, on_device, strides


def attention_fwd(q, k, v, scale):
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
    if scale < 0:  # row maxima are taken before scaling
        q, scale = -q, -scale
    batch, queries, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    unit = alignment(q, k, v)
    kernel, constants, config = triton_forward.forward_launch(
        q.shape, k.shape[1], q.element_size(), compute_capability(q), unit
    )
    steps = [stride for tensor in (q, k, v) for stride in strides(tensor, unit)]
    with on_device(q):
        kernel[(triton.cdiv(queries, config.block_m) * batch * heads,)](
            q,
            k,
            v,
            out,
            lse,
            scale * math.log2(math.e),
            heads,
            queries,
            k.shape[1],
            *steps,
            **constants,
            **config.options(),
        )
    return out, lse


def attention_bwd(dout, q, k, v, out, lse, scale, need):
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
    if k.shape[1] == 1:  # dS is exactly 0, as two sums of the same products in different orders are not
        return reference.attention_bwd(dout, q, k, v, out, lse, scale, need)
    need_q, need_k, need_v = need
    delta = torch.empty_like(lse)
    exact = q.dtype == torch.float32
    norm = torch.empty_like(lse) if exact else delta
    tensors = (dout, q, k, v, lse, delta, norm)
    dq = dk = dv = None
    with on_device(q):
        if need_q or need_k or exact:
            dq = _query_gradient(tensors, out, scale, need_q)
        for pass_k, pass_v in triton_backward.key_passes(
            q.shape[3], q.element_size(), compute_capability(q), need_k, need_v
        ):
            if pass_k or pass_v:
                gradients = _key_gradients(tensors, scale, pass_k, pass_v)
                dk, dv = gradients[0] if pass_k else dk, gradients[1] if pass_v else dv
    return dq, dk, dv


def _layout(tensors):
    """The unit of the strides of dout, q, k, v, and those strides."""
    unit = alignment(*tensors[:4])
    return unit, [stride for tensor in tensors[:4] for stride in strides(tensor, unit)]


def _query_gradient(tensors, out, scale, need_q):
    """dq, or None; fills delta and norm."""
    q, k = tensors[1:3]
    batch, queries, heads, head_dim = q.shape
    capability = compute_capability(q)
    config = triton_backward.query_config(head_dim, q.element_size(), capability)
    unit, steps = _layout(tensors)
    constants = triton_backward.constants_of(head_dim, q.element_size(), capability, unit, config)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device) if need_q else None
    triton_backward._attention_bwd_query_kernel[(triton.cdiv(queries, config.block_m) * batch * heads,)](
        *tensors, out, dq, scale, heads, queries, k.shape[1], *steps, **constants, NEED_Q=need_q, **config.options()
    )
    return dq


def _key_gradients(tensors, scale, need_k, need_v):
    q, k = tensors[1:3]
    batch, keys, heads, head_dim = k.shape
    capability = compute_capability(k)
    config = triton_backward.key_config(head_dim, k.element_size(), capability)
    unit, steps = _layout(tensors)
    constants = triton_backward.constants_of(head_dim, k.element_size(), capability, unit, config)
    programs = triton.cdiv(keys, config.block_n) * batch * heads
    split, parts = triton_backward.split_queries(q.shape[1], programs, config.block_m)
    shape, dtype = (k.shape, k.dtype) if parts == 1 else ((parts, *k.shape), torch.float32)
    dk = torch.empty(shape, dtype=dtype, device=k.device) if need_k else None
    dv = torch.empty(shape, dtype=dtype, device=k.device) if need_v else None
    triton_backward._attention_bwd_key_kernel[(programs, parts)](
        *tensors, dk, dv, scale, heads, q.shape[1], keys, split, *steps,
        **constants, NEED_K=need_k, NEED_V=need_v, **config.options(),
    )  # fmt: skip
    if parts > 1:
        dk, dv = (None if gradient is None else _sum_parts(gradient, k) for gradient in (dk, dv))
    return dk, dv


def _sum_parts(parts, like):
    total = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    grid = (triton.cdiv(total.numel(), 1024),)
    triton_backward._attention_bwd_sum_kernel[grid](parts, total, total.numel(), parts.shape[0], 1024, num_warps=4)
    return total


def aot_cases() -> list:
    """The kernels of Stable Diffusion 1.5's self- and cross-attention at 512x512, batch 2, for cnkernels.aot."""
    from cnkernels.aot_case import AotCase

    cases = []
    for archs, capability in (((80, 120), 8), ((90,), 9), ((100,), 10)):
        for length, head_dim in ((4096, 40), (1024, 80), (256, 160), (64, 160)):
            for keys in (length, 77):
                shape, itemsize = (2, length, 8, head_dim), 2
                name = f"{length}x{keys} head_dim={head_dim} fp16"
                launches = [("fwd", *triton_forward.forward_launch(shape, keys, itemsize, capability, 8), [])]
                launches += triton_backward.backward_launches(shape, keys, itemsize, capability, 8)
                for stem, kernel, constants, config, wide in launches:
                    cases.append(
                        AotCase(
                            f"{stem} {name}", kernel, _signature(kernel, constants, wide), constants,
                            config.num_warps, config.num_stages, True, config.maxnreg, archs,
                        )
                    )  # fmt: skip
    return cases


def _signature(kernel, constants: dict, wide: list[str]) -> dict[str, str]:
    """Types of a float16 call; `wide` names the gradients that are float32 partial sums."""
    float32 = {"lse_ptr", "delta_ptr", "norm_ptr", *wide}
    names = [name for name in kernel.arg_names if name not in constants]
    kinds = {True: "*fp32", False: "*fp16"}
    return {
        name: kinds[name in float32] if name.endswith("_ptr") else "fp32" if name == "scale" else "i32"
        for name in names
    }
