"""The fastest backend on this machine, and how to launch it: `python -m cnkernels.tune`, or `tune` for some calls."""

import datetime
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from cnkernels import cache, findings, machine, timing
from cnkernels.register import dtype_name
from cnkernels.tune.calls import MODELS, Call, of_model, record
from cnkernels.tune.timings import measure

__all__ = ["MODELS", "Call", "of_model", "record", "tune"]

logger = logging.getLogger(__name__)


def missing(calls: Sequence[Call], device: torch.device, launches: bool = False) -> list[Call]:
    """Those of the calls that were not measured here yet, for the very size; with `launches`, those whose launches."""
    known = {
        (op, entry["dtype"], entry["head_dim"], entry["direction"], entry["size"])
        for op, entries in findings.record(device)["choices"].items()
        for entry in entries
        if entry.get("launches") or not launches
    }

    def measured(call: Call) -> bool:
        directions = ("forward", "backward") if any(call.gradients) else ("forward",)
        return all((call.op, _dtype(call), call.head_dim, d, call.size) in known for d in directions)

    return [call for call in calls if not measured(call)]


def tune(
    calls: Sequence[Call],
    device: torch.device,
    *,
    rounds: int = timing.ROUNDS,
    emulated: bool = False,
    most: int | None = None,
    progress: Callable[[int, int, Call], None] = lambda done, count, call: None,
) -> list[dict]:
    """Measures every backend on each call, and keeps what is fastest in the user's cache, from where `auto` takes it.

    So it does with the launch configurations of each backend, once the accuracy rule has passed them. What was measured
    before an interruption is kept. The state of the random generators is what it was before.

    Args:
        calls: as `record` or `of_model` gives them.
        device: where they run.
        rounds: turns of each backend.
        emulated: the GPU kernels on a CPU, too: for tests.
        most: launch configurations that are measured beside each rule's own; 0 for none, None for all.
        progress: called with (number done, of how many, the call) before each.

    Returns:
        The new entries: {"op", "dtype", "head_dim", "direction", "size", "backend", "seconds": {backend: s},
        "launches": whether configurations were measured, "date"},
        and where one was faster than by rule "configurations": {backend: configuration} and "by_rule": {backend: s}.
    """
    identity, made = machine.identity(device), []
    try:
        for number, call in enumerate(calls):
            progress(number, len(calls), call)
            with torch.random.fork_rng():
                entries = _measured(call, device, rounds=rounds, emulated=emulated, most=most)
            made += entries
            cache.update(identity, lambda kept, entries=entries: _replace(kept, entries))
    finally:
        findings.forget()
    return made


def _measured(call: Call, device: torch.device, **how: Any) -> list[dict]:
    try:
        results = measure(call, device, **how)
    except torch.OutOfMemoryError:
        smaller = call.of_one_sample()
        told = "is not measured" if smaller is None else "is measured with one sample"
        logger.warning("%s %s: the device has too little free memory", call, told)
        return [] if smaller is None else _measured(smaller, device, **how)
    entries = []
    for direction, measured in results.items():
        by_rule = {name: t.median for name, t in measured.backends.items() if isinstance(t, timing.Timing)}
        seconds = by_rule | measured.seconds
        for name, reason in measured.backends.items():
            if isinstance(reason, str):
                logger.warning("%s, %s, on %s failed: %s", call, direction, name, reason)
        if seconds:
            entries.append(
                {
                    "op": call.op,
                    "dtype": _dtype(call),
                    "head_dim": call.head_dim,
                    "direction": direction,
                    "size": call.size,
                    "backend": min(seconds, key=seconds.get),
                    "seconds": seconds,
                    "launches": how.get("most") != 0,
                    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                }
            )
            if measured.configurations:
                entries[-1] |= {
                    "configurations": measured.configurations,
                    "by_rule": {name: by_rule[name] for name in measured.configurations},
                }
    return entries


def _dtype(call: Call) -> str:
    return dtype_name(call.first.dtype)


def _replace(record: cache.Record, entries: Sequence[dict]) -> None:
    """Puts entries in the place of older ones of the same calls."""
    for entry in entries:
        kept = record["choices"].setdefault(entry["op"], [])
        kept[:] = [old for old in kept if _key(old) != _key(entry)]
        kept.append({name: value for name, value in entry.items() if name != "op"})


def _key(entry: dict) -> tuple:
    return entry["dtype"], entry["head_dim"], entry["direction"], entry["size"]
