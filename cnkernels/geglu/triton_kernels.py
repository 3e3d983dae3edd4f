"""geglu in Triton: the launchers, and the launches that are compiled ahead of time."""

import torch
from torch import Tensor

from cnkernels.aot_case import AotCase
from cnkernels.geglu.triton_backward import backward_launch
from cnkernels.geglu.triton_forward import forward_launch


def geglu_fwd(projected: Tensor) -> Tensor:
    shape = (*projected.shape[:-1], projected.shape[-1] // 2)
    out = torch.empty(shape, dtype=projected.dtype, device=projected.device)
    if out.numel():
        forward_launch(projected, out)()
    return out


def geglu_bwd(dout: Tensor, projected: Tensor) -> Tensor:
    dprojected = torch.empty(projected.shape, dtype=projected.dtype, device=projected.device)
    if dout.numel():
        backward_launch(dout, projected, dprojected)()
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
            launches = {
                "forward": forward_launch(projected, out),
                "backward": backward_launch(out, projected, projected),
            }
            for job, launch in launches.items():
                cases.append(launch.case(f"geglu {job} {rows}x{columns} {str(dtype).removeprefix('torch.')}"))
    return cases
