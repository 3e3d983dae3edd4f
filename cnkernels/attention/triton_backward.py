"""Flash attention in Triton, backward: the scores are computed again from q, k and the saved log-sum-exp.


With P = exp(scale * q @ k^T - lse) and delta = rowsum(out * dout):

    dv = P^T @ dout,  dS = P * (dout @ v^T - delta),  dq = scale * dS @ k,  dk = scale * dS^T @ q


One kernel owns a tile of queries and sums over keys (delta, dq), another owns a tile of keys and sums over queries
(dk, dv): no two programs write the same element, so there are no atomics and every sum has one order.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import triton
import triton.language as tl

from cnkernels.attention.triton_common import (
    Config,
    add_product,
    candidates,
    column_blocks,
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

_LOG2E = tl.constexpr(math.log2(math.e))
_PROGRAMS = 128  # about as many as a large GPU has multiprocessors; fewer programs than this share the queries
_STRIDES = [f"stride_{tensor}{axis}" for tensor in ("do", "q", "k", "v") for axis in "bsh"]


@triton.jit
def _probabilities(q, k, lse, keys_left, scale, MASK: tl.constexpr):
    p = tl.exp2(product_nt(q, k) * (scale * _LOG2E) - lse[:, None])  # [BLOCK_M, BLOCK_N]
    if MASK:  # scores of absent keys are 0, and exp(0 - lse) may overflow
        p = tl.where((tl.arange(0, p.shape[1]) < keys_left)[None, :], p, 0.0)
    return p


@triton.jit
def _statistics_step(
    total, weighted, q, dout, lse, k_ptr, v_ptr, start, k_stride, v_stride, keys, scale,
    HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK_N).to(tl.int64)
    k = load_tiles(k_ptr + start * k_stride, columns, k_stride, keys - start, HEAD_DIM, COLUMNS, MASK)
    v = load_tiles(v_ptr + start * v_stride, columns, v_stride, keys - start, HEAD_DIM, COLUMNS, MASK)
    p = _probabilities(q, k, lse, keys - start, scale, MASK)
    return total + tl.sum(p, 1), weighted + tl.sum(p * product_nt(dout, v), 1)


@triton.jit
def _query_step(
    dq, q, dout, lse, delta, norm, k_ptr, v_ptr, start, k_stride, v_stride, keys, scale,
    HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr, EXACT: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK_N).to(tl.int64)
    k = load_tiles(k_ptr + start * k_stride, columns, k_stride, keys - start, HEAD_DIM, COLUMNS, MASK)
    v = load_tiles(v_ptr + start * v_stride, columns, v_stride, keys - start, HEAD_DIM, COLUMNS, MASK)
    p = _probabilities(q, k, lse, keys - start, scale, MASK)
    if EXACT:
        p = p * norm[:, None]
    ds = p * (product_nt(dout, v) - delta[:, None])
    return add_product(dq, ds, k)


@triton.jit(do_not_specialize=["heads", "queries", "keys", *_STRIDES])
def _attention_bwd_query_kernel(
    dout_ptr,  # [B, Sq, H, D]
    q_ptr,  # [B, Sq, H, D]
    k_ptr,  # [B, Sk, H, D]
    v_ptr,  # [B, Sk, H, D]
    lse_ptr,  # float32 [B, H, Sq], contiguous
    delta_ptr,  # float32 [B, H, Sq], contiguous: written
    norm_ptr,  # float32 [B, H, Sq], contiguous: written when EXACT
    out_ptr,  # [B, Sq, H, D], contiguous
    dq_ptr,  # [B, Sq, H, D], contiguous
    scale,
    heads,
    queries,
    keys,
    stride_dob,
    stride_dos,
    stride_doh,
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
    EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    NEED_Q: tl.constexpr,
):
    """delta for the rows of one tile, and dq when NEED_Q.

    The saved lse is off by up to half a unit in its last place, and out * dout sums other roundings than P * dP does:
    less than half precision can tell, but in float32 several times the error of plain softmax. EXACT goes over the keys
    once more and takes delta = rowsum(P * dP) and norm = 1 / rowsum(P) from the very numbers that the gradients use.
    """
    tile, batch, head = program(tl.cdiv(queries, BLOCK_M), heads)
    heads = heads.to(tl.int64)
    rows = tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    q_ptr += (batch * stride_qb + head * stride_qh) * UNIT
    dout_ptr += (batch * stride_dob + head * stride_doh) * UNIT
    q = load_tiles(q_ptr, rows, stride_qs.to(tl.int64) * UNIT, queries, HEAD_DIM, COLUMNS, True)
    dout = load_tiles(dout_ptr, rows, stride_dos.to(tl.int64) * UNIT, queries, HEAD_DIM, COLUMNS, True)
    place = (batch * heads + head) * queries + rows
    lse = tl.load(lse_ptr + place, mask=rows < queries, other=0.0) * _LOG2E
    k_ptr += (batch * stride_kb + head * stride_kh) * UNIT
    v_ptr += (batch * stride_vb + head * stride_vh) * UNIT
    k_stride = stride_ks.to(tl.int64) * UNIT
    v_stride = stride_vs.to(tl.int64) * UNIT
    full = keys // BLOCK_N * BLOCK_N
    first_element = (batch * queries * heads + head) * HEAD_DIM

    delta = tl.zeros([BLOCK_M], tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    if EXACT:
        for start in tl.range(0, full, BLOCK_N):
            norm, delta = _statistics_step(
                norm, delta, q, dout, lse, k_ptr, v_ptr, start, k_stride, v_stride, keys, scale,
                HEAD_DIM, COLUMNS, BLOCK_N, False,
            )  # fmt: skip
        if full < keys:
            norm, delta = _statistics_step(
                norm, delta, q, dout, lse, k_ptr, v_ptr, full, k_stride, v_stride, keys, scale,
                HEAD_DIM, COLUMNS, BLOCK_N, True,
            )  # fmt: skip
        delta = delta / norm
        norm = 1.0 / norm
        tl.store(norm_ptr + place, norm, mask=rows < queries)
    else:
        out = load_tiles(out_ptr + first_element, rows, heads * HEAD_DIM, queries, HEAD_DIM, COLUMNS, True)
        for i in tl.static_range(len(COLUMNS)):
            delta += tl.sum(out[i].to(tl.float32) * dout[i].to(tl.float32), 1)
    tl.store(delta_ptr + place, delta, mask=rows < queries)

    if NEED_Q:
        dq = zero_tiles(BLOCK_M, COLUMNS)
        for start in tl.range(0, full, BLOCK_N, num_stages=STAGES):
            dq = _query_step(
                dq, q, dout, lse, delta, norm, k_ptr, v_ptr, start, k_stride, v_stride, keys, scale,
                HEAD_DIM, COLUMNS, BLOCK_N, EXACT, False,
            )  # fmt: skip
        if full < keys:
            dq = _query_step(
                dq, q, dout, lse, delta, norm, k_ptr, v_ptr, full, k_stride, v_stride, keys, scale,
                HEAD_DIM, COLUMNS, BLOCK_N, EXACT, True,
            )  # fmt: skip
        dq = scale_tiles(dq, scale)
        store_tiles(dq_ptr + first_element, dq, rows, heads * HEAD_DIM, queries, HEAD_DIM, COLUMNS)


@triton.jit
def _key_step(
    dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, norm_ptr, start, queries, q_stride, dout_stride, scale,
    HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, EXACT: tl.constexpr, BLOCK_M: tl.constexpr,
    NEED_K: tl.constexpr, NEED_V: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Adds one tile of queries. Absent ones are loaded as zeros, lse too: their P is 1, their dout and dS are 0.

    norm and delta correct P and dP as the query kernel rounded them: EXACT takes the products as that one does.
    """
    rows = tl.arange(0, BLOCK_M)
    wide = rows.to(tl.int64)
    present = rows < queries - start
    q = load_tiles(q_ptr + start * q_stride, wide, q_stride, queries - start, HEAD_DIM, COLUMNS, MASK)
    dout = load_tiles(dout_ptr + start * dout_stride, wide, dout_stride, queries - start, HEAD_DIM, COLUMNS, MASK)
    lse = tl.load(lse_ptr + start + rows, mask=present, other=0.0) * _LOG2E
    scores = tl.trans(product_nt(q, k)) if EXACT else product_nt(k, q)  # [BLOCK_N, BLOCK_M]
    p = tl.exp2(scores * (scale * _LOG2E) - lse[None, :])
    if EXACT:
        p = p * tl.load(norm_ptr + start + rows, mask=present, other=0.0)[None, :]
    if NEED_V:
        dv = add_product(dv, p, dout)
    if NEED_K:
        dp = tl.trans(product_nt(dout, v)) if EXACT else product_nt(v, dout)
        delta = tl.load(delta_ptr + start + rows, mask=present, other=0.0)
        dk = add_product(dk, p * (dp - delta[None, :]), q)
    return dk, dv


