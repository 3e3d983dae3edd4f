"""Compares an op with PyTorch: every backend, forward and every gradient, against float64 by one rule.

    err(backend) <= 2 * err(PyTorch eager in the same dtype) + one rounding of the output dtype

as the largest and as the root-mean-square error over the tensor, NaN and inf in the same places.

`cnkernels.check.rule` says what is taken for the error of eager.
"""

import re
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

import cnkernels
from cnkernels import dispatch
from cnkernels.check import rule

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

run = rule.results


def backends(op: str) -> list:
    """The backends of `op` as pytest parameters; one that cannot run here in any dtype is skipped, with the reason.

    On a CPU the CUDA kernels are built when the first test of theirs runs, which may be skipped only then.
    """
    parameters = []
    for name in sorted(name for known, name in dispatch.CAPABILITIES if known == op):
        marks = [pytest.mark.cuda] if name == "cuda" else []
        if name != "cuda" or DEVICE.type == "cuda":
            reasons = [dispatch.why_not(op, name, DEVICE, dtype) for dtype in DTYPES]
            marks += [] if None in reasons else [pytest.mark.skip(reason=reasons[0])]
        parameters.append(pytest.param(name, marks=marks))
    return parameters


def skip_unless_served(op: str, backend: str, dtype: torch.dtype, head_dim: int | None = None) -> None:
    """Skips the test, with the reason, where `backend` does not serve such a call and refuses it for that reason."""
    reason = dispatch.why_not(op, backend, DEVICE, dtype, head_dim)
    if reason:
        with cnkernels.backend(backend), pytest.raises(ValueError, match=re.escape(reason)):
            dispatch.select(op, DEVICE, dtype, head_dim)
        pytest.skip(reason)


def dtype_of(op: str, backend: str) -> torch.dtype:
    """float32, or if `backend` does not serve it the first of `DTYPES` that it does: for a test that needs but one."""
    return next(dtype for dtype in DTYPES if dispatch.why_not(op, backend, DEVICE, dtype) is None)


def randn(*shape: int, scale: float = 1.0, offset: float = 0.0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, device=DEVICE) * scale + offset


def as_is(t: Tensor) -> Tensor:
    return t


def channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t


def misaligned(t: Tensor, offset: int = 1) -> Tensor:
    """The same values and strides, `offset` elements into a buffer, so that no 16-byte access is aligned."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    buffer = torch.full((extent + offset + 8,), torch.nan, dtype=t.dtype, device=t.device)
    return buffer.as_strided(t.shape, t.stride(), offset).copy_(t)


def strided(t: Tensor) -> Tensor:
    """The same values with a gap after each element: neither contiguous nor channels_last."""
    return torch.stack((t, torch.full_like(t, torch.nan)), dim=-1)[..., 0]


class Eager(rule.Eager):
    """PyTorch's results and their errors, for assertions."""

    def assert_by_rule(self, index: int, name: str, ours: Tensor, terms: int = 1) -> None:
        """`ours` as result `index`, which may be of a narrower dtype."""
        fault = self.fault(index, name, ours, terms)
        assert fault is None, fault


def compare(
    op: Callable,
    eager: Callable,
    inputs: Sequence[Tensor | None],
    dtype: torch.dtype,
    backend: str,
    *,
    arrange: Callable = as_is,
    arrange_upstream: Callable = as_is,
    backward: bool = True,
    reductions: dict[int, int] | None = None,
) -> list[Tensor]:
    """Checks `op` under `backend` against `eager`, forward and backward, by the rule; returns what `op` computed.

    Args:
        op, eager: functions of the tensors in `inputs`.
        inputs: float64 tensors or None; rounded to `dtype` once, so that all three computations see the same values.
        reductions: input index -> M, for a gradient that is one sum over M terms of either sign: the rounding of its
            terms grows with sqrt(M), while the sum itself may cancel to nothing.
        arrange: lays out an input before the op sees it; arrange_upstream the upstream gradient.
    """
    rounded = [t if t is None else t.to(dtype) for t in inputs]
    upstream = None
    if backward:
        with torch.no_grad():
            upstream = randn(*eager(*rounded).shape).to(dtype)
    peer = Eager(eager, rounded, upstream)
    with cnkernels.backend(backend):
        arranged = [t if t is None else arrange(t) for t in rounded]
        actual = run(op, arranged, upstream if upstream is None else arrange_upstream(upstream))
    given = [index for index, t in enumerate(inputs) if t is not None]
    for number, (index, ours) in enumerate(zip([None, *given], actual, strict=backward)):
        name = "output" if index is None else f"gradient {index}"
        peer.assert_by_rule(number, name, ours, terms=(reductions or {}).get(index, 1))
    return actual


def assert_repeatable(function: Callable, times: int = 3 if DEVICE.type == "cuda" else 2) -> None:
    """Bitwise equal results from repeated calls. On a CPU, where programs run one by one, two say it all."""
    first = function()
    for _ in range(times - 1):
        for a, b in zip(first, function(), strict=True):
            assert torch.equal(_bits(a), _bits(b)), "a repeated call gave other bits"


def _bits(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.uint8)
