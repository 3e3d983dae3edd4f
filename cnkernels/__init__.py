"""Fused GPU kernels for diffusion U-Nets: each in Triton and CUDA C++, with a plain PyTorch reference."""

from cnkernels.attention import attention
from cnkernels.dispatch import backend
from cnkernels.geglu import geglu
from cnkernels.group_norm_silu import group_norm_silu
from cnkernels.tune.calls import record
from cnkernels.version import __version__
from cnkernels.zero_conv_add import zero_conv_add, zero_conv_add_group

__all__ = [
    "__version__",
    "attention",
    "backend",
    "geglu",
    "group_norm_silu",
    "record",
    "zero_conv_add",
    "zero_conv_add_group",
]
