"""The gradient of value * gelu(gate) in Triton: elementwise, both halves at once."""

import triton
import triton.language as tl
from torch import Tensor

from cnkernels.geglu.triton_common import SQRT_HALF, launch_of, tile
from cnkernels.launch import Launch

_RSQRT_TWO_PI = tl.constexpr(0.3989422804014327)


@triton.jit
def _geglu_bwd_kernel(
    dout_ptr,  # [rows, columns]
    projected_ptr,  # [rows, 2 * columns]
    dprojected_ptr,  # [rows, 2 * columns], contiguous
    rows,
    columns,
    stride_dout,  # of a row
    stride_row,  # of projected
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    row, column, mask = tile(rows, columns, BLOCK_ROWS, BLOCK_COLUMNS)
    projected = projected_ptr + row * stride_row + column
    dout = tl.load(dout_ptr + row * stride_dout + column, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(projected, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(projected + columns, mask=mask, other=0.0).to(tl.float32)
    cdf = 0.5 * (1.0 + tl.erf(gate * SQRT_HALF))
    density = tl.exp(-0.5 * gate * gate) * _RSQRT_TWO_PI
    dprojected = dprojected_ptr + 2 * row * columns + column
    tl.store(dprojected, dout * (gate * cdf), mask=mask)
    tl.store(dprojected + columns, dout * value * (cdf + gate * density), mask=mask)


def backward_launch(dout: Tensor, projected: Tensor) -> Launch:
    """For `dout` [rows, columns] and `projected` [rows, 2 * columns]."""
    strides = {"stride_dout": dout.stride(0), "stride_row": projected.stride(0)}
    return launch_of(_geglu_bwd_kernel, *dout.shape, strides)
