"""One trial of `python -m cnkernels.check`: a case on one backend in one dtype, and what is wrong with it."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor

import cnkernels
from cnkernels import dispatch, register
from cnkernels.check.cases import DTYPES, Case, arranged, cases
from cnkernels.check.guards import guarded
from cnkernels.check.rule import Eager

REPEATS = 3


@dataclass(frozen=True)
class Trial:
    """A case on one backend in one dtype. `number` is the case's place among those of its level."""

    case: Case
    number: int
    backend: str
    dtype: torch.dtype

    @property
    def dtype_name(self) -> str:
        return register.dtype_name(self.dtype)

    @property
    def label(self) -> str:
        return f"{self.case.label}, {self.dtype_name}, {self.backend}"


def trials(
    level: str,
    device: torch.device,
    ops: Collection[str] = dispatch.OPS,
    backends: Collection[str] = dispatch.BACKENDS,
) -> list[Trial]:
    """All that this machine can run of a level, backend by backend."""
    numbered = [(number, case) for number, case in enumerate(cases(level)) if case.op in ops]
    return [
        Trial(case, number, backend, dtype)
        for backend in backends
        for number, case in numbered
        for dtype in DTYPES
        if dispatch.why_not(case.op, backend, device, dtype, case.head_dim) is None
    ]


def fault(trial: Trial, device: torch.device) -> str | None:
    """What is wrong with a trial's results, in words; None where nothing is.

    Checked are the output without gradients, the output and every gradient with them, each against float64 by the
    accuracy rule, that nothing was written outside of what was allocated, and that repeated calls give the same bits.
    """
    case = trial.case
    inputs = case.inputs(trial.dtype, device)
    upstream = torch.randn_like(case.eager(*inputs))
    eager = Eager(case.eager, inputs, upstream)
    names = ["output", *(f"gradient of input {i}" for i in range(len(inputs)))]
    with cnkernels.backend(trial.backend):
        ours = [arranged(t, case.layout) for t in inputs]
        with guarded() as written_outside:
            results = [_results(case.function, ours, upstream) for _ in range(REPEATS)]
            with torch.no_grad():
                alone = case.function(*ours)
    if written_outside:
        return written_outside[0]
    for index, (name, result) in enumerate(zip(names, results[0], strict=True)):
        terms = case.sums.get(index - 1, 1) if index else 1
        wrong = eager.fault(index, name, result, terms)
        if wrong:
            return wrong
        for again in results[1:]:
            if not torch.equal(_bits(result), _bits(again[index])):
                return f"{name}: a repeated call gave other bits"
    return eager.fault(0, "output without gradients", alone)


def _results(function: Callable[..., Tensor], inputs: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """The output, and the gradient of every input."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream)]


def _bits(t: Tensor) -> Tensor:
    return t.flatten().contiguous().view(torch.uint8)
