"""How accurate a kernel must be: compared with PyTorch in the same dtype, both against float64.

    err(kernel) <= 2 * err(PyTorch eager in the same dtype) + one rounding of the output dtype

as the largest and as the root-mean-square error over the tensor, NaN and inf in the same places. A rounding is at most
half a unit in the last place, and the mean square of many is a third of that one's: the second measure allows no more.

The error of eager is the largest of `DRAWS` draws. The first is its error on the given inputs; each further one is its
error on neighbours of them, every element a unit or two in the last place away, against the exact result of those
neighbours. The problem is as hard, but every rounding on the way falls out anew: a single draw can be small by luck,
which changes with the inputs, the instruction set and the BLAS, most of all where few elements decide.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

DRAWS = 64

enough = 1.0  # no further draw is taken once the error is within so much of what is allowed
observers: list[Callable[["Comparison"], None]] = []  # called with every comparison


def results(function: Callable[..., Tensor], inputs: Sequence[Tensor | None], upstream: Tensor | None) -> list[Tensor]:
    """[output, gradient of each given input], for fresh leaves with the layout of `inputs`; without `upstream` the
    output alone.
    """
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
        self.results = results(function, inputs, upstream)
        self.exact = results(function, [_double(t) for t in inputs], _double(upstream))

    def draws(self, index: int) -> Iterator[Error]:
        """The errors of result `index` on neighbours of the inputs, the same ones for every result."""
        for number in range(DRAWS - 1):
            if number == len(self._draws):
                inputs, upstream = [self._neighbour(t) for t in self._inputs], self._neighbour(self._upstream)
                exact = results(self._function, [_double(t) for t in inputs], _double(upstream))
                self._draws.append(list(map(_error, results(self._function, inputs, upstream), exact)))
            yield self._draws[number][index]

    def fault(self, index: int, name: str, ours: Tensor, terms: int = 1) -> str | None:
        """What is wrong with `ours` as result `index`, in words; None where nothing is.

        Args:
            ours: the result of another implementation; may be of a narrower dtype than eager's.
            terms: M of a result that is one sum over M terms of either sign, accumulated in float32: the rounding
                of that grows with sqrt(M), while the sum itself may cancel to nothing.
        """
        theirs = self.results[index].to(torch.promote_types(self.results[index].dtype, ours.dtype))
        return fault(name, ours, theirs, self.exact[index], terms, self.draws(index))

    def _neighbour(self, t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        away = torch.rand(t.shape, generator=self._generator, dtype=torch.float64).to(t.device) * 4 - 2
        return (t.double() * (1 + away * torch.finfo(t.dtype).eps)).to(t.dtype)


def fault(
    name: str, ours: Tensor, theirs: Tensor, exact: Tensor, terms: int = 1, draws: Iterable[Error] = ()
) -> str | None:
    """What the rule says of one tensor, in words; None where it holds.

    Args:
        name: of the tensor, for the answer.
        ours: what is judged.
        theirs, exact: eager PyTorch's result in the same dtype, and the one of float64.
        terms: M of a sum over M terms of either sign.
        draws: further draws of eager's error; no more are taken than are needed.
    """
    if ours.dtype != theirs.dtype:
        return f"{name}: dtype {ours.dtype}, PyTorch's is {theirs.dtype}"
    if ours.shape != exact.shape:
        return f"{name}: shape {list(ours.shape)}, expected {list(exact.shape)}"
    for kind, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        wrong = (test(ours) != test(theirs)).sum().item()
        if wrong:
            return f"{name}: {kind} in {wrong} places where PyTorch has none, or the reverse"
    finite = torch.isfinite(theirs)
    if not finite.any():
        return None
    half_unit = torch.finfo(ours.dtype).eps / 2
    many = min(1.0, (1 / 3 + finite.sum().item() ** -0.5) ** 0.5)  # with three standard deviations of the mean square
    sums = (terms**0.5 - 1) * torch.finfo(torch.float32).eps / 2  # every op accumulates in float32
    roundings = (half_unit + sums, half_unit * (many if terms == 1 else 1.0) + sums)
    error, size, peer = _error(ours, exact, finite), _measure(exact[finite]), _error(theirs, exact, finite)
    for draw in itertools.chain([peer], draws):
        peer = Error(*map(max, peer, draw))
        allowed = Error(*(2 * p + rounding * s for p, rounding, s in zip(peer, roundings, size, strict=True)))
        if all(e <= enough * a for e, a in zip(error, allowed, strict=True)):
            break
    found = None
    for measure, e, a in zip(Error._fields, error, allowed, strict=True):
        for observe in observers:
            observe(Comparison(name, measure, finite.sum().item(), e, a))
        if not e <= a and found is None:
            found = f"{name}: {measure} error {e:.3e}, allowed {a:.3e} ({_worst(ours, exact, finite)})"
    return found


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
