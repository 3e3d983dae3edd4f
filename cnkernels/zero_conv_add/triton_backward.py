"""Gradients of a 1x1 convolution in Triton. Those of weight and bias are sums over pixels, split and added in order."""

import triton
import triton.language as tl
from torch import Tensor

from cnkernels.launch import Launch
from cnkernels.zero_conv_add.triton_common import (
    Scale,
    evenly_strided,
    index_type,
    pixel_strides,
    pixels,
    product,
    scale_stride,
    tile_config,
    weight_gradient_tile,
)

_MANY_PROGRAMS = 384  # a few for each multiprocessor


@triton.jit
def _zero_conv_add_dscale_kernel(
    x_ptr,  # [N, K, hw]
    weight_ptr,  # [Cout, K], contiguous
    bias_ptr,  # [Cout] or None
    dout_ptr,  # [N, Cout, hw]
    dots_ptr,  # [tiles of Cout, N * hw], float32: each pixel's sum of dout * (conv + bias) over a tile's channels
    rows,
    hw,
    channels,
    depth,
    stride_xn,
    stride_xp,
    stride_xk,
    stride_dn,
    stride_dp,
    stride_dc,
    INDEX: tl.constexpr,  # the integer type of a row's index
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles = tl.cdiv(channels, BLOCK_N)
    pid = tl.program_id(0)
    row, sample, pixel, in_row = pixels(pid // tiles, hw, rows, INDEX, BLOCK_M)
    column = pid % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    in_column = column < channels
    acc = product(
        x_ptr,
        weight_ptr,
        sample * stride_xn + pixel * stride_xp,
        in_row,
        column,
        in_column,
        depth,
        stride_xk,
        depth,
        1,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + column, mask=in_column, other=0.0).to(tl.float32)[None, :]
    offset = (sample * stride_dn + pixel * stride_dp)[:, None] + column.to(tl.int64)[None, :] * stride_dc
    dout = tl.load(dout_ptr + offset, mask=in_row[:, None] & in_column[None, :], other=0.0).to(tl.float32)
    dots = dots_ptr + (pid % tiles).to(tl.int64) * rows + row
    tl.store(dots, tl.sum(acc * dout, axis=1), mask=in_row)


@triton.jit
def _zero_conv_add_dweight_kernel(
    dout_ptr,  # [N, Cout, hw]
    x_ptr,  # [N, Cin, hw]
    scale_ptr,  # float32, [] or [N], or None: then `scale`
    dweight_ptr,  # [splits, Cout, Cin] or None
    dbias_ptr,  # [splits, Cout] or None
    scale,
    samples,
    hw,
    channels,  # Cout
    depth,  # Cin
    sample_steps,  # steps of BLOCK_P pixels in a sample
    split_steps,  # steps in a split
    stride_dn,
    stride_dp,
    stride_dc,
    stride_xn,
    stride_xp,
    stride_xk,
    stride_scale,
    PER_SAMPLE: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """dweight = sum_m scale * dout[m, :]^T x[m, :] and dbias = sum_m scale * dout[m, :] over one split of the pixels.

    The bias's sum is a product with ones: dout is then needed by the matrix units alone.
    """
    tiles = tl.cdiv(depth, BLOCK_C) if dweight_ptr is not None else 1
    pid, split = tl.program_id(0), tl.program_id(1)
    out_channel = pid // tiles * BLOCK_O + tl.arange(0, BLOCK_O)
    in_channel = pid % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    is_out, is_in = out_channel < channels, in_channel < depth
    dout_ptrs = dout_ptr + out_channel.to(tl.int64)[:, None] * stride_dc
    x_ptrs = x_ptr + in_channel.to(tl.int64)[None, :] * stride_xk
    dweight = tl.zeros((BLOCK_O, BLOCK_C), tl.float32)
    dbias = tl.zeros((BLOCK_O, 16), tl.float32)  # 16 equal columns
    ones = tl.full((BLOCK_P, 16), 1.0, tl.float32).to(dout_ptr.dtype.element_ty)
    for step in range(split * split_steps, tl.minimum((split + 1) * split_steps, samples * sample_steps)):
        sample = (step // sample_steps).to(tl.int64)
        pixel = (step % sample_steps).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
        is_pixel = pixel < hw
        dout_row, x_row = sample * stride_dn + pixel * stride_dp, sample * stride_xn + pixel * stride_xp
        dout = tl.load(dout_ptrs + dout_row[None, :], mask=is_out[:, None] & is_pixel[None, :], other=0.0)
        factor = tl.load(scale_ptr + sample * stride_scale) if PER_SAMPLE else 1.0
        if dweight_ptr is not None:
            x = tl.load(x_ptrs + x_row[:, None], mask=is_pixel[:, None] & is_in[None, :], other=0.0)
            dweight = _accumulate(dweight, dout, x, factor, PER_SAMPLE)
        if dbias_ptr is not None:
            dbias = _accumulate(dbias, dout, ones, factor, PER_SAMPLE)
    if not PER_SAMPLE:
        factor = scale if scale_ptr is None else tl.load(scale_ptr)
        dweight *= factor
        dbias *= factor
    offset = split.to(tl.int64) * channels + out_channel
    if dweight_ptr is not None:
        dweight_ptrs = dweight_ptr + offset[:, None] * depth + in_channel[None, :]
        tl.store(dweight_ptrs, dweight, mask=is_out[:, None] & is_in[None, :])
    if dbias_ptr is not None:
        once = tl.where(pid % tiles == 0, channels, 0)  # the programs of the other tiles have the same sums
        tl.store(dbias_ptr + offset, tl.max(dbias, axis=1), mask=out_channel < once)


@triton.jit
def _accumulate(acc, a, b, factor, PER_SAMPLE: tl.constexpr):
    # The factor is applied to the float32 product: applied to an operand it would be rounded to half precision.
    if PER_SAMPLE:
        return acc + factor * tl.dot(a, b, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _sum_splits_kernel(
    partial_ptr,  # [splits, numel], float32
    out_ptr,  # [numel]
    splits,
    numel,
    BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < numel
    acc = tl.zeros((BLOCK_S, BLOCK), tl.float32)
    for start in range(0, splits, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S)
        offsets = split.to(tl.int64)[:, None] * numel + index[None, :]
        acc += tl.load(partial_ptr + offsets, mask=(split < splits)[:, None] & mask[None, :], other=0.0)
    tl.store(out_ptr + index, tl.sum(acc, axis=0), mask=mask)


def dscale_launch(dout: Tensor, x: Tensor) -> tuple[Launch, tuple[int, int, int]]:
    """And the shape of what it fills, [tiles, N, hw], whose sum over tiles and pixels is a sample's gradient."""
    samples, channels, height, width = dout.shape
    rows = samples * height * width
    config = tile_config(rows, channels, x.dtype)
    tiles = triton.cdiv(channels, config.columns)
    sizes = {
        "rows": rows,
        "hw": height * width,
        "channels": channels,
        "depth": x.shape[1],
        **pixel_strides(x, "stride_xn", "stride_xp", "stride_xk"),
        **pixel_strides(dout, "stride_dn", "stride_dp", "stride_dc"),
        "INDEX": index_type(rows),
    }
    grid = (triton.cdiv(rows, config.rows) * tiles,)
    launch = config.launch(_zero_conv_add_dscale_kernel, grid, sizes, ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    return launch, (tiles, samples, height * width)


def dweight_launch(dout: Tensor, x: Tensor, scale: Scale, need_weight: bool) -> tuple[Launch, int]:
    """And in how many splits of the pixels, [splits, Cout, Cin] and [splits, Cout], it sums.

    One split writes the gradients themselves; several write float32, for `sum_launch` to add in order.
    """
    channels, depth = dout.shape[1], x.shape[1]
    samples, pixels = x.shape[0], x.shape[2] * x.shape[3]
    per_sample = isinstance(scale, Tensor) and scale.dim() > 0
    max_splits = _max_splits(samples * pixels, channels + depth)
    config = weight_gradient_tile(channels, depth, x.dtype, max_splits)
    tiles = triton.cdiv(channels, config.rows) * (triton.cdiv(depth, config.columns) if need_weight else 1)
    strides = (evenly_strided(t) for t in (dout, x))
    if not per_sample and all(sample == pixels * pixel for sample, pixel, _ in strides):
        samples, pixels = 1, samples * pixels  # as one long image: no step is cut short by the end of a sample
    sample_steps = triton.cdiv(pixels, config.depth)
    steps = samples * sample_steps
    split_steps = triton.cdiv(steps, min(triton.cdiv(_MANY_PROGRAMS, tiles), max_splits))
    splits = triton.cdiv(steps, split_steps)
    sizes = {
        "samples": samples,
        "hw": pixels,
        "channels": channels,
        "depth": depth,
        "sample_steps": sample_steps,
        "split_steps": split_steps,
        **pixel_strides(dout, "stride_dn", "stride_dp", "stride_dc"),
        **pixel_strides(x, "stride_xn", "stride_xp", "stride_xk"),
        "stride_scale": scale_stride(scale),
        "PER_SAMPLE": per_sample,
    }
    launch = config.launch(_zero_conv_add_dweight_kernel, (tiles, splits), sizes, ("BLOCK_O", "BLOCK_C", "BLOCK_P"))
    return launch, splits


def sum_launch(splits: int, elements: int) -> Launch:
    """Adds the splits of so many elements, in order."""
    sizes = {"splits": splits, "numel": elements, "BLOCK_S": 8, "BLOCK": 256}
    return Launch(_sum_splits_kernel, (triton.cdiv(elements, 256),), sizes, num_warps=4, num_stages=1)


def _max_splits(pixels: int, channels: int) -> int:
    """As many splits as write about half as many bytes of partial sums as are read; `channels` is Cout + Cin."""
    return max(1, pixels // (2 * channels))
