"""A 1x1 convolution with its scale and residual in Triton: x * weight^T over pixels, with an epilogue."""

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
    product_tile,
    scale_stride,
)


@triton.jit
def _zero_conv_add_kernel(
    x_ptr,  # [N, K, hw]
    weight_ptr,  # [Cout, K]
    bias_ptr,  # [Cout] or None
    residual_ptr,  # [N, Cout, hw] or None
    scale_ptr,  # float32, [] or [N], or None: then `scale`
    out_ptr,  # [N, Cout, hw]
    scale,
    rows,  # N * hw
    hw,
    channels,  # Cout
    depth,  # K
    stride_xn,
    stride_xp,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_rn,
    stride_rp,
    stride_rc,
    stride_on,
    stride_op,
    stride_oc,
    stride_scale,
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
        stride_wn,
        stride_wk,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + column, mask=in_column, other=0.0).to(tl.float32)[None, :]
    if scale_ptr is not None:
        acc *= tl.load(scale_ptr + sample * stride_scale, mask=in_row, other=0.0)[:, None]
    else:
        acc *= scale
    mask = in_row[:, None] & in_column[None, :]
    channel = column.to(tl.int64)[None, :]
    if residual_ptr is not None:
        offset = (sample * stride_rn + pixel * stride_rp)[:, None] + channel * stride_rc
        acc += tl.load(residual_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    offset = (sample * stride_on + pixel * stride_op)[:, None] + channel * stride_oc
    tl.store(out_ptr + offset, acc, mask=mask)


def product_launch(x: Tensor, weight: Tensor, residual: Tensor | None, scale: Scale, out: Tensor) -> Launch:
    """out = residual + scale * (x * weight^T + bias), for a `weight` of any strides."""
    samples, channels, height, width = out.shape
    rows = samples * height * width
    config = product_tile(rows, channels, x.dtype)
    sizes = {
        "rows": rows,
        "hw": height * width,
        "channels": channels,
        "depth": x.shape[1],
        **pixel_strides(x, "stride_xn", "stride_xp", "stride_xk"),
        "stride_wn": weight.stride(0),
        "stride_wk": weight.stride(1),
        **pixel_strides(residual, "stride_rn", "stride_rp", "stride_rc"),
        **pixel_strides(out, "stride_on", "stride_op", "stride_oc"),
        "stride_scale": scale_stride(scale),
        "INDEX": index_type(rows),
    }
    grid = (triton.cdiv(rows, config.rows) * triton.cdiv(channels, config.columns),)
    return config.launch(_zero_conv_add_kernel, grid, sizes, ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
