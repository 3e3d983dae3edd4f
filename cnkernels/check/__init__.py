"""Whether the kernels are right on this machine: `python -m cnkernels.check`, or `ensure` for some of them."""

import datetime
import logging
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

import torch

from cnkernels import cache, dispatch, findings, machine
from cnkernels.check.runner import Runner
from cnkernels.check.trial import Trial, trials

logger = logging.getLogger(__name__)

Result = tuple[Trial, str | None]  # what was wrong, in words

_WORKER = "cnkernels.check.worker"


def run(
    chosen: Iterable[Trial],
    level: str,
    device: torch.device,
    *,
    emulated: bool = False,
    seconds: float = 60,
    preload: Iterable[str] = (),
) -> Iterator[Result]:
    """Tries one after the other, in a process that a crash or a hang of one of them cannot hurt.

    Args:
        chosen: of the trials of `level`.
        emulated: run GPU kernels on the CPU.
        seconds: how long one may take.
        preload: modules that the process imports first.

    Yields:
        Each trial with what was wrong. One for which the device has too little free memory is left out, with a warning.
    """
    command = [f"--device={device}", *(["--emulated"] if emulated else [])]
    command += [f"--preload={module}" for module in preload]
    jobs = ((t, {"level": level, "number": t.number, "backend": t.backend, "dtype": t.dtype_name}) for t in chosen)
    with Runner(_WORKER, command, {"TRITON_INTERPRET": "1"} if emulated else {}, seconds) as runner:
        for trial, answer in runner.run(jobs):
            if answer.get("no_memory"):
                logger.warning("%s is left out: the device has too little free memory", trial.label)
                continue
            yield trial, answer.get("lost") or answer.get("fault")


def keep(device: torch.device, results: Sequence[Result], chosen: Sequence[Trial] = ()) -> Path | None:
    """Replaces what the user's cache says of every op, backend and dtype that was tried; returns its file.

    Args:
        device: where they were tried.
        results: of `run`.
        chosen: all that should have been tried. A kernel is right only if all of its trials were; of one that lacks
            some, for an interruption or for memory, only a fault is kept.
    """
    judged = {trial.label for trial, _ in results}
    incomplete = {_kernel(trial) for trial in chosen if trial.label not in judged}
    faulty = {_kernel(trial) for trial, fault in results if fault}
    results = [result for result in results if _kernel(result[0]) in faulty or _kernel(result[0]) not in incomplete]
    tried = {_kernel(trial) for trial, _ in results}

    def change(record: cache.Record) -> None:
        kept = [fault for fault in record["faults"] if (fault["op"], fault["backend"], fault["dtype"]) not in tried]
        new = {}
        for trial, fault in results:
            if fault and _kernel(trial) not in new:
                names = dict(zip(("op", "backend", "dtype"), _kernel(trial), strict=True))
                new[_kernel(trial)] = {**names, "case": trial.case.label, "fault": fault, "date": now()}
        record["faults"] = kept + list(new.values())
        before = (record["checked"] or {}).get("kernels", [])
        record["checked"] = {"date": now(), "kernels": sorted({*map(tuple, before), *tried})}

    file = cache.update(machine.identity(device), change)
    findings.forget()
    return file


def ensure(ops: Collection[str], dtypes: Collection[torch.dtype], device: torch.device) -> list[Result]:
    """Checks those backends of the ops, in these dtypes, that were not checked on this machine yet; what was wrong."""
    checked = findings.record(device)["checked"] or {"kernels": []}
    known = {tuple(kernel) for kernel in checked["kernels"]}
    backends = dispatch.ON_CPU if device.type == "cpu" else dispatch.BACKENDS
    chosen = [t for t in trials("default", device, ops, backends) if t.dtype in dtypes and _kernel(t) not in known]
    if not chosen:
        return []
    results = list(run(chosen, "default", device))
    keep(device, results, chosen)
    return [(trial, fault) for trial, fault in results if fault]


def _kernel(trial: Trial) -> tuple[str, str, str]:
    return trial.case.op, trial.backend, trial.dtype_name


def now() -> str:
    """The time, as records have it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
