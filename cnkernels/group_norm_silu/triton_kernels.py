"""group_norm_silu in Triton: what each call allocates and launches, and what is compiled ahead of time."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from cnkernels import layout
from cnkernels.aot_case import AotCase
from cnkernels.group_norm_silu.triton_backward import backward_launches
from cnkernels.group_norm_silu.triton_forward import forward_launches
from cnkernels.launch import bind, with_measured_warps
from cnkernels.register import dtype_name

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]

_FORWARD = ("x_ptr", "weight_ptr", "bias_ptr", "addend_ptr", "partial_ptr", "y_ptr", "mean_ptr", "rstd_ptr", "eps")
_BACKWARD = (
    "dy_ptr", "x_ptr", "weight_ptr", "bias_ptr", "addend_ptr", "mean_ptr", "rstd_ptr", "dx_ptr",
    "group_sums_ptr", "channel_sums_ptr", "dweight_ptr", "dbias_ptr", "daddend_ptr",
)  # fmt: skip


def group_norm_silu_fwd(
    x: Tensor,  # [N, C, *spatial], contiguous or channels_last
    groups: int,
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    eps: float,
    activation: str | None,
    addend: Tensor | None,  # [N, C]
) -> tuple[Tensor, Tensor, Tensor]:
    arguments = (x, groups, weight, bias, eps, activation, addend)
    return group_norm_silu_fwd_plan(*arguments)(*arguments)


def group_norm_silu_fwd_plan(x, groups, weight, bias, eps, activation, addend) -> Callable:
    """What runs group_norm_silu_fwd for tensors like these: one launch, or two and a workspace between them."""
    batch, channels = x.shape[:2]
    spatial = x.numel() // (batch * channels)
    launches, partials = forward_launches(
        *(batch, channels, spatial, groups, x.element_size(), layout.is_channels_last(x)),
        silu=activation == "silu",
        addend=addend is not None,
    )
    new_statistics = layout.allocator((batch, groups), torch.float32, x.device)
    new_workspace = layout.allocator((3, batch * groups, partials), torch.float32, x.device)
    launch, in_two = bind(with_measured_warps(launches), x.device, _FORWARD), len(launches) == 2

    def run(x, groups, weight, bias, eps, activation, addend):
        y = torch.empty_like(x)
        mean = new_statistics()
        rstd = torch.empty_like(mean)
        partial = new_workspace() if in_two else None
        launch((x, weight, bias, x if addend is None else addend, partial, y, mean, rstd, eps))
        return y, mean, rstd

    return run


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
    arguments = (dy, x, groups, weight, bias, mean, rstd, activation, addend, need)
    return group_norm_silu_bwd_plan(*arguments)(*arguments)


def group_norm_silu_bwd_plan(dy, x, groups, weight, bias, mean, rstd, activation, addend, need) -> Callable:
    """What runs group_norm_silu_bwd for tensors like these."""
    batch, channels = x.shape[:2]
    spatial = x.numel() // (batch * channels)
    need_dx, need_dweight, need_dbias, need_daddend = need
    need_parameters = need_dweight or need_dbias or need_daddend
    sums, dx, parameters, (partials, parts) = backward_launches(
        *(batch, channels, spatial, groups, x.element_size(), layout.is_channels_last(x)),
        silu=activation == "silu",
        addend=addend is not None,
        write_sums=3 if need_daddend else 2 if need_parameters else 0,
    )
    if not need_daddend:  # its programs are all but those of the first row
        parameters = replace(parameters, grid=(parameters.grid[0], 1))
    wanted = (sums, dx if need_dx else None, parameters if need_parameters else None)
    launches = with_measured_warps([launch for launch in wanted if launch is not None])
    launch = bind(launches, x.device, _BACKWARD)
    matches = layout.match(dy, x) is dy
    new_group_sums = layout.allocator((2, batch * groups, partials), torch.float32, x.device)
    new_channel_sums = layout.allocator((3, batch, parts, channels), torch.float32, x.device)

    def run(dy, x, groups, weight, bias, mean, rstd, activation, addend, need):
        dx = torch.empty_like(x) if need_dx else None
        dweight = torch.empty_like(weight) if need_dweight else None
        dbias = torch.empty_like(bias) if need_dbias else None
        daddend = torch.empty_like(addend) if need_daddend else None
        group_sums = new_group_sums()
        launch((
            dy if matches else layout.match(dy, x), x, weight, bias, x if addend is None else addend, mean, rstd, dx,
            group_sums, new_channel_sums() if need_parameters else group_sums,  # which is not written then
            dweight, dbias, daddend,
        ))  # fmt: skip
        return dx, dweight, dbias, daddend

    return run


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


def aot_cases() -> list[AotCase]:
    """The launches of Stable Diffusion 1.5 in both memory formats, forward and backward.

    With all options and with none, in each dtype, and where an image's side leaves rows that are not whole (576, 640).
    """
    half, single = torch.float16, torch.float32
    cases = []
    for memory_format in ("NCHW", "NHWC"):
        for channels, size in SD15_SHAPES:
            batch = 2 if size <= 64 else 1
            cases += _cases_of(batch, channels, size, memory_format, half)
            cases += _cases_of(8 * batch, channels, size, memory_format, half)
        for channels, size in ((320, 64), (640, 32), (1280, 8)):
            cases += _cases_of(2, channels, size, memory_format, half, options=False)
            cases += _cases_of(2, channels, size, memory_format, torch.bfloat16)
            cases += _cases_of(2, channels, size, memory_format, single)  # whose loads are wider, and divisions exact
        for channels, size in ((320, 80), (640, 40), (640, 20), (2560, 10), (1280, 9)):
            cases += _cases_of(16, channels, size, memory_format, half)
    return cases


def _cases_of(
    batch: int, channels: int, size: int, memory_format: str, dtype: torch.dtype, options: bool = True
) -> list[AotCase]:
    shape = (batch, channels, size * size, 32, dtype.itemsize, memory_format == "NHWC")
    forward, _ = forward_launches(*shape, silu=options, addend=options)
    backward = backward_launches(*shape, silu=options, addend=options, write_sums=3 if options else 0)[:3]
    launches = [launch for launch in (*forward, *backward) if launch is not None]
    given = ("x", "y", "dy", "dx", "weight", "bias", "addend", "dweight", "dbias", "daddend")
    tensors = {f"{name}_ptr": dtype for name in given}
    for name in ("mean", "rstd", "partial", "group_sums", "channel_sums"):
        tensors[f"{name}_ptr"] = torch.float32
    cases = []
    for launch in launches:
        kernel = launch.kernel.__name__.removeprefix("_group_norm_silu_").removesuffix("_kernel")
        name = (
            f"{kernel} {batch}x{channels}x{size}x{size} {memory_format} {dtype_name(dtype)}{' plain' * (not options)}"
        )
        cases.append(launch.case(name, tensors | {"eps": 1e-5}))
    return cases
