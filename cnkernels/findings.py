"""What is known about the kernels on this machine: which were found wrong, and which were measured to be fastest.

The user's own file (`cnkernels.cache`, written by cnkernels.check and cnkernels.tune) comes before the table that is
shipped for a GPU (`cnkernels.tuning`). Read once for each device, when the first call is planned.
"""

import functools
import logging
import math
from collections.abc import Callable

import torch

from cnkernels import cache, machine, tuning
from cnkernels.register import dtype_name

logger = logging.getLogger(__name__)

on_change: list[Callable[[], None]] = []  # called when what is known may have changed


@functools.cache
def record(device: torch.device) -> cache.Record:
    """The user's record of this device; an empty one where there is none."""
    return cache.read(machine.identity(device))


def forget() -> None:
    """Reads everything anew at the next call: for when a check or a measurement has changed the file."""
    record.cache_clear()
    _warn.cache_clear()
    for drop in on_change:
        drop()


def wrong(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `python -m cnkernels.check` found the op wrong on this backend; one warning then says so."""
    name = dtype_name(dtype)
    for fault in record(device)["faults"]:
        if (fault["op"], fault["backend"], fault["dtype"]) == (op, backend, name):
            _warn(op, backend, name, fault["case"], str(cache.path(machine.identity(device))))
            return True
    return False


@functools.cache
def _warn(op: str, backend: str, dtype: str, case: str, file: str) -> None:
    logger.warning(
        "the %s backend of %s in %s is not used: a check found it wrong (%s; see %s). "
        "python -m cnkernels.check tries it again.",
        backend, op, dtype, case, file,
    )  # fmt: skip


def size_of(op: str, x: torch.Tensor, other: torch.Tensor | None = None) -> int:
    """What the time of a call depends on, as one number: elements of x; for attention, of q times the keys of k."""
    return x.numel() * other.shape[1] if op == "attention" else x.numel()


def measured(
    op: str, device: torch.device, dtype: torch.dtype, size: int, head_dim: int | None, direction: str
) -> dict | None:
    """The entry (its "backend" was the fastest) of the measured call nearest in size; None where none was measured.

    Args:
        size: `size_of` the call.
        direction: "forward" or "backward".
    """
    tables = [record(device)["choices"]]
    if device.type == "cuda":
        tables.append(tuning.table(torch.cuda.get_device_name(device)))
    for table in tables:
        alike = [e for e in table.get(op, []) if _kind(e) == (dtype_name(dtype), head_dim, direction)]
        if alike:
            return min(alike, key=lambda entry: abs(math.log(entry["size"] / max(size, 1))))
    return None


def _kind(entry: dict) -> tuple:
    return entry["dtype"], entry["head_dim"], entry["direction"]
