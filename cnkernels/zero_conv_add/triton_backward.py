"""Gradients of a 1x1 convolution in Triton. Those of weight and bias are sums over pixels, split and added in order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cnkernels.launch import Launch
from cnkernels.zero_conv_add.triton_common import (
    Scale,
    index_type,
    pixel_strides,
    pixels,
    product,
    scale_arguments,
    tile_config,
)

_MANY_PROGRAMS = 384  # a few for each multiprocessor
_SUM = {"BLOCK_S": 8, "BLOCK": 256, "num_warps": 4, "num_stages": 1}


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


def dscale_launch(dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Launch, Tensor]:
    """And what it fills: [tiles, N, hw] whose sum over tiles and pixels is the gradient of a sample's scale."""
    samples, channels, height, width = dout.shape
    rows, depth = samples * height * width, x.shape[1]
    config = tile_config(rows, channels, x.dtype)
    tiles = triton.cdiv(channels, config["BLOCK_N"])
    dots = torch.empty((tiles, samples, height * width), dtype=torch.float32, device=x.device)
    sizes, strides = (rows, height * width, channels, depth), (*pixel_strides(x), *pixel_strides(dout))
    grid = (triton.cdiv(rows, config["BLOCK_M"]) * tiles,)
    arguments = (x, weight, bias, dout, dots, *sizes, *strides)
    return Launch(_zero_conv_add_dscale_kernel, grid, arguments, {"INDEX": index_type(rows), **config}), dots


def dweight_launch(
    dout: Tensor, x: Tensor, weight: Tensor, scale: Scale, need_weight: bool, need_bias: bool
) -> tuple[Launch, Tensor | None, Tensor | None]:
    """And the partial sums that it fills: [splits, Cout, Cin, 1, 1] and [splits, Cout], None where not needed.

    One split writes the gradients themselves; several write float32, for `sum_launch` to add in order.
    """
    channels, depth = weight.shape[:2]
    samples, pixels = x.shape[0], x.shape[2] * x.shape[3]
    scale_tensor, factor, stride_scale = scale_arguments(scale)
    per_sample = isinstance(scale, Tensor) and scale.dim() > 0
    max_splits = _max_splits(samples * pixels, channels + depth)
    config = tile_config(channels, depth, x.dtype, max_splits)
    blocks = {"BLOCK_O": config["BLOCK_M"], "BLOCK_C": config["BLOCK_N"], "BLOCK_P": config["BLOCK_K"]}
    tiles = triton.cdiv(channels, blocks["BLOCK_O"]) * (triton.cdiv(depth, blocks["BLOCK_C"]) if need_weight else 1)
    if not per_sample and all(pixel_strides(t)[0] == pixels * pixel_strides(t)[1] for t in (dout, x)):
        samples, pixels = 1, samples * pixels  # as one long image: no step is cut short by the end of a sample
    sample_steps = triton.cdiv(pixels, blocks["BLOCK_P"])
    steps = samples * sample_steps
    split_steps = triton.cdiv(steps, min(triton.cdiv(_MANY_PROGRAMS, tiles), max_splits))
    splits = triton.cdiv(steps, split_steps)
    partial = {"dtype": weight.dtype if splits == 1 else torch.float32, "device": x.device}
    dweight = torch.empty((splits, channels, depth, 1, 1), **partial) if need_weight else None
    dbias = torch.empty((splits, channels), **partial) if need_bias else None
    sizes = (samples, pixels, channels, depth, sample_steps, split_steps)
    strides = (*pixel_strides(dout), *pixel_strides(x), stride_scale)
    arguments = (dout, x, scale_tensor, dweight, dbias, factor, *sizes, *strides)
    config = {"PER_SAMPLE": per_sample, **blocks, **{key: config[key] for key in ("num_warps", "num_stages")}}
    return Launch(_zero_conv_add_dweight_kernel, (tiles, splits), arguments, config), dweight, dbias


def sum_launch(partial: Tensor, out: Tensor) -> Launch:
    """out = partial.sum(0), in order."""
    grid = (triton.cdiv(out.numel(), _SUM["BLOCK"]),)
    return Launch(_sum_splits_kernel, grid, (partial, out, partial.shape[0], out.numel()), _SUM)


def _max_splits(pixels: int, channels: int) -> int:
    """As many splits as write about half as many bytes of partial sums as are read; `channels` is Cout + Cin."""
    return max(1, pixels // (2 * channels))
