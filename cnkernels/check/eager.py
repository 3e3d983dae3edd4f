"""The ops in PyTorch's own operations, in their arguments' dtype: what the accuracy rule compares kernels with."""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (scores.softmax(dim=-1) @ v).transpose(1, 2)


def group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    activation: str | None = "silu",
    addend: Tensor | None = None,
) -> Tensor:
    x = x if addend is None else x + addend.view(*addend.shape, *[1] * (x.dim() - 2))
    y = F.group_norm(x, groups, weight, bias, eps)
    return y if activation is None else F.silu(y)


def zero_conv_add(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None = None,
    factor: float = 1.0,
) -> Tensor:
    y = factor * F.conv2d(x, weight, bias)
    if scale is not None:
        y = (scale.view(-1, 1, 1, 1) if scale.dim() else scale) * y
    return y if residual is None else residual + y


def geglu(projected: Tensor) -> Tensor:
    value, gate = projected.chunk(2, dim=-1)
    return value * F.gelu(gate)


def sums(op: str, arguments: tuple) -> dict[int, int]:
    """Argument -> M, of those whose gradient is one sum over M terms of either sign."""
    x = arguments[0]
    if op == "group_norm_silu":
        pixels = x[0, 0].numel()
        return {2: len(x) * pixels, 3: len(x) * pixels, 6: pixels}
    if op == "zero_conv_add":
        pixels = len(x) * x[0, 0].numel()
        return {1: pixels, 2: pixels, 4: pixels * len(arguments[1])}
    return {}


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "attention": attention,
    "group_norm_silu": group_norm_silu,
    "zero_conv_add": zero_conv_add,
    "geglu": geglu,
}
