"""Flash attention in Triton, forward: softmax(scale * q @ k^T) @ v without ever storing the [Sq, Sk] scores.


Scores live in the exp2 domain: `scale` arrives multiplied by log2(e), so that exp(scale * s - max) is one multiply-add
and one exp2.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import triton
import triton.language as tl

from cnkernels.attention.triton_common import (
    Config,
    add_product,
    candidates,
    column_blocks,
    first_column,
    load_tiles,
    product_nt,
    program,
    scale_tiles,
    store_tiles,
    widest_block,
    zero_tiles,
)
from cnkernels.configurations import rule
from cnkernels.launch import Launch

_PROGRAMS = 256  # twice as many as a large GPU has multiprocessors: fewer tiles of 128 queries than this are halved
# A tile keeps its old row maxima until a score exceeds one by this, in log2: P stays within 2^8, float16 takes 2^15.
_LAG = tl.constexpr(8.0)
_LN2 = tl.constexpr(math.log(2))


@triton.jit
def _finite(row_max):
    """0 for a row that has seen only -inf, so that its exp2(-inf - max) is 0 and not NaN."""
    return tl.where(row_max == -float("inf"), 0.0, row_max)


@triton.jit
def _rescaled(acc, row_max, row_sum, new_max):
    """The sums so far, relative to new_max."""
    factor = tl.exp2(row_max - _finite(new_max))
    return scale_tiles(acc, factor[:, None]), row_sum * factor


@triton.jit
def _step(acc, row_max, row_sum, q, k, v, keys_left, scale, SKIP_RESCALE: tl.constexpr, MASK: tl.constexpr):
    """One tile of keys of the online softmax; row_max is in units of log2."""
    scores = product_nt(q, k)  # [BLOCK_M, BLOCK_N]
    present = (tl.arange(0, scores.shape[1]) < keys_left)[None, :]
    highest = tl.max(tl.where(present, scores, float("-inf")) if MASK else scores, 1)
    new_max = tl.maximum(row_max, highest * scale)
    if SKIP_RESCALE:
        if tl.max(new_max - row_max, 0) > _LAG:  # one answer for the whole tile: no warp diverges
            acc, row_sum = _rescaled(acc, row_max, row_sum, new_max)
            row_max = new_max
    else:
        acc, row_sum = _rescaled(acc, row_max, row_sum, new_max)
        row_max = new_max
    p = tl.exp2(scores * scale - _finite(row_max)[:, None])
    p = tl.where(present, p, 0.0) if MASK else p  # after scaling too: -inf times a scale of 0 is NaN
    return add_product(acc, p, v), row_max, row_sum + tl.sum(p, 1)


@triton.jit
def _finish(
    out_ptr, lse_ptr, acc, row_max, row_sum, rows, batch, head, heads, queries,
    HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    out_ptr += (batch * queries * heads + head) * HEAD_DIM
    store_tiles(out_ptr, scale_tiles(acc, (1.0 / row_sum)[:, None]), rows, heads * HEAD_DIM, queries, HEAD_DIM, COLUMNS)
    lse = (_finite(row_max) + tl.log2(row_sum)) * _LN2
    tl.store(lse_ptr + (batch * heads + head) * queries + rows, lse, mask=rows < queries)


_RUNTIME_INTEGERS = [
    "heads", "queries", "keys",
    "stride_qb", "stride_qs", "stride_qh", "stride_kb", "stride_ks", "stride_kh", "stride_vb", "stride_vs", "stride_vh",
]  # fmt: skip


@triton.jit(do_not_specialize=_RUNTIME_INTEGERS)
def _attention_fwd_kernel(
    q_ptr,  # [B, Sq, H, D]
    k_ptr,  # [B, Sk, H, D]
    v_ptr,  # [B, Sk, H, D]
    out_ptr,  # [B, Sq, H, D], contiguous
    lse_ptr,  # float32 [B, H, Sq], contiguous
    scale,  # times log2(e)
    heads,
    queries,
    keys,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vh,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,  # column_blocks of HEAD_DIM
    UNIT: tl.constexpr,  # elements that strides count in
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    SKIP_RESCALE: tl.constexpr,
):
    tile, batch, head = program(tl.cdiv(queries, BLOCK_M), heads)
    heads = heads.to(tl.int64)
    rows = tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    q_ptr += (batch * stride_qb + head * stride_qh) * UNIT
    q = load_tiles(q_ptr, rows, stride_qs.to(tl.int64) * UNIT, queries, HEAD_DIM, COLUMNS, True)
    k_ptr += (batch * stride_kb + head * stride_kh) * UNIT
    v_ptr += (batch * stride_vb + head * stride_vh) * UNIT
    k_stride = stride_ks.to(tl.int64) * UNIT
    v_stride = stride_vs.to(tl.int64) * UNIT
    row_max = tl.full([BLOCK_M], -float("inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = zero_tiles(BLOCK_M, COLUMNS)

    columns = tl.arange(0, BLOCK_N).to(tl.int64)
    full = keys // BLOCK_N * BLOCK_N
    for start in tl.range(0, full, BLOCK_N, num_stages=STAGES):
        k = load_tiles(k_ptr + start * k_stride, columns, k_stride, keys, HEAD_DIM, COLUMNS, False)
        v = load_tiles(v_ptr + start * v_stride, columns, v_stride, keys, HEAD_DIM, COLUMNS, False)
        acc, row_max, row_sum = _step(acc, row_max, row_sum, q, k, v, keys, scale, SKIP_RESCALE, False)
    if full < keys:
        k = load_tiles(k_ptr + full * k_stride, columns, k_stride, keys - full, HEAD_DIM, COLUMNS, True)
        v = load_tiles(v_ptr + full * v_stride, columns, v_stride, keys - full, HEAD_DIM, COLUMNS, True)
        acc, row_max, row_sum = _step(acc, row_max, row_sum, q, k, v, keys - full, scale, False, True)
    _finish(out_ptr, lse_ptr, acc, row_max, row_sum, rows, batch, head, heads, queries, HEAD_DIM, COLUMNS)


@triton.jit(do_not_specialize=_RUNTIME_INTEGERS)
def _attention_fwd_single_kernel(
    q_ptr,  # [B, Sq, H, D]
    k_ptr,  # [B, Sk, H, D]
    v_ptr,  # [B, Sk, H, D]
    out_ptr,  # [B, Sq, H, D], contiguous
    lse_ptr,  # float32 [B, H, Sq], contiguous
    scale,  # times log2(e)
    heads,
    queries,
    keys,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vh,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,  # column_blocks of HEAD_DIM
    UNIT: tl.constexpr,  # elements that strides count in
    BLOCK_M: tl.constexpr,
    KEYS: tl.constexpr,  # blocks that cover all keys, so that the softmax is exact in one pass
    RAGGED: tl.constexpr,  # index of the block that is not full, or -1
):
    tile, batch, head = program(tl.cdiv(queries, BLOCK_M), heads)
    heads = heads.to(tl.int64)
    rows = tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    q_ptr += (batch * stride_qb + head * stride_qh) * UNIT
    q = load_tiles(q_ptr, rows, stride_qs.to(tl.int64) * UNIT, queries, HEAD_DIM, COLUMNS, True)
    k_ptr += (batch * stride_kb + head * stride_kh) * UNIT
    v_ptr += (batch * stride_vb + head * stride_vh) * UNIT
    k_stride = stride_ks.to(tl.int64) * UNIT
    v_stride = stride_vs.to(tl.int64) * UNIT

    scores = ()
    row_max = tl.full([BLOCK_M], -float("inf"), tl.float32)
    for i in tl.static_range(len(KEYS)):
        columns = first_column(KEYS, i) + tl.arange(0, KEYS[i])
        k = load_tiles(k_ptr, columns.to(tl.int64), k_stride, keys, HEAD_DIM, COLUMNS, i == RAGGED)
        block = product_nt(q, k)
        present = (columns < keys)[None, :]
        highest = tl.max(tl.where(present, block, -float("inf")) if i == RAGGED else block, 1)
        row_max = tl.maximum(row_max, highest * scale)
        scores = scores + (block,)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = zero_tiles(BLOCK_M, COLUMNS)
    for i in tl.static_range(len(KEYS)):
        columns = first_column(KEYS, i) + tl.arange(0, KEYS[i])
        v = load_tiles(v_ptr, columns.to(tl.int64), v_stride, keys, HEAD_DIM, COLUMNS, i == RAGGED)
        p = tl.exp2(scores[i] * scale - _finite(row_max)[:, None])
        p = tl.where((columns < keys)[None, :], p, 0.0) if i == RAGGED else p
        row_sum += tl.sum(p, 1)
        acc = add_product(acc, p, v)
    _finish(out_ptr, lse_ptr, acc, row_max, row_sum, rows, batch, head, heads, queries, HEAD_DIM, COLUMNS)


def _single_pass(keys: int, head_dim: int, itemsize: int, capability: int) -> bool:
    """Whether the keys fit one tile: 256 of 160 columns, half as many where matrix units read registers."""
    return itemsize == 2 and keys <= 256 and keys * head_dim <= (256 if capability in (9, 10) else 128) * 160


@rule("attention forward, all keys at once", lambda own, *_: [replace(own, num_warps=12 - own.num_warps)])
def single_pass_config(keys: int, head_dim: int) -> Config:
    """4 warps, or 8 where the keys are many; `block_n` is not used."""
    return Config(64, keys, 8 if keys * head_dim > 128 * 160 else 4, 1)


@rule("attention forward", candidates)
def forward_config(shape: tuple[int, ...], keys: int, itemsize: int, capability: int) -> Config:
    """Tiles of the forward kernels.

    Short tiles where tiles of 128 queries would leave multiprocessors idle, and for wide heads on GPUs whose matrix
    units read registers. maxnreg fits two programs on an sm_90 multiprocessor: 64 columns would take 130 registers.
    """
    batch, queries, heads, head_dim = shape
    many = batch * heads * triton.cdiv(queries, 128) >= _PROGRAMS
    if itemsize == 4:
        return Config(32, 16, 4, 1)
    if capability not in (9, 10):
        if head_dim <= 64:
            return Config(128, 64, 8, 3) if many else Config(64, 64, 4, 3)
        return Config(64, 64, 4, 3) if head_dim <= 96 else Config(64, 32 if head_dim <= 160 else 16, 4, 2)
    if head_dim <= 80:
        cap = 128 if capability == 9 and head_dim > 48 else None
        return Config(128, 64, 8, 3, cap) if many else Config(64, 64, 4, 3)
    if head_dim <= 96:
        return Config(64, 64, 4, 3)  # 128 queries would spill under the cap
    return Config(128, 64 if head_dim <= 192 else 32, 8, 2) if many or head_dim > 160 else Config(64, 32, 4, 2)


def _skips_rescale(head_dim: int, capability: int) -> bool:
    """Whether the vote on skipping is worth its instructions: a rescale is head_dim / 2 products of each thread.

    At 40 columns both are the same number of instructions, and the vote adds two barriers. Triton 3.7 cannot compile
    the vote for sm_100, where the sums live in tensor memory.
    """
    return head_dim > 64 and capability != 10


def forward_launch(
    shape: tuple[int, ...], keys: int, itemsize: int, capability: int, unit: int, strides: Mapping[str, int]
) -> Launch:
    """The launch for queries of `shape` [B, Sq, H, D], with the kernel's strides, in units of `unit` elements."""
    batch, queries, heads, head_dim = shape
    single = _single_pass(keys, head_dim, itemsize, capability)
    config = single_pass_config(keys, head_dim) if single else forward_config(shape, keys, itemsize, capability)
    sizes = {
        "heads": heads,
        "queries": queries,
        "keys": keys,
        **strides,
        "HEAD_DIM": head_dim,
        "COLUMNS": column_blocks(head_dim, widest_block(itemsize, capability)),
        "UNIT": unit,
        "BLOCK_M": config.block_m,
    }
    if single:
        kernel, blocks = _attention_fwd_single_kernel, column_blocks(keys, 128)
        sizes |= {"KEYS": blocks, "RAGGED": len(blocks) - 1 if keys < sum(blocks) else -1}
    else:
        kernel = _attention_fwd_kernel
        sizes |= {
            "BLOCK_N": config.block_n,
            "STAGES": config.num_stages,
            "SKIP_RESCALE": _skips_rescale(head_dim, capability),
        }
    return config.launch(kernel, triton.cdiv(queries, config.block_m) * batch * heads, sizes=sizes)
