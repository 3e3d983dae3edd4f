"""The ranks of a job: start-up, collectives, and stopping together."""

import contextlib
import dataclasses
import datetime
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from controlnet.config import ConfigError
from controlnet.training.watch import RankWatch

# Seconds after which a rank that waits for another one gives up: longer than any save or sample grid lasts.
TIMEOUT = 1800.0


class RankError(RuntimeError):
    """This rank cannot go on because of another one."""


@dataclasses.dataclass(frozen=True)
class World:
    """One process of a job, and its collectives. With one rank they return at once and need no process group."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    watch: RankWatch | None = dataclasses.field(default=None, compare=False)

    def at(self, what: str) -> None:
        """Notes what this rank is doing, so that a rank that times out waiting for it can say so."""
        if self.watch is not None:
            self.watch.at(what)

    @contextlib.contextmanager
    def failing_together(self) -> Iterator[None]:
        """Tells the other ranks of an exception raised within it, or names the rank that is the cause of it.

        Raises:
            RankError: a collective failed because of another rank, which the message names, with the reason.
        """
        try:
            yield
        except RuntimeError as error:
            timed_out = "imed out" in str(error) or "timeout" in str(error).lower()
            cause = None if self.watch is None else self.watch.diagnosis(timed_out)
            if cause is not None:
                raise RankError(cause) from error
            self._tell(error)
            raise
        except Exception as error:
            self._tell(error)
            raise

    def _tell(self, error: Exception) -> None:
        if self.watch is not None:
            with contextlib.suppress(RuntimeError):  # the store has ended: there is nobody left to tell
                self.watch.failed(error)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def any(self, *flags: bool | Tensor) -> list[bool]:
        """For each flag, whether it is set on any rank. One small all-reduce and one synchronisation for all."""
        values = torch.stack([torch.as_tensor(flag).to(self.device, torch.float32).reshape(()) for flag in flags])
        if self.size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return [value > 0 for value in values.tolist()]

    def max_(self, values: Tensor) -> None:
        """The largest value on any rank, in place. The host does not wait for it on a GPU."""
        if self.size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over ranks."""
        values = values.clone()
        if self.size > 1:
            dist.all_reduce(values)
        return values / self.size

    def gather(self, value: Any) -> list[Any]:
        """The picklable values of all ranks, by rank, on every rank."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def gather_tensor(self, value: Tensor) -> Tensor:
        """Tensors of equal shape from all ranks, concatenated by rank, on every rank."""
        if self.size == 1:
            return value
        parts = [torch.empty_like(value, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, value.contiguous())
        return torch.cat(parts)

    def on_first(self, work: Callable[[], Any]) -> Any:
        """Runs `work` on rank 0 alone; every rank returns its result. If it raises, the others raise RankError.

        The others wait for it, so that none is left in a collective that rank 0 never reaches.
        """
        outcome: list[Any] = [None, None]
        error: Exception | None = None
        if self.is_first:
            try:
                outcome[0] = work()
            except Exception as caught:
                error = caught
                outcome[1] = f"{type(caught).__name__}: {caught}"
        if self.size > 1:
            dist.broadcast_object_list(outcome, src=0)
        if error is not None:
            raise error
        if outcome[1] is not None:
            raise RankError(f"rank 0 failed: {outcome[1]}")
        return outcome[0]

    def require_equal(self, facts: Mapping[str, Any]) -> None:
        """Raises RankError on every rank, naming the fact and both values, unless all ranks hold the same facts."""
        everyone = self.gather(dict(facts))
        for rank, theirs in enumerate(everyone):
            for key, value in everyone[0].items():
                if theirs.get(key) != value:
                    found = f"{value!r} on rank 0 and {theirs.get(key)!r} on rank {rank}"
                    raise RankError(f"the ranks of this job differ: {key} is {found}")

    def close(self) -> None:
        """Leaves the process group. Not to be called after an error: it would wait for ranks that may have ended."""
        if self.watch is not None:
            self.watch.close()
        if self.size > 1:
            dist.destroy_process_group()


def start(
    devices: Any, num_nodes: int, accelerator: str, timeout: float = TIMEOUT, backend: str | None = None
) -> World:
    """Joins the job that torchrun started, or stands alone.

    Args:
        devices: processes on each machine: a number, a list of device indices (its length counts), or None, "auto" or
            -1 for whatever was started.
        num_nodes: machines.
        accelerator: "gpu" or "cuda", "cpu", or "auto" (a GPU where there is one).
        timeout: seconds that a rank waits for another one before it gives up.
        backend: "nccl" or "gloo"; by default NCCL on GPUs and gloo on CPUs.

    Raises:
        ConfigError: fewer or more processes run than the configuration says; the message has the command for as many.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    _check_size(size, devices, num_nodes)
    device = _device(accelerator, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    watch = None
    if size > 1:
        backend = backend or ("nccl" if device.type == "cuda" else "gloo")
        limit = datetime.timedelta(seconds=timeout)
        store, rank, size = next(dist.rendezvous("env://", rank, size, timeout=limit))
        device_id = device if backend == "nccl" else None
        group = dist.PrefixStore("ranks", store)
        dist.init_process_group(backend, store=group, rank=rank, world_size=size, timeout=limit, device_id=device_id)
        watch = RankWatch(dist.PrefixStore("watch", store), rank, size)
    return World(rank, size, local_rank, device, watch)


def _check_size(size: int, devices: Any, num_nodes: int) -> None:
    if devices in (None, "auto", -1, "-1"):
        return
    if isinstance(devices, (int, str)):
        if not str(devices).isdigit() or int(devices) < 1:
            raise ConfigError(f"trainer.devices is {devices!r}; expected a positive number, a list of indices, or auto")
        per_node = int(devices)
    else:
        per_node = len(devices)
    if per_node * num_nodes == size:
        return
    nodes = f" --nnodes {num_nodes}" if num_nodes > 1 else ""
    raise ConfigError(
        f"trainer.devices={per_node} and trainer.num_nodes={num_nodes} ask for {per_node * num_nodes} processes, but"
        f" {size} {'runs' if size == 1 else 'run'}; start it with `torchrun{nodes} --nproc_per_node {per_node} -m"
        f" controlnet.train ...`, or set trainer.devices=auto to take what is started"
    )


def _device(accelerator: str, local_rank: int) -> torch.device:
    available = torch.cuda.is_available()
    if accelerator == "cpu" or (accelerator == "auto" and not available):
        return torch.device("cpu")
    if not available:
        raise ConfigError(
            f"trainer.accelerator is {accelerator!r} but PyTorch finds no GPU; set trainer.accelerator=cpu"
        )
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"process {local_rank} of this machine has no GPU of its own: PyTorch finds {torch.cuda.device_count()};"
            " start at most that many with --nproc_per_node"
        )
    return torch.device("cuda", local_rank)


