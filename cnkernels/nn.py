"""torch.nn modules on the fused ops, with the constructors and state_dicts of their torch.nn twins."""

from torch import Tensor, nn

from cnkernels import recompute
from cnkernels.geglu import geglu
from cnkernels.group_norm_silu import group_norm_silu
from cnkernels.recompute import Later
from cnkernels.zero_conv_add import zero_conv_add


class GroupNormSiLU(nn.GroupNorm):
    """`cnkernels.group_norm_silu` with the parameters of torch.nn.GroupNorm, whose state_dict it has.

    Args:
        num_groups, num_channels, eps, affine, device, dtype: as for torch.nn.GroupNorm.
        activation: "silu" or None.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device=None,
        dtype=None,
        *,
        activation: str | None = "silu",
    ):
        super().__init__(num_groups, num_channels, eps, affine, device, dtype)
        self.activation = activation

    def forward(self, x: Tensor, addend: Tensor | None = None) -> Tensor:
        """x [N, C, *spatial], addend [N, C] or None (added before the norm) -> [N, C, *spatial]."""
        return group_norm_silu(x, self.num_groups, self.weight, self.bias, self.eps, self.activation, addend)

    def later(self, x: Tensor, addend: Tensor | None = None) -> Later:
        """The same, as a promise to a layer that need not keep it for backward (see `cnkernels.recompute`)."""
        return recompute.group_norm_silu(self, x, addend, self.activation)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation!r}"


class ZeroConv2d(nn.Conv2d):
    """`cnkernels.zero_conv_add` with the parameters, all zero, and the state_dict of a 1x1 torch.nn.Conv2d."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True, device=None, dtype=None):
        super().__init__(in_channels, out_channels, kernel_size=1, bias=bias, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, scale: float | Tensor = 1.0, out: Tensor | None = None
    ) -> Tensor:
        """x [N, Cin, H, W], residual [N, Cout, H, W] or None, scale float, [] or [N] -> residual + scale * conv(x)."""
        return zero_conv_add(x, self.weight, self.bias, residual, scale, out)


class GEGLU(nn.Module):
    """`cnkernels.geglu`: halves the last dimension, value * gelu(gate). Has no parameters."""

    def forward(self, projected: Tensor) -> Tensor:
        """projected [..., 2C] -> [..., C]."""
        return geglu(projected)
