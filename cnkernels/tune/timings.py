"""Times every backend that serves a call, PyTorch's own kernels among them."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

import cnkernels
from cnkernels import dispatch, findings, timing
from cnkernels.tune.calls import Call

DIRECTIONS = ("forward", "backward")


def candidates(call: Call, device: torch.device) -> list[str]:
    """The backends that serve the call, but for those that a check found wrong and the reference."""
    dtype = call.first.dtype
    serving = [
        name
        for name in (dispatch.ON_CPU if device.type == "cpu" else dispatch.BACKENDS)  # interpreted kernels say nothing
        if dispatch.why_not(call.op, name, device, dtype, call.head_dim) is None
        and not findings.wrong(call.op, name, device, dtype)
    ]
    return [name for name in serving if name != "reference"] or serving


def measure(call: Call, device: torch.device, rounds: int = timing.ROUNDS) -> dict[str, dict[str, timing.Timing | str]]:
    """Direction -> backend -> how long the call took, or why it failed. Backward only where gradients are wanted.

    The backends take turns, on inputs rotated past the cache; short kernels are replayed from a CUDA graph.
    """
    nbytes = timing.nbytes(*(t for t in call.tensors(torch.device("meta")) if isinstance(t, Tensor)))
    sets = [call.tensors(device) for _ in range(timing.input_sets(nbytes, device))]
    results = {}
    for direction in DIRECTIONS if any(call.gradients) else DIRECTIONS[:1]:
        make = _forward if direction == "forward" else _backward
        runs = {name: make(call.function, sets, name) for name in candidates(call, device)}
        results[direction] = timing.time_together(runs, device, len(sets), rounds)
    return results


def _forward(function: Callable[..., Tensor], sets: list[list], backend: str) -> timing.Run:
    def run(i: int) -> Tensor:
        with cnkernels.backend(backend), torch.no_grad():
            return function(*sets[i])

    return run


def _backward(function: Callable[..., Tensor], sets: list[list], backend: str) -> timing.Run:
    """The backward pass alone, through graphs recorded once for each input set."""

    @functools.cache
    def recorded(i: int) -> tuple[Tensor, Tensor, list[Tensor]]:
        output = function(*sets[i])
        leaves = [t for t in sets[i] if isinstance(t, Tensor) and t.requires_grad]
        return output, torch.randn_like(output), leaves

    def run(i: int) -> tuple[Tensor, ...]:
        with cnkernels.backend(backend):
            output, upstream, leaves = recorded(i)
            return torch.autograd.grad(output, leaves, upstream, retain_graph=True)

    return run
