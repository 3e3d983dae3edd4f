"""geglu in Triton: what each call allocates and launches, and what is compiled ahead of time."""

from collections.abc import Callable

import torch
from torch import Tensor

from cnkernels import layout
from cnkernels.aot_case import AotCase
from cnkernels.geglu.triton_backward import backward_launch
from cnkernels.geglu.triton_common import row_matrix
from cnkernels.geglu.triton_forward import forward_launch
from cnkernels.register import dtype_name

_FORWARD = ("projected_ptr", "out_ptr")
_BACKWARD = ("dout_ptr", "projected_ptr", "dprojected_ptr")


def geglu_fwd(projected: Tensor) -> Tensor:
    return geglu_fwd_plan(projected)(projected)


def geglu_fwd_plan(projected: Tensor) -> Callable[[Tensor], Tensor]:
    """What runs geglu_fwd for a tensor like this."""
    device, rows = projected.device, row_matrix(projected)
    new = layout.allocator((*projected.shape[:-1], projected.shape[-1] // 2), projected.dtype, device)
    launch = forward_launch(rows).bind(device, _FORWARD) if rows.numel() else None
    in_place = rows.data_ptr() == projected.data_ptr()

    def run(projected):
        out = new()
        if launch is not None:
            launch((projected if in_place else row_matrix(projected), out))
        return out

    return run


def geglu_bwd(dout: Tensor, projected: Tensor) -> Tensor:
    return geglu_bwd_plan(dout, projected)(dout, projected)


def geglu_bwd_plan(dout: Tensor, projected: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """What runs geglu_bwd for tensors like these."""
    device = projected.device
    new = layout.allocator(projected.shape, projected.dtype, device)
    launch = backward_launch(row_matrix(dout), row_matrix(projected)).bind(device, _BACKWARD) if dout.numel() else None
    in_place = all(row_matrix(t).data_ptr() == t.data_ptr() for t in (dout, projected))

    def run(dout, projected):
        dprojected = new()
        if launch is not None:
            given = (dout, projected) if in_place else (row_matrix(dout), row_matrix(projected))
            launch((*given, dprojected))
        return dprojected

    return run


def aot_cases() -> list[AotCase]:
    """The kernels as SD 1.5's transformers launch them at batch 2, for `cnkernels.aot`.

    And for one element: sizes and strides of one are constants to the compiler.
    """
    cases = []
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for rows, columns in ((8192, 1280), (2048, 2560), (512, 5120), (128, 5120), (1, 1)):
            projected = torch.empty((rows, 2 * columns), dtype=dtype, device="meta")
            dout = torch.empty((rows, columns), dtype=dtype, device="meta")
            launches = {"forward": forward_launch(projected), "backward": backward_launch(dout, projected)}
            operands = dict.fromkeys((*_FORWARD, *_BACKWARD), dtype)
            for job, launch in launches.items():
                name = f"geglu {job} {rows}x{columns} {dtype_name(dtype)}"
                cases.append(launch.case(name, operands))
    return cases
