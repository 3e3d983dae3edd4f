"""oneDNN's matrix products on a CPU, with an activation or a residual in the epilogue: PyTorch's compiler's own.

`torch.nn.functional.linear` gives float32 to MKL, which takes up to twice oneDNN's time on some CPUs. But oneDNN adds
the K products of an element in one chain, whose rounding error grows with K; MKL adds blocks of some hundreds. With
more than `CHAIN` products every function here leaves float32 to MKL: the sum of oneDNN's products of blocks is as
accurate, but takes longer than MKL's product where that is not much slower than oneDNN's.
"""

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

CHAIN = 384  # float32 products in one chain: of 320 they have 1.4 times the error of MKL's, of 640 up to 1.9 times


def serves(tensor: Tensor) -> bool:
    """Whether the functions of this module run natively for tensors of this device and dtype."""
    return tensor.device.type == "cpu" and tensor.dtype in _dtypes()


@functools.cache
def _dtypes() -> frozenset[torch.dtype]:
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return frozenset()
    half = {torch.bfloat16} if torch.ops.mkldnn._is_mkldnn_bf16_supported() else set()
    return frozenset({torch.float32} | half)


def _accurate(x: Tensor, depth: int) -> bool:
    """Whether oneDNN serves x, and adds few enough products; sums in bfloat16 are rounded to 8 bits in the end."""
    return serves(x) and (depth <= CHAIN or x.dtype != torch.float32)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K], weight [N, K], bias [N] or None, all of one dtype -> x @ weight^T + bias, [..., N]."""
    if not _accurate(x, x.shape[-1]):
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """residual + linear(x), the residual [..., N] added to the float32 accumulators; where `serves(x)`."""
    if not _accurate(x, x.shape[-1]):
        return F.linear(x, weight, bias).add_(residual)
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
    if not _accurate(x, x.shape[1]):
        matrix = weight.flatten(1).expand(x.shape[0], -1, -1)
        y = x.flatten(2)
        y = torch.bmm(matrix, y) if bias is None else torch.baddbmm(bias[:, None], matrix, y)
        return y.view(x.shape[0], -1, *x.shape[2:])
    return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, [0, 0], [1, 1], [1, 1], 1, "none", [], "")
