"""How an op is compared with PyTorch: every backend, forward and every gradient, against float64 by one rule.

    err(backend) <= 2 * err(PyTorch eager in the same dtype) + one rounding of the output dtype

as the largest and as the root-mean-square error over the tensor, NaN and inf in the same places.

The error of eager is the largest of `DRAWS` draws. The first is its error on the test's inputs; each further one is its
error on neighbours of them, every element a unit or two in the last place away, against the exact result of those
neighbours. The problem is as hard, but every rounding on the way falls out anew: a single draw can be small by luck,
which changes with the seed, the instruction set and the BLAS, most of all where few elements decide.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import cnkernels
from cnkernels import dispatch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DRAWS = 64

enough = 1.0  # no further draw is taken once the error is within so much of what is allowed
observers: list[Callable[["Comparison"], None]] = []  # see every comparison


def backends(op: str) -> list:
    """The backends of `op` as pytest parameters; one that cannot run here in any dtype is skipped, with the reason."""
    parameters = []
    for name in sorted(name for known, name in dispatch.CAPABILITIES if known == op):
        reasons = [dispatch.why_not(op, name, DEVICE, dtype) for dtype in DTYPES]
        marks = [] if None in reasons else [pytest.mark.skip(reason=reasons[0])]
        parameters.append(pytest.param(name, marks=marks))
    return parameters


def skip_unless_served(op: str, backend: str, dtype: torch.dtype, head_dim: int | None = None) -> None:
    """Skips the test, with the reason, where `backend` does not serve such a call."""
    reason = dispatch.why_not(op, backend, DEVICE, dtype, head_dim)
    if reason:
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


def run(function: Callable, inputs: Sequence[Tensor | None], upstream: Tensor | None) -> list[Tensor]:
    """[output, gradient of each given input], for fresh leaves with the layout of `inputs`."""
    leaves = [t if t is None else t.detach().requires_grad_(upstream is not None) for t in inputs]
    output = function(*leaves)
    given = [leaf for leaf in leaves if leaf is not None]
    if upstream is None:
        return [output]
    return [output, *torch.autograd.grad(output, given, upstream)]


class Error(NamedTuple):
    """Of a tensor, over its finite elements."""

    largest: float
    rms: float


class Comparison(NamedTuple):
    """What was compared by one measure of `Error`, over how many elements."""

    name: str
    measure: str
    elements: int
    error: float
    allowed: float


class Eager:
    """PyTorch's results on some inputs, the exact ones, and as many draws of the error between them as are asked for.

    Args:
        function: of the tensors in `inputs`.
        inputs: tensors of the dtype to be computed in, or None.
        upstream: gradient of the output, of its dtype; None for the output alone.
    """

    def __init__(self, function: Callable, inputs: Sequence[Tensor | None], upstream: Tensor | None):
        self._function, self._inputs, self._upstream = function, inputs, upstream
        self._generator = torch.Generator().manual_seed(torch.initial_seed() % 2**63)
        self._draws: list[list[Error]] = []  # of every result, on each of the neighbours so far
        self.results = run(function, inputs, upstream)
        self.exact = run(function, [_double(t) for t in inputs], _double(upstream))

    def draws(self, index: int) -> Iterator[Error]:
        """The errors of result `index` on neighbours of the inputs, the same ones for every result."""
        for number in range(DRAWS - 1):
            if number == len(self._draws):
                inputs, upstream = [self._neighbour(t) for t in self._inputs], self._neighbour(self._upstream)
                exact = run(self._function, [_double(t) for t in inputs], _double(upstream))
                self._draws.append(list(map(_error, run(self._function, inputs, upstream), exact)))
            yield self._draws[number][index]

    def assert_by_rule(self, index: int, name: str, ours: Tensor, terms: int = 1) -> None:
        """`ours` against result `index`, which may be of a narrower dtype."""
        theirs = self.results[index].to(torch.promote_types(self.results[index].dtype, ours.dtype))
        assert_by_rule(name, ours, theirs, self.exact[index], terms, self.draws(index))

    def _neighbour(self, t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        away = torch.rand(t.shape, generator=self._generator, dtype=torch.float64).to(t.device) * 4 - 2
        return (t.double() * (1 + away * torch.finfo(t.dtype).eps)).to(t.dtype)


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


def assert_by_rule(
    name: str, ours: Tensor, theirs: Tensor, exact: Tensor, terms: int = 1, draws: Iterable[Error] = ()
) -> None:
    """The rule for one tensor.

    Args:
        theirs, exact: eager PyTorch's result in the same dtype, and the one of float64.
        terms: M of a sum over M terms of either sign.
        draws: further draws of eager's error; no more are taken than are needed.
    """
    assert ours.dtype == theirs.dtype, f"{name}: dtype {ours.dtype}, PyTorch's is {theirs.dtype}"
    assert ours.shape == exact.shape, f"{name}: shape {list(ours.shape)}, expected {list(exact.shape)}"
    for kind, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        wrong = (test(ours) != test(theirs)).sum().item()
        assert wrong == 0, f"{name}: {kind} in {wrong} places where PyTorch has none, or the reverse"
    finite = torch.isfinite(theirs)
    if not finite.any():
        return
    rounding = torch.finfo(ours.dtype).eps / 2 * terms**0.5
    error, size, peer = _error(ours, exact, finite), _measure(exact[finite]), _error(theirs, exact, finite)
    for draw in itertools.chain([peer], draws):
        peer = Error(*map(max, peer, draw))
        allowed = Error(*(2 * drawn + rounding * extent for drawn, extent in zip(peer, size, strict=True)))
        if all(e <= enough * a for e, a in zip(error, allowed, strict=True)):
            break
    for measure, e, a in zip(Error._fields, error, allowed, strict=True):
        for observe in observers:
            observe(Comparison(name, measure, finite.sum().item(), e, a))
        assert e <= a, f"{name}: {measure} error {e:.3e}, allowed {a:.3e} ({_worst(ours, exact, finite)})"


def _error(actual: Tensor, exact: Tensor, where: Tensor | None = None) -> Error:
    where = torch.isfinite(actual) & torch.isfinite(exact) if where is None else where
    return _measure(actual[where].double() - exact[where])


def _measure(t: Tensor) -> Error:
    return Error(t.abs().max().item(), t.square().mean().sqrt().item()) if t.numel() else Error(0.0, 0.0)


def _double(t: Tensor | None) -> Tensor | None:
    return t if t is None else t.double()


def _worst(ours: Tensor, exact: Tensor, finite: Tensor) -> str:
    error = (ours[finite].double() - exact[finite]).abs()
    index = finite.nonzero()[error.argmax()].tolist()
    return f"worst at {index}, {(error > error.max() / 2).sum().item()} of {error.numel()} within half of it"


def assert_repeatable(function: Callable, times: int = 3) -> None:
    """Bitwise equal results from repeated calls."""
    first = function()
    for _ in range(times - 1):
        for a, b in zip(first, function(), strict=True):
            assert torch.equal(_bits(a), _bits(b)), "a repeated call gave other bits"


def _bits(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.uint8)
