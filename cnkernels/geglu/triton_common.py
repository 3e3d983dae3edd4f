"""What the forward and the backward kernel share: a tile of rows of packed [value | gate], and its size."""

from collections.abc import Mapping
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from cnkernels import layout
from cnkernels.configurations import rule
from cnkernels.launch import Launch

SQRT_HALF = tl.constexpr(0.7071067811865476)


@dataclass(frozen=True)
class Tile:
    """Of the output, and how it is launched."""

    rows: int
    columns: int
    num_warps: int


@rule("geglu", lambda own, *_: [Tile(4, 256, 4), Tile(8, 512, 8), Tile(16, 256, 8), Tile(2, 1024, 4)])
def tile_of(columns: int) -> Tile:
    """Eight rows of 256 columns are 16 elements a thread: two 16-byte loads of each half in half precision."""
    return Tile(8, 256, 4)


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
    block = tile_of(columns)
    grid = (triton.cdiv(rows, block.rows) * triton.cdiv(columns, block.columns),)
    sizes = {"rows": rows, "columns": columns, **strides, "BLOCK_ROWS": block.rows, "BLOCK_COLUMNS": block.columns}
    return Launch(kernel, grid, sizes, block.num_warps, num_stages=1)


def row_matrix(t: Tensor) -> Tensor:
    """`t` as [rows, columns] with contiguous rows; a view wherever that is possible."""
    return layout.adjacent(t.reshape(-1, t.shape[-1]))
