"""value * gelu(gate) in Triton: elementwise over rows of packed [value | gate], one read of each and one write."""

import triton
import triton.language as tl
from torch import Tensor

from cnkernels.geglu.triton_common import SQRT_HALF, launch_of, tile
from cnkernels.launch import Launch


@triton.jit
def _geglu_fwd_kernel(
    projected_ptr,  # [rows, 2 * columns]
    out_ptr,  # [rows, columns], contiguous
    rows,
    columns,
    stride_row,  # of projected
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    row, column, mask = tile(rows, columns, BLOCK_ROWS, BLOCK_COLUMNS)
    projected = projected_ptr + row * stride_row + column
    value = tl.load(projected, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(projected + columns, mask=mask, other=0.0).to(tl.float32)
    cdf = 0.5 * (1.0 + tl.erf(gate * SQRT_HALF))
    tl.store(out_ptr + row * columns + column, value * (gate * cdf), mask=mask)


def forward_launch(projected: Tensor) -> Launch:
    """For `projected` [rows, 2 * columns]."""
    rows, width = projected.shape
    return launch_of(_geglu_fwd_kernel, rows, width // 2, {"stride_row": projected.stride(0)})
