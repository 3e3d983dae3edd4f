"""value * gelu(gate) in Triton: elementwise over rows of packed [value | gate], one read of each and one write."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cnkernels import layout
from cnkernels.aot_case import AotCase
from cnkernels.launch import Launch

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_RSQRT_TWO_PI = tl.constexpr(0.3989422804014327)

# Eight rows of 256 columns are 16 elements a thread: two 16-byte loads of each half in half precision.
_CONFIG = {"BLOCK_ROWS": 8, "BLOCK_COLUMNS": 256, "num_warps": 4, "num_stages": 1}


@triton.jit
def _tile(rows, columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Row and column indices (64 bit) and the mask of this program's tile."""
    tiles = tl.cdiv(columns, BLOCK_COLUMNS)
    pid = tl.program_id(0)
    row = (pid // tiles).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = (pid % tiles).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    return row[:, None], column[None, :], (row < rows)[:, None] & (column < columns)[None, :]


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
    row, column, mask = _tile(rows, columns, BLOCK_ROWS, BLOCK_COLUMNS)
    projected = projected_ptr + row * stride_row + column
    value = tl.load(projected, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(projected + columns, mask=mask, other=0.0).to(tl.float32)
    cdf = 0.5 * (1.0 + tl.erf(gate * _SQRT_HALF))
    tl.store(out_ptr + row * columns + column, value * (gate * cdf), mask=mask)


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
    row, column, mask = _tile(rows, columns, BLOCK_ROWS, BLOCK_COLUMNS)
    projected = projected_ptr + row * stride_row + column
    dout = tl.load(dout_ptr + row * stride_dout + column, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(projected, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(projected + columns, mask=mask, other=0.0).to(tl.float32)
    cdf = 0.5 * (1.0 + tl.erf(gate * _SQRT_HALF))
    density = tl.exp(-0.5 * gate * gate) * _RSQRT_TWO_PI
    dprojected = dprojected_ptr + 2 * row * columns + column
    tl.store(dprojected, dout * (gate * cdf), mask=mask)
    tl.store(dprojected + columns, dout * value * (cdf + gate * density), mask=mask)


def geglu_fwd(projected: Tensor) -> Tensor:
    shape = (*projected.shape[:-1], projected.shape[-1] // 2)
    out = torch.empty(shape, dtype=projected.dtype, device=projected.device)
    if out.numel():
        _forward(projected, out)()
    return out


def geglu_bwd(dout: Tensor, projected: Tensor) -> Tensor:
    dprojected = torch.empty(projected.shape, dtype=projected.dtype, device=projected.device)
    if dout.numel():
        _backward(dout, projected, dprojected)()
    return dprojected


def aot_cases() -> list[AotCase]:
    """The kernels as SD 1.5's transformers launch them at batch 2, for `cnkernels.aot`.

    And for one element: sizes and strides of one are constants to the compiler.
    """
    cases = []
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for rows, columns in ((8192, 1280), (2048, 2560), (512, 5120), (128, 5120), (1, 1)):
            projected = torch.empty((rows, 2 * columns), dtype=dtype, device="meta")
            out = projected[..., :columns].contiguous()
            for launch in (_forward(projected, out), _backward(out, projected, projected)):
                job = "forward" if launch.kernel is _geglu_fwd_kernel else "backward"
                cases.append(launch.case(f"geglu {job} {rows}x{columns} {str(dtype).removeprefix('torch.')}"))
    return cases


def _forward(projected: Tensor, out: Tensor) -> Launch:
    projected = _rows(projected)
    rows, columns = projected.shape[0], out.shape[-1]
    arguments = (projected, out, rows, columns, projected.stride(0))
    return Launch(_geglu_fwd_kernel, _grid(rows, columns), arguments, _CONFIG)


def _backward(dout: Tensor, projected: Tensor, dprojected: Tensor) -> Launch:
    dout, projected = _rows(dout), _rows(projected)
    rows, columns = dout.shape
    arguments = (dout, projected, dprojected, rows, columns, dout.stride(0), projected.stride(0))
    return Launch(_geglu_bwd_kernel, _grid(rows, columns), arguments, _CONFIG)


def _grid(rows: int, columns: int) -> tuple[int]:
    return (triton.cdiv(rows, _CONFIG["BLOCK_ROWS"]) * triton.cdiv(columns, _CONFIG["BLOCK_COLUMNS"]),)


def _rows(t: Tensor) -> Tensor:
    """`t` as [rows, columns] with contiguous rows; a view wherever that is possible."""
    return layout.adjacent(t.reshape(-1, t.shape[-1]))
