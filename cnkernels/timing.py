"""How a call is timed: providers interleaved, inputs rotated past the cache, launch gaps removed by graph replay.

A *run* is a callable of the index of an input set: run(i) computes on set i. On a GPU, calls shorter than GRAPH_BELOW
are captured, one per input set, into a CUDA graph whose replay is timed, so that what is measured is the kernels, not
how fast Python launches them. Longer calls are timed one after the other between two events.
"""

import gc
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

Run = Callable[[int], object]


class Interrupted(BaseException):
    """Raised inside a run that takes too long. No Exception: autotuners catch those and try the next candidate."""


GRAPH_BELOW = 100e-6  # seconds
ROUNDS = 15  # how often the providers take turns
TURN = 4e-3  # seconds that one turn takes on a GPU, at least one call
L2_MULTIPLE = 3  # input sets together are this many times the L2 cache
MOST_SETS = 64


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, 20th and 80th percentile over the turns, how many turns, and how it was timed."""

    median: float
    p20: float
    p80: float
    turns: int
    method: str

    def as_row(self) -> dict:
        return asdict(self)


def summarise(seconds: list[float], method: str) -> Timing:
    quantiles = torch.tensor(seconds, dtype=torch.float64).quantile(torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64))
    return Timing(*quantiles.tolist(), len(seconds), method)


def input_sets(nbytes: int, device: torch.device) -> int:
    """How many sets of `nbytes` bytes of inputs to rotate through, so that none is found in the L2 cache."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(MOST_SETS, -(-L2_MULTIPLE * cache // max(nbytes, 1))))


class _Clock:
    """Times `calls` calls of a run and says how; one for each provider, made after its warm-up."""

    def __init__(self, run: Run, sets: int, device: torch.device, estimate: float):
        self.run, self.sets, self.device = run, sets, device
        self.graph = self._capture() if device.type == "cuda" and estimate < GRAPH_BELOW else None
        calls = max(1, round(TURN / estimate)) if device.type == "cuda" else 1
        self.calls = max(1, calls // sets) * sets if self.graph else calls
        self.method = "graph" if self.graph else "events" if device.type == "cuda" else "wall clock"

    def _capture(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream(self.device)):
            self.kept = [self.run(i) for i in range(self.sets)]
        return graph

    def turn(self) -> float:
        """Seconds per call over one turn."""
        if self.device.type != "cuda":
            begin = time.perf_counter()
            self.run(0)
            return time.perf_counter() - begin
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(self.device)
        begin.record()
        if self.graph:
            for _ in range(self.calls // self.sets):
                self.graph.replay()
        else:
            for i in range(self.calls):
                self.run(i % self.sets)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3 / self.calls


def time_together(
    runs: Mapping[str, Run],
    device: torch.device,
    sets: int = 1,
    rounds: int = ROUNDS,
    limit: Callable[[], AbstractContextManager] = nullcontext,
) -> dict[str, Timing | str]:
    """Times several runs, turn and turn about; what fails is given as the reason, in words.

    Args:
        runs: provider -> run.
        device: where they run.
        sets: number of input sets; run(i) is called with i in [0, sets).
        rounds: turns of each provider.
        limit: entered around the warm-up of each run, to interrupt one that takes too long, by `Interrupted`.
    """
    results: dict[str, Timing | str] = {}
    clocks: dict[str, _Clock] = {}
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    with torch.cuda.stream(stream):  # a graph is captured on the stream that autograd has seen
        for name, run in runs.items():
            try:
                with limit():
                    clocks[name] = _Clock(run, sets, device, _warm_up(run, sets, device))
            except (Exception, Interrupted) as error:  # a peer may fail in any way at all; its row says how
                results[name] = reason(error)
        seconds: dict[str, list[float]] = {name: [] for name in clocks}
        gc.collect()
        names = list(clocks)
        for turn in range(rounds if names else 0):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                seconds[name].append(clocks[name].turn())
    results.update({name: summarise(taken, clocks[name].method) for name, taken in seconds.items()})
    return results


def time_one(run: Run, device: torch.device, rounds: int = ROUNDS) -> Timing:
    """Times one run. Raises RuntimeError with the reason if it fails."""
    result = time_together({"it": run}, device, rounds=rounds)["it"]
    if isinstance(result, str):
        raise RuntimeError(result)
    return result


def _warm_up(run: Run, sets: int, device: torch.device) -> float:
    """Runs every input set, compiling what is compiled on first use, and estimates the seconds that a call takes."""
    for i in range(sets):
        run(i)
    repeats = 3
    if device.type != "cuda":
        begin = time.perf_counter()
        run(0)
        return time.perf_counter() - begin
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(2_000_000)  # about a millisecond in which the launches are queued: the estimate is of device time
    begin.record()
    for i in range(repeats):
        run(i % sets)
    end.record()
    end.synchronize()
    return max(begin.elapsed_time(end) * 1e-3 / repeats, 1e-7)


def peak_memory(run: Run, device: torch.device) -> int | None:
    """Bytes allocated at the peak of one call, beyond what was allocated before; None without a GPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run(0)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def reason(error: BaseException) -> str:
    """What the row of a provider that failed says."""
    if isinstance(error, Interrupted):
        return str(error)
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def nbytes(*tensors: Tensor | None) -> int:
    return sum(t.nbytes for t in tensors if t is not None)