@triton.jit(do_not_specialize=["heads", "queries", "keys", "split", *_STRIDES])
def _attention_bwd_key_kernel(
    dout_ptr,  # [B, Sq, H, D]
    q_ptr,  # [B, Sq, H, D]
    k_ptr,  # [B, Sk, H, D]
    v_ptr,  # [B, Sk, H, D]
    lse_ptr,  # float32 [B, H, Sq], contiguous
    delta_ptr,  # float32 [B, H, Sq], contiguous
    norm_ptr,  # float32 [B, H, Sq], contiguous
    dk_ptr,  # [parts, B, Sk, H, D], contiguous
    dv_ptr,  # [parts, B, Sk, H, D], contiguous
    scale,
    heads,
    queries,
    keys,
    split,  # queries of one part, a multiple of BLOCK_M
    stride_dob,
    stride_dos,
    stride_doh,
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
    EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    NEED_K: tl.constexpr,
    NEED_V: tl.constexpr,
):
    tiles = tl.cdiv(keys, BLOCK_N)
    tile, batch, head = program(tiles, heads)
    part = tl.program_id(1)
    batches = tl.num_programs(0) // (tiles * heads)
    heads = heads.to(tl.int64)
    columns = tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k_ptr += (batch * stride_kb + head * stride_kh) * UNIT
    v_ptr += (batch * stride_vb + head * stride_vh) * UNIT
    k = load_tiles(k_ptr, columns, stride_ks.to(tl.int64) * UNIT, keys, HEAD_DIM, COLUMNS, True)
    v = load_tiles(v_ptr, columns, stride_vs.to(tl.int64) * UNIT, keys, HEAD_DIM, COLUMNS, True)
    q_ptr += (batch * stride_qb + head * stride_qh) * UNIT
    dout_ptr += (batch * stride_dob + head * stride_doh) * UNIT
    q_stride = stride_qs.to(tl.int64) * UNIT
    dout_stride = stride_dos.to(tl.int64) * UNIT
    first_row = (batch * heads + head) * queries
    lse_ptr += first_row
    delta_ptr += first_row
    norm_ptr += first_row

    first = part * split
    last = tl.minimum(first + split, queries)
    full = first + (last - first) // BLOCK_M * BLOCK_M
    dk = zero_tiles(BLOCK_N, COLUMNS)
    dv = zero_tiles(BLOCK_N, COLUMNS)
    for start in tl.range(first, full, BLOCK_M, num_stages=STAGES):
        dk, dv = _key_step(
            dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, norm_ptr, start, queries, q_stride, dout_stride, scale,
            HEAD_DIM, COLUMNS, EXACT, BLOCK_M, NEED_K, NEED_V, False,
        )  # fmt: skip
    if full < last:
        dk, dv = _key_step(
            dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, norm_ptr, full, queries, q_stride, dout_stride, scale,
            HEAD_DIM, COLUMNS, EXACT, BLOCK_M, NEED_K, NEED_V, True,
        )  # fmt: skip
    first_element = ((part * batches + batch) * keys * heads + head) * HEAD_DIM
    if NEED_K:
        dk = scale_tiles(dk, scale)
        store_tiles(dk_ptr + first_element, dk, columns, heads * HEAD_DIM, keys, HEAD_DIM, COLUMNS)
    if NEED_V:
        store_tiles(dv_ptr + first_element, dv, columns, heads * HEAD_DIM, keys, HEAD_DIM, COLUMNS)