class StopRequest:
    """Turns SIGTERM and SIGINT into a flag that the loop polls, so that the run can save before it ends.

    Schedulers signal every process of a job and torchrun forwards the signal once more, so a signal that is repeated
    changes nothing while the run saves. What ends the process at once: another SIGINT (one more is expected under
    torchrun, whose own copy arrives, too), and any signal that comes `grace` seconds after the first or later.

    A context manager: the handlers found at entry are put back at exit.

    Args:
        grace: seconds.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, grace: float = 60.0) -> None:
        self.signal: signal.Signals | None = None
        self.grace = grace
        self.deadline: float | None = None  # of time.monotonic(), at which the run stops by itself
        self._first = 0.0
        self._interrupts_left = 2 if "TORCHELASTIC_RUN_ID" in os.environ else 1
        self._nothing_to_save = False
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        return self.signal is not None or (self.deadline is not None and time.monotonic() >= self.deadline)

    @property
    def reason(self) -> str:
        """Why the run stops, for a message."""
        if self.signal is not None:
            return self.signal.name
        return "exp_manager.max_time_per_run" if self.requested else "a signal to another rank"

    def limit(self, seconds: float | None) -> None:
        """Asks for a stop after so many seconds from now; None takes the limit away."""
        self.deadline = None if seconds is None else time.monotonic() + seconds

    @contextlib.contextmanager
    def nothing_to_save(self) -> Iterator[None]:
        """A context in which a signal raises Interrupted at once: for long work, such as the first compilation."""
        if self.signal is not None:
            raise Interrupted
        self._nothing_to_save = True
        try:
            yield
        finally:
            self._nothing_to_save = False

    def __enter__(self) -> "StopRequest":
        self._previous = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _handle(self, number: int, _frame: object) -> None:
        if number == signal.SIGINT:
            self._interrupts_left -= 1
        if self.signal is None:
            self.signal, self._first = signal.Signals(number), time.monotonic()
            if self._nothing_to_save:
                raise Interrupted
        elif self._interrupts_left < 0 or time.monotonic() - self._first >= self.grace:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


class Interrupted(BaseException):
    """Raised by a signal where there is nothing to save. A BaseException, since compilers catch every Exception."""


class Stopped(Exception):
    """Raised on every rank at once when one of them was asked to stop while samples were drawn."""
