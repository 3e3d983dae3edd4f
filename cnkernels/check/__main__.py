"""Checks every kernel on this machine: python -m cnkernels.check [--full] [--emulated] [--report FILE]

Every op, backend, dtype and layout that this machine can run, forward and backward, against PyTorch in float64 by the
project's accuracy rule; with its outputs poisoned and guarded, and repeated for the same bits. Each trial runs in a
process that another one's crash or hang cannot hurt. What is found wrong is kept in the cache, and `auto` no longer
uses it; a check that finds it right takes that back.

example: python -m cnkernels.check --op attention --report attention.json
"""

import argparse
import datetime
import json
import logging
import platform
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from cnkernels import cache, dispatch, machine
from cnkernels.check import emulation
from cnkernels.check.runner import Answer, Runner
from cnkernels.check.trial import Trial, trials

WORKER = "cnkernels.check.worker"


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cnkernels.check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", action="append", choices=dispatch.OPS, help="may be given more than once; default: all")
    parser.add_argument("--backend", action="append", choices=dispatch.BACKENDS, help="likewise")
    parser.add_argument("--full", action="store_true", help="every shape and layout, not only one per code path")
    parser.add_argument(
        "--emulated", action="store_true", help="the GPU kernels on the CPU: Triton's interpreter, csrc built for a CPU"
    )
    parser.add_argument("--report", type=Path, help="JSON file with every result, to be attached to a bug report")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long one trial may take (default 60)")
    parser.add_argument("--preload", action="append", default=[], metavar="MODULE", help="imported before the trials")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 1 where something is wrong."""
    options = parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    device = torch.device("cuda" if torch.cuda.is_available() and not options.emulated else "cpu")
    if options.emulated:
        missing = emulation.prepare()
        if missing:
            print(f"the CUDA kernels are left out: {missing}")
    level = "full" if options.full else "emulated" if options.emulated else "default"
    chosen = [
        trial
        for trial in trials(level, device)
        if trial.case.op in (options.op or dispatch.OPS) and trial.backend in (options.backend or dispatch.BACKENDS)
    ]
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        print("this GPU is older than compute capability 8.0: only PyTorch's own kernels (aten) serve it")
    environment = {"TRITON_INTERPRET": "1"} if options.emulated else {}
    command = [f"--device={device}", *(["--emulated"] if options.emulated else [])]
    command += [f"--preload={module}" for module in options.preload]
    begin = time.monotonic()
    with Runner(WORKER, command, environment, options.seconds) as runner:
        results = list(_told(runner.run((t, _document(t, level)) for t in chosen), len(chosen)))
    wrong = [(trial, _fault(answer)) for trial, answer in results if _fault(answer)]
    print(table(results))
    print(f"{len(results)} trials, {len(wrong)} wrong, {time.monotonic() - begin:.0f} s")
    for trial, fault in wrong:
        print(f"WRONG {trial.label}: {fault}")
    identity = machine.identity(device)
    if not options.emulated:  # says nothing about the kernels that a call on this machine would get
        file = cache.update(identity, lambda record: _keep(record, results))
        print(f"kept in {file}" if file else "nothing was kept")
    if options.report:
        options.report.write_text(json.dumps(report(identity, results), indent=1) + "\n")
        print(f"report in {options.report}")
    if wrong:
        trial = wrong[0][0]
        print(
            "to report it, attach what this prints:\n  python -m cnkernels.check"
            f" --op {trial.case.op} --backend {trial.backend} --report cnkernels-check.json"
        )
    return 1 if wrong else 0


def _document(trial: Trial, level: str) -> dict:
    return {"level": level, "number": trial.number, "backend": trial.backend, "dtype": trial.dtype_name}


def _fault(answer: Answer) -> str | None:
    return answer.get("lost") or answer.get("fault")


def _told(results: Iterable[tuple[Trial, Answer]], count: int) -> Iterable[tuple[Trial, Answer]]:
    """The results as they come, with a line of progress on a terminal."""
    for done, (trial, answer) in enumerate(results, 1):
        if sys.stderr.isatty():
            print(f"\r\033[K{done}/{count} {trial.label}", end="\n" if done == count else "", file=sys.stderr)
        yield trial, answer


def table(results: Sequence[tuple[Trial, Answer]]) -> str:
    """One line for each op and backend: trials that were right, of how many, in each dtype."""
    counts: dict[tuple[str, str], dict[str, list[int]]] = {}
    for trial, answer in results:
        right, tried = counts.setdefault((trial.case.op, trial.backend), {}).get(trial.dtype_name, (0, 0))
        counts[trial.case.op, trial.backend][trial.dtype_name] = [right + (_fault(answer) is None), tried + 1]
    lines = [f"{'op':<16} {'backend':<10} right of tried"]
    for (op, backend), dtypes in sorted(counts.items()):
        cells = (f"{dtype} {right}/{tried}" for dtype, (right, tried) in dtypes.items())
        lines.append(f"{op:<16} {backend:<10} {', '.join(cells)}")
    return "\n".join(lines)


def report(identity: machine.Identity, results: Sequence[tuple[Trial, Answer]]) -> dict:
    """What a bug report needs: the machine, and every trial with what was wrong."""
    return {
        "identity": identity,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "date": _now(),
        "trials": [{"trial": trial.label, "fault": _fault(answer)} for trial, answer in results],
    }


def _keep(record: cache.Record, results: Sequence[tuple[Trial, Answer]]) -> None:
    """Replaces what the record says of every op, backend and dtype that was tried."""
    tried = {(trial.case.op, trial.backend, trial.dtype_name) for trial, _ in results}
    kept = [fault for fault in record["faults"] if (fault["op"], fault["backend"], fault["dtype"]) not in tried]
    new = {}
    for trial, answer in results:
        key = trial.case.op, trial.backend, trial.dtype_name
        if _fault(answer) and key not in new:
            names = {"op": key[0], "backend": key[1], "dtype": key[2]}
            new[key] = {**names, "case": trial.case.label, "fault": _fault(answer), "date": _now()}
    record["faults"] = kept + list(new.values())
    record["checked"] = {"date": _now(), "trials": len(results)}


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


if __name__ == "__main__":
    sys.exit(main())
