"""Measures launch configurations: the candidates of each rule that a call asks, if the accuracy rule passes them."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import cnkernels
from cnkernels import configurations, plans, timing
from cnkernels.check import eager, rule
from cnkernels.check.guards import guarded
from cnkernels.configurations import Configuration
from cnkernels.tune.calls import Call

logger = logging.getLogger(__name__)

GAIN = 0.97  # of the time by rule: what is not faster by more than that may be noise
_QUERIES, _HEADS = 1024, 2  # of attention, whose scores are proven in float64: all keys of so many queries

Times = Callable[[dict[str, Configuration]], dict[str, timing.Timing | str]]


def fastest(
    call: Call, device: torch.device, backend: str, direction: str, run: Callable, time: Times, most: int | None = None
) -> tuple[Configuration, float | None]:
    """The fastest configuration of a call on one backend, and its seconds; ({}, None) where the rules' own is.

    The rules are taken one after the other, each measured with what the ones before it got.

    Args:
        call: what is measured.
        device: where.
        backend: whose kernels.
        direction: "forward" or "backward".
        run: makes and runs the plans of that direction on the backend.
        time: times several configurations together, by their names.
        most: candidates of each rule that are tried; None is all.
    """
    best, seconds = {}, None
    for name, (_, *others) in _rules(run).items():
        tried = {f"candidate {i}": {**best, name: fields} for i, fields in enumerate(others[:most])}
        proven = {key: c for key, c in tried.items() if _may_be_chosen(call, device, backend, direction, c)}
        if not proven:
            continue
        results = time({"as it is": best, **proven})
        taken = {key: t.median for key, t in results.items() if isinstance(t, timing.Timing)}
        winner = min(taken, key=taken.get)
        if winner != "as it is" and taken[winner] < GAIN * taken["as it is"]:
            best, seconds = proven[winner], taken[winner]
    return best, seconds


def _rules(run: Callable) -> dict[str, list[dict[str, Any]]]:
    """The rules that the plans of a run ask."""
    plans.forget()
    with configurations.trying({}), configurations.asked() as rules:
        run()
    return rules


def _may_be_chosen(
    call: Call, device: torch.device, backend: str, direction: str, configuration: Configuration
) -> bool:
    try:
        wrong = fault(call, device, backend, direction, configuration)
    except torch.AcceleratorError:  # nothing can be computed on this device any more
        raise
    except Exception as error:  # too much shared memory, too many registers, what else a compiler may say
        logger.info("%s, %s on %s with %s: %s", call, direction, backend, configuration, timing.reason(error))
        return False
    if wrong:
        logger.warning("%s, %s on %s with %s is not used: %s", call, direction, backend, configuration, wrong)
    return wrong is None


def fault(call: Call, device: torch.device, backend: str, direction: str, configuration: Configuration) -> str | None:
    """What is wrong with a call under a configuration, in words; None where nothing is.

    Checked are the accuracy rule of `cnkernels.check`, the bits of a second call, and that nothing is written outside
    of the tensors that the op allocates. Of attention some queries of one or two heads stand for all.
    """
    arguments = _reduced(call).tensors(device)
    positions = [i for i, argument in enumerate(arguments) if isinstance(argument, Tensor)]
    inputs = [arguments[i].detach() for i in positions]

    def of_tensors(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def called(*tensors: Tensor) -> Tensor:
            given = dict(zip(positions, tensors, strict=True))
            return function(*(given.get(i, argument) for i, argument in enumerate(arguments)))

        return called

    peer = of_tensors(eager.FUNCTIONS[call.op])
    upstream = torch.randn_like(peer(*inputs)) if direction == "backward" else None
    judge = rule.Eager(peer, inputs, upstream)
    with cnkernels.backend(backend), configurations.trying(configuration), guarded() as written_outside:
        ours, again = (rule.results(of_tensors(call.function), inputs, upstream) for _ in range(2))
    if written_outside:
        return written_outside[0]
    sums = eager.sums(call.op, arguments)
    names = ["output", *(f"gradient of argument {i}" for i in positions)]
    for index, (name, result) in enumerate(zip(names, ours, strict=False)):  # without gradients, the output alone
        terms = sums.get(positions[index - 1], 1) if index else 1
        wrong = judge.fault(index, name, result, terms)
        if wrong is None and not torch.equal(result.nan_to_num(), again[index].nan_to_num()):
            wrong = f"{name}: a repeated call gave other bits"
        if wrong:
            return wrong
    return None


def _reduced(call: Call) -> Call:
    if call.op != "attention":
        return call
    *tensors, scale = call.arguments
    q, k, v = (replace(t, shape=(1, t.shape[1], min(t.shape[2], _HEADS), t.shape[3])) for t in tensors)
    q = replace(q, shape=(1, min(q.shape[1], _QUERIES), *q.shape[2:]))
    return replace(call, arguments=(q, k, v, scale))
