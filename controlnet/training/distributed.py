"""The ranks of a job: who they are, how they agree, and how they stop together."""

import dataclasses
import datetime
import os
import signal
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from controlnet.config import ConfigError

# A rank that waits longer than this for another one gives up: longer than any save or sample grid lasts.
TIMEOUT = datetime.timedelta(minutes=30)


class RankError(RuntimeError):
    """This rank cannot go on because of another one."""


@dataclasses.dataclass(frozen=True)
class World:
    """One process of a job, and its collectives. With one rank they return at once and need no process group."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def any(self, *flags: bool | Tensor) -> list[bool]:
        """For each flag, whether it is set on any rank. One small all-reduce and one synchronisation for all."""
        values = torch.stack([torch.as_tensor(flag).to(self.device, torch.float32).reshape(()) for flag in flags])
        if self.size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return [value > 0 for value in values.tolist()]

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
        """Leaves the process group. Not for an error's way out: the others may not be listening."""
        if self.size > 1:
            dist.destroy_process_group()


def start(devices: Any, num_nodes: int, accelerator: str, backend: str | None = None) -> World:
    """Joins the job that torchrun started, or stands alone.

    Arguments:
        devices: processes on each machine: a number, a list of device indices (its length counts), or None, "auto" or
            -1 for whatever was started.
        num_nodes: machines.
        accelerator: "gpu" or "cuda", "cpu", or "auto" (a GPU where there is one).
        backend: "nccl" or "gloo"; by default NCCL on GPUs and gloo on CPUs.
    Raises ConfigError when fewer or more processes run than the configuration says, with the command for as many.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    _check_size(size, devices, num_nodes)
    device = _device(accelerator, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size > 1:
        backend = backend or ("nccl" if device.type == "cuda" else "gloo")
        dist.init_process_group(backend, timeout=TIMEOUT, device_id=device if backend == "nccl" else None)
    return World(rank, size, local_rank, device)


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
    """Turns the first SIGTERM or SIGINT into a flag that the loop polls; the second one acts as it did before.

    A context manager: the handlers found at entry are put back at exit.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> "StopRequest":
        self._previous = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _handle(self, number: int, _frame: object) -> None:
        self.signal = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


class Stopped(Exception):
    """Raised on every rank at once when one of them was asked to stop while samples were drawn."""
