"""oneDNN's matrix product with an activation in its epilogue: the fastest on a CPU, and PyTorch's compiler's own.

`torch.nn.functional.linear` gives float32 to MKL, which runs it at half the speed of oneDNN on some CPUs.
"""

import functools

import torch
from torch import Tensor
from torch.nn import functional as F


def serves(tensor: Tensor) -> bool:
    """Whether `linear` runs on oneDNN for tensors of this device and dtype, natively."""
    return tensor.device.type == "cpu" and tensor.dtype in _dtypes()


@functools.cache
def _dtypes() -> frozenset[torch.dtype]:
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return frozenset()
    half = {torch.bfloat16} if torch.ops.mkldnn._is_mkldnn_bf16_supported() else set()
    return frozenset({torch.float32} | half)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K], weight [N, K], bias [N] or None, all of one dtype -> x @ weight^T + bias, [..., N]."""
    if not serves(x):
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """residual + linear(x), the residual [..., N] added to the float32 accumulators; where `serves(x)`."""
    _let_fake_tensors_through()
    return torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight, bias, "add")


@functools.cache
def _let_fake_tensors_through() -> None:
    """PyTorch gives the other variant of this operation a kernel for fake tensors, but not this one."""
    name = "mkldnn::_linear_pointwise.binary"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "Meta"):
        torch.library.register_fake(name, lambda x, residual, *_: torch.empty_like(residual), allow_override=True)


def linear_sigmoid(x: Tensor, weight: Tensor) -> Tensor:
    """sigmoid(x @ weight^T), taken of the float32 accumulators; where `serves(x)`."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "sigmoid", [], "")


def conv1x1(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [N, Cin, H, W], weight [Cout, Cin, 1, 1] -> [N, Cout, H, W]; F.conv2d leaves oneDNN out of a single thread."""
    if not serves(x):
        return F.conv2d(x, weight, bias)
    return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, [0, 0], [1, 1], [1, 1], 1, "none", [], "")
