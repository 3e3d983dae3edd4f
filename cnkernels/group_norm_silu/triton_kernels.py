"""Group norm with addend and SiLU in Triton: the launchers, and the launches that are compiled ahead of time."""

from itertools import product

import torch
from torch import Tensor

from cnkernels import layout
from cnkernels.group_norm_silu.triton_backward import backward_plan
from cnkernels.group_norm_silu.triton_forward import forward_plan

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def group_norm_silu_fwd(
    x: Tensor,  # [N, C, *spatial], contiguous or channels_last
    groups: int,
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    eps: float,
    activation: str | None,
    addend: Tensor | None,  # [N, C]
) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels = x.shape[:2]
    spatial = x.numel() // (batch * channels)
    channels_last = layout.is_channels_last(x)
    launches, partials = forward_plan(
        batch, channels, spatial, groups, x.element_size(), channels_last, activation == "silu"
    )
    mean = torch.empty((batch, groups), dtype=torch.float32, device=x.device)
    tensors = {
        "x_ptr": x,
        "weight_ptr": weight,
        "bias_ptr": bias,
        "addend_ptr": addend,
        "y_ptr": torch.empty_like(x),
        "mean_ptr": mean,
        "rstd_ptr": torch.empty_like(mean),
        "eps": eps,
    }
    if partials:
        tensors["partial_ptr"] = torch.empty((3, batch * groups, partials), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        for launch in launches:
            launch(tensors)
    return tensors["y_ptr"], mean, tensors["rstd_ptr"]


def group_norm_silu_bwd(
    dy: Tensor,  # [N, C, *spatial], any strides
    x: Tensor,  # [N, C, *spatial], contiguous or channels_last
    groups: int,
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    mean: Tensor,  # [N, G], float32
    rstd: Tensor,  # [N, G], float32
    activation: str | None,
    addend: Tensor | None,  # [N, C]
    need: tuple[bool, bool, bool, bool],
) -> Gradients:
    batch, channels = x.shape[:2]
    spatial = x.numel() // (batch * channels)
    sums, dx, parameters, (partials, parts) = backward_plan(
        batch, channels, spatial, groups, x.element_size(), layout.is_channels_last(x), activation == "silu"
    )
    need_dx, need_dweight, need_dbias, need_daddend = need
    need_parameters = need_dweight or need_dbias or need_daddend
    scratch = {"dtype": torch.float32, "device": x.device}
    tensors = {
        "dy_ptr": layout.match(dy, x),
        "x_ptr": x,
        "weight_ptr": weight,
        "bias_ptr": bias,
        "addend_ptr": addend,
        "mean_ptr": mean,
        "rstd_ptr": rstd,
        "dx_ptr": torch.empty_like(x) if need_dx else None,
        "group_sums_ptr": torch.empty((2, batch * groups, partials), **scratch),
        "channel_sums_ptr": torch.empty((3, batch * channels * parts), **scratch) if need_parameters else None,
        "dweight_ptr": torch.empty_like(weight) if need_dweight else None,
        "dbias_ptr": torch.empty_like(bias) if need_dbias else None,
        "daddend_ptr": torch.empty_like(addend) if need_daddend else None,
    }
    with torch.cuda.device_of(x):
        sums(tensors)
        if need_dx and dx is not None:
            dx(tensors)
        if need_parameters:
            parameters(tensors)
    return tensors["dx_ptr"], tensors["dweight_ptr"], tensors["dbias_ptr"], tensors["daddend_ptr"]


SD15_SHAPES = (  # channels, height = width: every group norm of the U-Net, the ControlNet and the VAE at 512 x 512
    (320, 64),
    (640, 64),
    (960, 64),
    (320, 32),
    (640, 32),
    (960, 32),
    (1280, 32),
    (1920, 32),
    (640, 16),
    (1280, 16),
    (1920, 16),
    (2560, 16),
    (1280, 8),
    (2560, 8),
    (512, 64),
    (512, 128),
    (256, 256),
    (128, 512),
)


def aot_cases() -> list:
    """The launches of Stable Diffusion 1.5 in both memory formats, forward and backward, with every option in use."""
    cases = []
    for (channels, size), memory_format in product(SD15_SHAPES, ("NCHW", "NHWC")):
        batch = 2 if size <= 64 else 1
        at_small_batch = _cases_of(batch, channels, size, memory_format, torch.float16)
        at_large_batch = _cases_of(8 * batch, channels, size, memory_format, torch.float16)
        cases += at_small_batch
        if [case.kernel for case in at_large_batch] != [case.kernel for case in at_small_batch]:
            cases += at_large_batch
    for memory_format in ("NCHW", "NHWC"):  # of float32 the loads are wider, and nothing else differs
        cases += _cases_of(2, 320, 64, memory_format, torch.float32) + _cases_of(
            2, 1280, 8, memory_format, torch.float32
        )
    return cases


def _cases_of(batch: int, channels: int, size: int, memory_format: str, dtype: torch.dtype) -> list:
    from cnkernels.aot_case import case_of

    shape = (batch, channels, size * size, 32, dtype.itemsize, memory_format == "NHWC", True)
    forward, _ = forward_plan(*shape)
    launches = [launch for launch in (*forward, *backward_plan(*shape)[:3]) if launch is not None]
    given = ("x", "y", "dy", "dx", "weight", "bias", "addend", "dweight", "dbias", "daddend")
    tensors = {f"{name}_ptr": dtype for name in given}
    for name in ("mean", "rstd", "partial", "group_sums", "channel_sums"):
        tensors[f"{name}_ptr"] = torch.float32
    cases = []
    for launch in launches:
        kernel = launch.kernel.__name__.removeprefix("_group_norm_silu_").removesuffix("_kernel")
        name = f"{kernel} {batch}x{channels}x{size}x{size} {memory_format} {str(dtype).removeprefix('torch.')}"
        arguments = tensors | launch.sizes | {"eps": 1e-5}
        options = {"num_warps": launch.num_warps, "maxnreg": launch.maxnreg}
        cases.append(case_of(name, launch.kernel, arguments, **options))
    return cases
