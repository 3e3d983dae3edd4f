"""Matrix products over pixels in Triton: x * weight^T with the epilogue of zero_conv_add, and its dot with a gradient.

The rows of a product are pixels, m = n * hw + p over the samples n and the hw pixels p of each. A tensor [N, C, H, W]
is read through its strides of (n, p, c), so that contiguous and channels_last tensors, and channel slices of larger
ones, are all read and written where they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from cnkernels.configurations import rule
from cnkernels.launch import Launch

Scale = float | Tensor

# A product gets the first of these tiles of which there are enough for every multiprocessor of a large GPU.
_TILES = ((128, 128, 64, 8), (128, 64, 64, 8), (64, 64, 64, 4), (64, 32, 64, 4))  # rows, columns, depth, warps
_TILES_FLOAT32 = ((64, 64, 16, 8), (32, 32, 16, 4))  # float32 is multiplied outside the matrix units
_ENOUGH_PROGRAMS = 128
_SHARED_MEMORY = 96 * 1024  # bytes for the stages of a pipeline: what a block of sm_120 has, less some scratch


@triton.jit
def pixels(pid, hw, rows, INDEX: tl.constexpr, BLOCK_M: tl.constexpr):
    """Of each row of tile `pid`: the row m, its sample and pixel (64 bit), and whether there is such a row."""
    row = pid.to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    return row, (row // hw).to(tl.int64), (row % hw).to(tl.int64), row < rows


@triton.jit
def product(
    x_ptr,
    weight_ptr,
    pixel_offset,  # [BLOCK_M]
    in_row,
    column,  # [BLOCK_N]
    in_column,
    depth,
    stride_xk,
    stride_wn,
    stride_wk,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """sum_k x[m, k] * weight[n, k], in float32."""
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    x_ptrs = x_ptr + pixel_offset[:, None] + k[None, :] * stride_xk
    weight_ptrs = weight_ptr + k[:, None] * stride_wk + column.to(tl.int64)[None, :] * stride_wn
    step = tl.full((), BLOCK_K, tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, depth, BLOCK_K):
        in_depth = k < depth - start
        x = tl.load(x_ptrs, mask=in_row[:, None] & in_depth[None, :], other=0.0)
        weight = tl.load(weight_ptrs, mask=in_depth[:, None] & in_column[None, :], other=0.0)
        acc = tl.dot(x, weight, acc, input_precision="ieee")
        x_ptrs += step * stride_xk
        weight_ptrs += step * stride_wk
    return acc


def index_type(rows: int) -> tl.dtype:
    # A 64-bit division is a subroutine of a hundred instructions, so only those who need it get it.
    return tl.int32 if rows < 2**31 - 2**7 else tl.int64


def scale_stride(scale: Scale) -> int:
    """From the scale of a sample to that of the next."""
    return scale.stride(0) if isinstance(scale, Tensor) and scale.dim() else 0


def scale_operands(scale: Scale) -> tuple[Tensor | None, float]:
    """The kernels' (scale_ptr, scale)."""
    return (scale, 1.0) if isinstance(scale, Tensor) else (None, scale)


def evenly_strided(t: Tensor) -> tuple[int, int, int]:
    """Strides of (n, p, c) of a tensor [N, C, H, W] with evenly strided pixels p = h * W + w."""
    return t.stride(0), t.stride(2) if t.shape[3] == 1 else t.stride(3), t.stride(1)


def pixel_strides(t: Tensor | None, *names: str) -> dict[str, int]:
    """The strides of (n, p, c) by a kernel's names; 0 of an absent tensor."""
    return dict(zip(names, (0, 0, 0) if t is None else evenly_strided(t), strict=True))


@dataclass(frozen=True)
class Tile:
    """Of a product, and how it is launched."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int

    def launch(self, kernel: object, grid: tuple[int, ...], sizes: dict[str, object], names: Sequence[str]) -> Launch:
        """`names` are the kernel's constants for rows, columns and depth."""
        blocks = dict(zip(names, (self.rows, self.columns, self.depth), strict=True))
        return Launch(kernel, grid, sizes | blocks, self.num_warps, self.num_stages)


def tile_config(rows: int, columns: int, dtype: torch.dtype, max_splits: int = 1) -> Tile:
    """For a product of that many rows and columns, whose sum may be split in `max_splits`."""
    tiles = _TILES_FLOAT32 if dtype == torch.float32 else _TILES
    enough = (
        tile
        for tile in tiles
        if triton.cdiv(rows, tile[0]) * triton.cdiv(columns, tile[1]) * max_splits >= _ENOUGH_PROGRAMS
    )
    return _tile(next(enough, tiles[-1]), dtype)


def _tile(sizes: tuple[int, int, int, int], dtype: torch.dtype) -> Tile:
    """With as many stages as fit shared memory."""
    block_m, block_n, block_k, num_warps = sizes
    stages = _SHARED_MEMORY // ((block_m + block_n) * block_k * dtype.itemsize)
    return Tile(block_m, block_n, block_k, num_warps, min(4, stages))


def _candidates(own: Tile, rows: int, columns: int, dtype: torch.dtype, max_splits: int = 1) -> list[Tile]:
    """The other tiles, and one stage less."""
    others = [_tile(sizes, dtype) for sizes in (_TILES_FLOAT32 if dtype == torch.float32 else _TILES)]
    return [*others, *([replace(own, num_stages=own.num_stages - 1)] if own.num_stages > 2 else [])]


product_tile = rule("zero_conv_add product", _candidates)(tile_config)
weight_gradient_tile = rule("zero_conv_add weight gradient", _candidates)(tile_config)
