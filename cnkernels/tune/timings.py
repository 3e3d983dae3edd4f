"""Times every backend that serves a call, PyTorch's own kernels among them, and the launch configurations of each."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

import cnkernels
from cnkernels import configurations, dispatch, findings, timing
from cnkernels.configurations import Configuration
from cnkernels.tune import launches
from cnkernels.tune.calls import Call

DIRECTIONS = ("forward", "backward")
WORTH = 1.5  # times the fastest backend: one that is slower by rule is not made the fastest by another configuration


@dataclass
class Measured:
    """One direction of a call.

    Attributes:
        backends: how long each took, launched by rule, or why it failed.
        configurations: of each backend that is faster launched otherwise, how.
        seconds: how long it then took.
    """

    backends: dict[str, timing.Timing | str]
    configurations: dict[str, Configuration] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def candidates(call: Call, device: torch.device, emulated: bool = False) -> list[str]:
    """The backends that serve the call, but for those that a check found wrong and the reference.

    Args:
        call: what is measured.
        device: where it runs.
        emulated: on a CPU, the GPU kernels in their emulation, too: it says nothing about their speed.
    """
    dtype = call.first.dtype
    serving = [
        name
        for name in (dispatch.ON_CPU if device.type == "cpu" and not emulated else dispatch.BACKENDS)
        if dispatch.why_not(call.op, name, device, dtype, call.head_dim) is None
        and not findings.wrong(call.op, name, device, dtype)
    ]
    return [name for name in serving if name != "reference"] or serving


def measure(
    call: Call, device: torch.device, rounds: int = timing.ROUNDS, *, emulated: bool = False, most: int | None = None
) -> dict[str, Measured]:
    """Times a call in each direction: backward only where gradients are wanted.

    The backends take turns, on inputs rotated past the cache; short kernels are replayed from a CUDA graph. Then the
    launch configurations of each backend that is not much slower than the fastest take turns likewise.

    Args:
        call: what is measured.
        device: where it runs.
        rounds: turns of each.
        emulated: as for `candidates`.
        most: launch configurations of each rule beside its own; 0 measures backends alone, None all.
    """
    nbytes = timing.nbytes(*(t for t in call.tensors(torch.device("meta")) if isinstance(t, Tensor)))
    sets = [call.tensors(device) for _ in range(timing.input_sets(nbytes, device))]
    results = {}
    for direction in DIRECTIONS if any(call.gradients) else DIRECTIONS[:1]:
        make = functools.partial(_forward if direction == "forward" else _backward, call.function, sets)
        names = candidates(call, device, emulated)
        measured = Measured(timing.time_together({name: make(name) for name in names}, device, len(sets), rounds))
        taken = {name: t.median for name, t in measured.backends.items() if isinstance(t, timing.Timing)}
        for name in taken if most != 0 else ():
            if taken[name] > WORTH * min(taken.values()):
                continue

            def time(tried: dict[str, Configuration], name=name, make=make) -> dict[str, timing.Timing | str]:
                runs = {key: make(name, configuration) for key, configuration in tried.items()}
                return timing.time_together(runs, device, len(sets), rounds)

            run = functools.partial(make(name, {}), 0)
            run()  # of a backward pass, the forward pass before it
            best, seconds = launches.fastest(call, device, name, direction, run, time, most)
            if best:
                measured.configurations[name], measured.seconds[name] = best, seconds
        results[direction] = measured
    return results


def _forward(
    function: Callable[..., Tensor], sets: list[list], backend: str, configuration: Configuration | None = None
) -> timing.Run:
    def run(i: int) -> Tensor:
        with cnkernels.backend(backend), configurations.trying(configuration), torch.no_grad():
            return function(*sets[i])

    return run


def _backward(
    function: Callable[..., Tensor], sets: list[list], backend: str, configuration: Configuration | None = None
) -> timing.Run:
    """The backward pass alone, through graphs recorded once for each input set."""

    @functools.cache
    def recorded(i: int) -> tuple[Tensor, Tensor, list[Tensor]]:
        output = function(*sets[i])
        leaves = [t for t in sets[i] if isinstance(t, Tensor) and t.requires_grad]
        return output, torch.randn_like(output), leaves

    def run(i: int) -> tuple[Tensor, ...]:
        with cnkernels.backend(backend):
            output, upstream, leaves = recorded(i)
            with configurations.trying(configuration):
                return torch.autograd.grad(output, leaves, upstream, retain_graph=True)

    return run