@triton.jit(do_not_specialize=["units", "parts"])
def _attention_bwd_sum_kernel(parts_ptr, sum_ptr, units, parts, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """sum[i] = parts[0, i] + parts[1, i] + ..., in that order, over `units` times UNIT elements.

    The compiler must know what divides the size: else it cannot see that all elements of a vector are there, or none.
    """
    size = units.to(tl.int64) * UNIT
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(parts):
        total += tl.load(parts_ptr + part * size + index, mask=index < size, other=0.0)
    tl.store(sum_ptr + index, total.to(sum_ptr.dtype.element_ty), mask=index < size)


@rule("attention backward, queries", candidates)
def query_config(head_dim: int, itemsize: int, capability: int, tiles: int) -> Config:
    """Tiles of the kernel that holds queries; `tiles` of 128 of them is what the call would make."""
    if itemsize == 4:
        return Config(32, 16, 4, 1)
    if capability in (9, 10):
        if 96 < head_dim <= 160 and tiles < 128:  # 256 queries of two images are 32 tiles: a quarter of the GPU
            return Config(64, 32, 4, 2)
        if head_dim <= 160:
            return Config(128, 64, 8, 3 if head_dim <= 64 else 2)
        return Config(64, 32, 8, 2)
    return Config(64, 64 if head_dim <= 64 else 32 if head_dim <= 96 else 16, 4, 2)


@rule("attention backward, keys", candidates)
def key_config(head_dim: int, itemsize: int, capability: int) -> Config:
    if itemsize == 4:
        return Config(32, 16, 4, 1)
    if capability in (9, 10):
        return Config(64, 64, 4, 2) if head_dim <= 80 else Config(32 if head_dim <= 192 else 16, 64, 8, 2)
    if head_dim <= 48:
        return Config(64, 32, 4, 2)  # 32 queries and 64 keys take two registers too many on sm_89
    return Config(32 if head_dim <= 96 else 16, 64, 4, 2)


def key_passes(head_dim: int, itemsize: int, capability: int, need_k: bool, need_v: bool) -> list[tuple[bool, bool]]:
    """(need_k, need_v) of each launch: where matrix units read registers, those hold one wide gradient, not two."""
    if need_k and need_v and head_dim > 96 and itemsize < 4 and capability not in (9, 10):
        return [(True, False), (False, True)]
    return [(need_k, need_v)]


def split_queries(queries: int, programs: int, block_m: int) -> tuple[int, int]:
    """Queries of each part and the number of parts, so that few tiles of keys still fill a GPU."""
    wanted = triton.cdiv(_PROGRAMS, programs)
    split = max(triton.cdiv(triton.cdiv(queries, wanted), block_m), 4) * block_m
    return split, triton.cdiv(queries, split)


@dataclass(frozen=True)
class Call:
    """What the launches of one backward pass have in common."""

    shape: tuple[int, ...]  # of q: [B, Sq, H, D]
    keys: int
    itemsize: int
    capability: int
    unit: int  # elements that strides count in
    strides: Mapping[str, int]  # the kernels' strides of dout, q, k and v

    def sizes(self, config: Config) -> dict[str, object]:
        _, queries, heads, head_dim = self.shape
        return {
            "heads": heads,
            "queries": queries,
            "keys": self.keys,
            **self.strides,
            "HEAD_DIM": head_dim,
            "COLUMNS": column_blocks(head_dim, widest_block(self.itemsize, self.capability)),
            "UNIT": self.unit,
            "EXACT": self.itemsize == 4,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "STAGES": config.num_stages,
        }


def query_launch(call: Call, need_q: bool) -> Launch:
    """Fills delta, for float32 norm too, and dq where it is needed."""
    batch, queries, heads, head_dim = call.shape
    tiles = triton.cdiv(queries, 128) * batch * heads
    config = query_config(head_dim, call.itemsize, call.capability, tiles)
    programs = triton.cdiv(queries, config.block_m) * batch * heads
    return config.launch(_attention_bwd_query_kernel, programs, sizes=call.sizes(config) | {"NEED_Q": need_q})


def key_launches(call: Call, need_k: bool, need_v: bool) -> tuple[list[Launch], int]:
    """The launches that fill dk and dv where they are needed, and in how many parts, to be added up."""
    batch, queries, heads, head_dim = call.shape
    config = key_config(head_dim, call.itemsize, call.capability)
    programs = triton.cdiv(call.keys, config.block_n) * batch * heads
    split, parts = split_queries(queries, programs, config.block_m)
    sizes = call.sizes(config) | {"split": split}
    launches = [
        config.launch(_attention_bwd_key_kernel, programs, parts, sizes=sizes | {"NEED_K": pass_k, "NEED_V": pass_v})
        for pass_k, pass_v in key_passes(head_dim, call.itemsize, call.capability, need_k, need_v)
        if pass_k or pass_v
    ]
    return launches, parts


def sum_launch(elements: int, parts: int) -> Launch:
    """Adds the parts of a gradient of so many elements, in order."""
    unit = 8 if elements % 8 == 0 else 1
    sizes = {"units": elements // unit, "parts": parts, "UNIT": unit, "BLOCK": 1024}
    return Launch(_attention_bwd_sum_kernel, (triton.cdiv(elements, 1024),), sizes, num_warps=4)
