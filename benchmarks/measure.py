"""Measures a case: checks every provider against the same result, then times all of them interleaved."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._functorch import config as functorch_config

import cnkernels
from benchmarks.budget import Budget, OverBudget
from benchmarks.ops import Case
from cnkernels import dispatch, timing

# A provider whose error is more than this many times eager PyTorch's computes something else.
WRONG = 8.0


def _backend(provider: str) -> AbstractContextManager:
    return cnkernels.backend(provider if provider in dispatch.BACKENDS else "auto")


def leaves_of(case: Case, tensors: list[Tensor | None]) -> list[Tensor | None]:
    if case.direction == "forward":
        return tensors
    return [t.requires_grad_() if i in case.differentiable else t for i, t in enumerate(tensors)]


def _outputs(case: Case, function: Callable, tensors: list[Tensor | None], upstream: Tensor | None) -> list[Tensor]:
    """Computes the output, or the gradients, of one provider."""
    if case.direction == "forward":
        with torch.no_grad():  # as it will be timed: what is compiled is compiled once
            return [function(*tensors)]
    out = function(*tensors)
    return list(torch.autograd.grad(out, [tensors[i] for i in case.differentiable], upstream))


def run_of(case: Case, name: str, function: Callable, sets: list[list[Tensor | None]]) -> timing.Run:
    """Returns the call to time: a provider's forward, or its backward through a graph recorded once per input set."""
    if case.direction == "forward":

        def forward(i: int) -> Tensor:
            with _backend(name), torch.no_grad():
                return function(*sets[i])

        return forward
    recorded: dict[int, tuple[Tensor, Tensor, list[Tensor]]] = {}

    def backward(i: int) -> tuple[Tensor, ...]:
        with _backend(name):
            if i not in recorded:
                out = function(*sets[i])
                recorded[i] = out, torch.randn_like(out), [sets[i][j] for j in case.differentiable]
            out, upstream, leaves = recorded[i]
            return torch.autograd.grad(out, leaves, upstream, retain_graph=True)

    return backward


def errors(case: Case, device: torch.device, budget: Budget | None = None) -> dict[str, float | str]:
    """Computes each provider's relative RMS error against eager PyTorch in float32, or the reason for no result."""
    budget = budget or Budget()
    torch.manual_seed(0)
    tensors = case.inputs(device)
    wide = leaves_of(case, [t if t is None else t.detach().float() for t in tensors])
    eager = case.providers["eager"]
    upstream = torch.randn_like(eager(*tensors)) if case.direction == "backward" else None
    exact = _outputs(case, eager, wide, upstream if upstream is None else upstream.float())
    errors: dict[str, float | str] = {}
    for name, function in case.providers.items():
        try:
            with budget.provider(), _backend(name):
                fresh = leaves_of(case, [t if t is None else t.detach().clone() for t in tensors])
                results = _outputs(case, function, fresh, upstream)
        except (Exception, OverBudget) as error:  # a peer may fail in any way at all; its row says how
            errors[name] = timing.reason(error)
            continue
        differences = [
            ((ours.float() - truth).norm() / truth.norm().clamp_min(1e-20)).item()
            for ours, truth in zip(results, exact, strict=True)
        ]
        errors[name] = max(differences) if all(d == d for d in differences) else float("inf")
    return errors


def refusal(name: str, errors: Mapping[str, float | str], dtype: torch.dtype) -> str | None:
    error, eager = errors[name], errors["eager"]
    if isinstance(error, str):
        return error
    allowed = WRONG * max(eager if isinstance(eager, float) else 0.0, torch.finfo(dtype).eps)
    return None if error <= allowed else f"wrong: relative error {error:.1e}, PyTorch's own is {eager:.1e}"


def blank(case: Case, provider: str) -> dict[str, Any]:
    """Returns the part of a row that is known before the measurement."""
    return {
        "kind": "op",
        "op": case.op,
        "shape": case.shape,
        "dtype": str(case.dtype).removeprefix("torch."),
        "layout": case.layout,
        "direction": case.direction,
        "provider": provider,
        "floor_bytes": case.floor_bytes,
        "floor_flops": case.floor_flops,
    }


def reusable_graphs() -> AbstractContextManager:
    """Inside the block, compiled functions may run their backward pass repeatedly: no forward memory is reused."""
    return functorch_config.patch(donated_buffer=False)


@reusable_graphs()
def rows(
    case: Case,
    device: torch.device,
    ceilings: Mapping[str, Any],
    refused: Mapping[str, str],
    budget: Budget | None = None,
) -> list[dict]:
    """One row per provider of a case.

    Args:
        case: what is timed.
        device: where.
        ceilings: of `machine.ceilings`, from which the floor follows.
        refused: backends of this op that get no row, with the reason: their tests fail on this machine.
        budget: interrupts a provider that takes too long to give its first result.
    """
    budget = budget or Budget()
    allowed = {name: f for name, f in case.providers.items() if name not in refused}
    found = errors(replace(case, providers=allowed), device, budget)
    reasons = {name: refused.get(name) or refusal(name, found, case.dtype) for name in case.providers}
    torch.manual_seed(0)
    first = case.inputs(device)
    count = timing.input_sets(timing.nbytes(*first), device)
    sets = [leaves_of(case, t) for t in [first, *(case.inputs(device) for _ in range(count - 1))]]
    runs = {name: run_of(case, name, f, sets) for name, f in case.providers.items() if reasons[name] is None}
    timings = timing.time_together(runs, device, count, limit=budget.provider)
    matmul = ceilings.get(f"matmul_flops_per_s_{str(case.dtype).removeprefix('torch.')}")
    floor = max(case.floor_bytes / ceilings["copy_bytes_per_s"], case.floor_flops / matmul if matmul else 0.0)
    good = {name: t.median for name, t in timings.items() if isinstance(t, timing.Timing)}
    best_peer = min((t for name, t in good.items() if name not in dispatch.BACKENDS), default=None)
    table = []
    for name in case.providers:
        row = {
            **blank(case, name),
            "size": first[0].numel(),
            "head_dim": first[0].shape[-1] if case.op == "attention" else None,
            "floor_seconds": floor,
        }
        result = reasons[name] or timings[name]
        if isinstance(result, str):
            table.append({**row, "reason": result})
            continue
        table.append(
            {
                **row,
                **result.as_row(),
                "relative_error": found[name],
                "fraction_of_floor": floor / result.median,
                "ratio_to_best_peer": result.median / best_peer if best_peer else None,
                "peak_memory": timing.peak_memory(runs[name], device),
            }
        )
    return table
