"""What the forward and the backward kernel share: a tile of rows of packed [value | gate], and its size."""

from collections.abc import Mapping

import triton
import triton.language as tl
from torch import Tensor

from cnkernels import layout
from cnkernels.launch import Launch

SQRT_HALF = tl.constexpr(0.7071067811865476)

# Eight rows of 256 columns are 16 elements a thread: two 16-byte loads of each half in half precision.
BLOCK_ROWS, BLOCK_COLUMNS = 8, 256


@triton.jit
def tile(rows, columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Row and column indices (64 bit) and the mask of this program's tile."""
    tiles = tl.cdiv(columns, BLOCK_COLUMNS)
    pid = tl.program_id(0)
    row = (pid // tiles).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = (pid % tiles).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    return row[:, None], column[None, :], (row < rows)[:, None] & (column < columns)[None, :]


def launch_of(kernel: object, rows: int, columns: int, strides: Mapping[str, int]) -> Launch:
    """`strides` from row to row, by the kernel's names."""
    grid = (triton.cdiv(rows, BLOCK_ROWS) * triton.cdiv(columns, BLOCK_COLUMNS),)
    sizes = {"rows": rows, "columns": columns, **strides, "BLOCK_ROWS": BLOCK_ROWS, "BLOCK_COLUMNS": BLOCK_COLUMNS}
    return Launch(kernel, grid, sizes, num_warps=4, num_stages=1)


def row_matrix(t: Tensor) -> Tensor:
    """`t` as [rows, columns] with contiguous rows; a view wherever that is possible."""
    return layout.adjacent(t.reshape(-1, t.shape[-1]))
