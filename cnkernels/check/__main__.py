"""Checks every kernel on this machine: python -m cnkernels.check [--full] [--emulated] [--report FILE]

Every op, backend, dtype and layout that this machine can run, forward and backward, against PyTorch in float64 by the
project's accuracy rule; with its outputs poisoned and guarded, and repeated for the same bits. Each trial runs in a
process that another one's crash or hang cannot hurt. What is found wrong is kept in the cache, and `auto` no longer
uses it; a check that finds it right takes that back.

example: python -m cnkernels.check --op attention --report attention.json
"""

import argparse
import json
import logging
import platform
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from cnkernels import dispatch, machine
from cnkernels.check import Result, emulation, keep, now, run
from cnkernels.check.trial import trials
from cnkernels.progress import Progress


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
    if options.report and not options.report.parent.is_dir():
        parser().error(f"--report {options.report}: the folder {options.report.parent} does not exist")
    logging.basicConfig(format="%(message)s")
    device = torch.device("cuda" if torch.cuda.is_available() and not options.emulated else "cpu")
    if options.emulated:
        missing = emulation.prepare()
        if missing:
            print(f"the CUDA kernels are left out: {missing}")
    level = "full" if options.full else "emulated" if options.emulated else "default"
    chosen = trials(level, device, options.op or dispatch.OPS, options.backend or dispatch.BACKENDS)
    if machine.too_old(device):
        print(machine.too_old(device))
    begin = time.monotonic()
    answers = run(chosen, level, device, emulated=options.emulated, seconds=options.seconds, preload=options.preload)
    results, interrupted = [], False
    try:
        for result in _told(answers, len(chosen)):
            results.append(result)
    except KeyboardInterrupt:
        interrupted = True
        print("interrupted: kept is what was found of the kernels that were tried to the end")
    wrong = [(trial, fault) for trial, fault in results if fault]
    print(table(results))
    left_out = f", {len(chosen) - len(results)} left out" if len(results) < len(chosen) else ""
    print(f"{len(results)} trials, {len(wrong)} wrong{left_out}, {time.monotonic() - begin:.0f} s")
    for trial, fault in wrong:
        print(f"WRONG {trial.label}: {fault}")
    if not options.emulated:  # which says nothing about the kernels that a call on this machine would get
        file = keep(device, results, chosen)
        print(f"kept in {file}" if file else "nothing was kept")
    if options.report:
        options.report.write_text(json.dumps(report(machine.identity(device), results), indent=1) + "\n")
        print(f"report in {options.report}")
    if wrong:
        trial = wrong[0][0]
        print(
            "to report it, attach what this prints:\n  python -m cnkernels.check"
            f" --op {trial.case.op} --backend {trial.backend} --report cnkernels-check.json"
        )
    return 1 if wrong else 130 if interrupted else 0


def _told(results: Iterable[Result], count: int) -> Iterable[Result]:
    """The results as they come, each with a line of progress."""
    progress = Progress(count)
    for done, (trial, fault) in enumerate(results, 1):
        progress(done, trial.label)
        yield trial, fault


def table(results: Sequence[Result]) -> str:
    """One line for each op and backend: trials that were right, of how many, in each dtype."""
    counts: dict[tuple[str, str], dict[str, list[int]]] = {}
    for trial, fault in results:
        right, tried = counts.setdefault((trial.case.op, trial.backend), {}).get(trial.dtype_name, (0, 0))
        counts[trial.case.op, trial.backend][trial.dtype_name] = [right + (fault is None), tried + 1]
    lines = [f"{'op':<16} {'backend':<10} right of tried"]
    for (op, backend), dtypes in sorted(counts.items()):
        cells = (f"{dtype} {right}/{tried}" for dtype, (right, tried) in dtypes.items())
        lines.append(f"{op:<16} {backend:<10} {', '.join(cells)}")
    return "\n".join(lines)


def report(identity: machine.Identity, results: Sequence[Result]) -> dict:
    """What a bug report needs: the machine, and every trial with what was wrong."""
    return {
        "identity": identity,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "date": now(),
        "trials": [{"trial": trial.label, "fault": fault} for trial, fault in results],
    }


if __name__ == "__main__":
    sys.exit(main())
