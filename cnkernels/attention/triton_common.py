"""What the forward and backward attention kernels share: head dimensions as column blocks, and arithmetic on them.

tl.arange needs a power of two; head dimensions are 40, 80, 160. A [rows, head_dim] tile is therefore a tuple of tiles
whose widths are powers of two (40 = 32 + 16 with 8 columns masked, 80 = 64 + 16, 160 = 128 + 32), so that the matrix
units work on 48, 80 and 160 columns.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from cnkernels.launch import Launch


@dataclass(frozen=True)
class Config:
    """How one kernel is launched: its tiles and the compiler's options."""

    block_m: int  # queries
    block_n: int  # keys
    num_warps: int
    num_stages: int
    maxnreg: int | None = None  # caps the registers of a thread where two programs then share a multiprocessor

    def launch(self, kernel: object, *grid: int, sizes: Mapping[str, object]) -> Launch:
        return Launch(kernel, grid, sizes, self.num_warps, self.num_stages, self.maxnreg)


def candidates(own: Config, *_: object) -> list[Config]:
    """Configurations to measure beside the rule's own: fewer or more keys, more or fewer queries, another stage."""
    block_m, num_warps = (64, 4) if own.block_m == 128 else (2 * own.block_m, own.num_warps)
    found = [
        replace(own, block_n=own.block_n // 2),
        replace(own, block_n=2 * own.block_n),
        replace(own, block_m=block_m, num_warps=num_warps),
        replace(own, num_stages=own.num_stages + 1),
        replace(own, maxnreg=None),
    ]
    return [config for config in found if 16 <= config.block_n <= 128]


def column_blocks(size: int, widest: int = 256) -> tuple[int, ...]:
    """Powers of two from 16 (the least a matrix unit takes) to `widest`, decreasing, that cover `size` columns.

    Whole blocks of `widest`, then at most two: column_blocks(40) == (32, 16), column_blocks(56) == (64,).
    """
    blocks = (widest,) * (size // widest)
    rest = size % widest
    if rest == 0:
        return blocks
    first = max(16, 1 << (rest.bit_length() - 1))
    if rest <= first:
        return (*blocks, first)
    second = max(16, triton.next_power_of_2(rest - first))
    return (*blocks, 2 * first) if second == first else (*blocks, first, second)


def widest_block(itemsize: int, capability: int) -> int:
    """The widest column block: what a product keeps in registers must fit there.

    sm_90 and sm_100 multiply half precision out of shared memory, the others out of registers. float32 has no matrix
    units that are exact: its products are unrolled, element by element.
    """
    if itemsize == 4:
        return 16
    return 256 if capability in (9, 10) else 32


def alignment(*tensors: torch.Tensor) -> int:
    """Elements in 16 bytes if every stride of every tensor is a multiple of that many, else 1.

    Kernels take strides in this unit: Triton itself learns only of divisibility by 16, and heads of 40 columns would be
    read one element at a time.
    """
    unit = 16 // tensors[0].element_size()
    return unit if all(stride % unit == 0 for t in tensors for stride in strides(t)) else 1


def strides(tensor: torch.Tensor, unit: int = 1) -> tuple[int, int, int]:
    """Strides of batch, sequence and head of a [B, S, H, D] tensor in `unit` elements; 0 where there is only one."""
    return tuple(tensor.stride(d) // unit if tensor.shape[d] > 1 else 0 for d in range(3))


def compute_capability(tensor: torch.Tensor) -> int:
    """Major compute capability of the tensor's GPU; 9 for tensors of Triton's interpreter."""
    return torch.cuda.get_device_capability(tensor.device)[0] if tensor.is_cuda else 9


def named_strides(unit: int, **tensors: torch.Tensor) -> dict[str, int]:
    """`strides` of each tensor by the kernels' names: stride_qb, stride_qs and stride_qh of `q`."""
    return {
        f"stride_{name}{axis}": stride
        for name, tensor in tensors.items()
        for axis, stride in zip("bsh", strides(tensor, unit), strict=True)
    }


@triton.constexpr_function
def first_column(blocks, i):
    return sum(blocks[:i])


@triton.constexpr_function
def tile_shape(rows, blocks, i):
    return [rows, blocks[i]]


@triton.jit
def program(tiles, heads):
    """This program's tile, batch and head: tiles of one head are neighbours, so that they meet in the L2 cache."""
    index = tl.program_id(0)
    head = index // tiles
    return index % tiles, (head // heads).to(tl.int64), (head % heads).to(tl.int64)


@triton.jit
def zero_tiles(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    tiles = ()
    for i in tl.static_range(len(COLUMNS)):
        tiles = tiles + (tl.zeros(tile_shape(ROWS, COLUMNS, i), tl.float32),)
    return tiles


@triton.jit
def load_tiles(ptr, rows, stride, length, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, MASK_ROWS: tl.constexpr):
    """Rows `rows` (int64) of a [length, HEAD_DIM] matrix; 0 past HEAD_DIM and, with MASK_ROWS, past length."""
    tiles = ()
    for i in tl.static_range(len(COLUMNS)):
        columns = first_column(COLUMNS, i) + tl.arange(0, COLUMNS[i])
        mask = (columns < HEAD_DIM)[None, :]
        if MASK_ROWS:
            mask = mask & (rows < length)[:, None]
        tiles = tiles + (tl.load(ptr + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0),)
    return tiles


@triton.jit
def store_tiles(ptr, tiles, rows, stride, length, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr):
    for i in tl.static_range(len(COLUMNS)):
        columns = first_column(COLUMNS, i) + tl.arange(0, COLUMNS[i])
        mask = (columns < HEAD_DIM)[None, :] & (rows < length)[:, None]
        tl.store(ptr + rows[:, None] * stride + columns[None, :], tiles[i].to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def product_nt(a, b):
    """a @ b^T over all column blocks. "ieee" keeps float32 from being rounded to tf32; other dtypes ignore it."""
    product = tl.dot(a[0], tl.trans(b[0]), input_precision="ieee")
    for i in tl.static_range(1, len(a)):
        product = tl.dot(a[i], tl.trans(b[i]), product, input_precision="ieee")
    return product


@triton.jit
def add_product(accumulator, a, b):
    """accumulator + a @ b for every column block of b, with a rounded to b's dtype."""
    a = a.to(b[0].dtype)
    summed = ()
    for i in tl.static_range(len(b)):
        summed = summed + (tl.dot(a, b[i], accumulator[i], input_precision="ieee"),)
    return summed


@triton.jit
def scale_tiles(tiles, factor):
    scaled = ()
    for i in tl.static_range(len(tiles)):
        scaled = scaled + (tiles[i] * factor,)
    return scaled
