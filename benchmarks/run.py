"""Times every op and job against every alternative in one run, and writes a JSON file.

    python -m benchmarks.run [--quick] [--op OP] [--job JOB] [--shape TEXT] [--dtype DTYPE] [--provider NAME]

Sizes are SD 1.5's on a GPU, and small ones on a CPU, where a run only shows that the benchmark works.

A run ends within its budget: the commonest shapes go first, and on those what is ready at once (our kernels, eager
PyTorch, libraries) before what must be compiled for minutes; what is not reached is a row that says so. A case that is
reached again with its compiled providers is timed anew as a whole, so that a case's rows always come from one
interleaved measurement. The file is rewritten after every step; a run that is killed leaves what it had.
"""

import argparse
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import gate, jobs, machine, measure, ops, peers
from benchmarks.budget import NOT_REACHED, Budget
from benchmarks.rows import key
from cnkernels import dispatch
from controlnet.common.command import parser as command_parser

logger = logging.getLogger("benchmarks")

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
QUICK_SECONDS, FULL_SECONDS = 220.0, 520.0  # on a GPU; a CPU's small sizes take what they take
OP_SECONDS, JOB_SECONDS = 40.0, 150.0  # of one provider until its first result
OP_LEAST, JOB_LEAST = 10.0, 60.0  # with less left, nothing that must be compiled is begun
QUICK_SHAPES = 4  # of each op
JOB_PLACE, LAST = 1, 1000  # jobs come after the first shape of every op, compiled jobs at the very end


@dataclass(frozen=True)
class Step:
    """One step of the run. Steps run in the order of `turn`, then in the order of the file.

    What must be compiled waits for the first QUICK_SHAPES shapes of every op, not for the rarest.
    """

    label: str
    slow: bool
    place: int
    run: Callable[[], list[dict]]
    least: float = 0.0  # seconds of the budget without which it is not begun

    @property
    def turn(self) -> tuple[int, bool]:
        return self.place + QUICK_SHAPES * self.slow, self.slow


EXAMPLES = """
python -m benchmarks.run --quick
python -m benchmarks.run --op attention --dtype float16 --shape 64x64 --budget 60 --output attention.json
"""


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser("benchmarks.run", __doc__, EXAMPLES)
    parser.add_argument("--quick", action="store_true", help="batch 2, float16, few shapes, one size of each job")
    parser.add_argument("--op", action="append", choices=dispatch.OPS, help="only this op; may be repeated")
    parser.add_argument("--job", action="append", choices=list(jobs.PROVIDERS), help="only this job; may be repeated")
    parser.add_argument("--shape", help="only shapes whose label contains this text")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="only this dtype; may be repeated")
    parser.add_argument("--provider", action="append", help="only these providers (and eager, the yardstick)")
    text = f"seconds of the run; 0: no limit (default on a GPU: {QUICK_SECONDS:.0f} with --quick, {FULL_SECONDS:.0f})"
    parser.add_argument("--budget", type=float, metavar="SECONDS", help=text)
    parser.add_argument("--gate", type=Path, help="test statuses from benchmarks.gate; without it the tests run first")
    parser.add_argument("--output", type=Path, help="default: a dated file in benchmarks/results/<device>/")
    return parser.parse_args(argv)


def budget_of(options: argparse.Namespace) -> Budget:
    seconds = options.budget
    if seconds is None:
        seconds = 0.0 if not torch.cuda.is_available() else QUICK_SECONDS if options.quick else FULL_SECONDS
    return Budget(seconds or math.inf, OP_SECONDS if torch.cuda.is_available() else math.inf)


def selected_cases(options: argparse.Namespace, small: bool) -> Iterable[tuple[int, ops.Case]]:
    """Yields (place of its shape in its op's list, case) of the selected cases, with the selected providers."""
    names = options.op or ([] if options.job else list(dispatch.OPS))
    batches = [1] if small else [2] if options.quick else [2, 16]
    default = ["float32"] if small else ["float16"] if options.quick else ["float16", "bfloat16"]
    places: dict[tuple, int] = {}
    for case in ops.cases(names, batches, [DTYPES[name] for name in options.dtype or default], small):
        kind = (case.op, case.shape.split()[0], case.dtype, case.layout, case.direction)
        places[kind] = place = places.get(kind, -1) + 1
        if (options.quick and place >= QUICK_SHAPES) or (options.shape and options.shape not in case.label):
            continue
        if options.provider:
            wanted = {"eager", *options.provider}
            case = replace(case, providers={name: f for name, f in case.providers.items() if name in wanted})
        yield place, case


def selected_jobs(options: argparse.Namespace, small: bool) -> Iterable[jobs.Job]:
    for job in jobs.jobs(small, options.quick) if options.job or not options.op else ():
        if (not options.job or job.name in options.job) and (not options.shape or options.shape in job.label):
            yield job


def steps(
    options: argparse.Namespace, device: torch.device, ceilings: dict, statuses: dict, budget: Budget
) -> tuple[list[dict], list[Step]]:
    """Returns all rows, blank, in the order of the file, and the steps that fill them, in the order of the run."""
    small = device.type != "cuda"
    blank, found = [], []
    for place, case in selected_cases(options, small):
        blank += [measure.blank(case, name) for name in case.providers]
        quick = {name: f for name, f in case.providers.items() if name not in peers.SLOW}
        refused = gate.refused({**dict.fromkeys(ops.backends(case.op), gate.NONE), **statuses.get(case.op, {})})
        variants = [replace(case, providers=quick)] + ([case] if len(quick) < len(case.providers) else [])
        for slow, variant in enumerate(variants):

            def run(variant=variant, refused=refused):
                return measure.rows(variant, device, ceilings, refused, budget)

            found.append(Step(case.label, bool(slow), place, run, OP_LEAST * slow))
    for job in selected_jobs(options, small):
        for name, (_, how) in jobs.PROVIDERS[job.name].items():
            if options.provider and not any(name.startswith(p) for p in options.provider):
                continue
            blank.append(jobs.blank(job, name))

            def run(job=job, name=name):
                return [jobs.row(job, name, device, small, budget, JOB_SECONDS if not small else math.inf)]

            slow = "compile" in how
            found.append(Step(f"{job.label}: {name}", slow, LAST if slow else JOB_PLACE, run, JOB_LEAST * slow))
    return [{**row, "reason": NOT_REACHED} for row in blank], sorted(found, key=lambda step: step.turn)


def merge(table: dict[tuple, dict], rows: list[dict]) -> None:
    """Puts the rows of a step into the table.

    A second measurement of a case that ran out of budget half-way and lost a time changes reasons only, so that times
    of two measurements are never mixed.
    """
    lost = any("median" in table[key(row)] and "median" not in row for row in rows)
    for row in rows:
        if not lost or ("median" not in table[key(row)] and "median" not in row):
            table[key(row)] = row


def run(options: argparse.Namespace, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Runs all steps and returns the content of the file; calls `keep` with the partial content after each step."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    begin, budget = time.monotonic(), budget_of(options)
    names = options.op or ([] if options.job else list(dispatch.OPS))
    half = time.time() + budget.left() / 2
    statuses = gate.read(options.gate) if options.gate else gate.statuses(names, end=half)
    dtypes = [DTYPES[name] for name in options.dtype or ("float16", "bfloat16")]
    dtypes = dtypes if device.type == "cuda" else [torch.float32]
    before = machine.ceilings(device, dtypes)
    result = {"machine": machine.describe(device), "finished": False, "ceilings_before": before, "tests": statuses}
    blank, todo = steps(options, device, before, statuses, budget)
    table = {key(row): row for row in blank}
    for step in todo:
        if budget.left() <= step.least:
            logger.info("not reached within the budget: %s", step.label)
            continue
        logger.info("%6.0f s  %s%s", time.monotonic() - begin, step.label, " (with compiled)" if step.slow else "")
        merge(table, step.run())
        torch._dynamo.reset()
        keep({**result, "seconds": time.monotonic() - begin, "rows": list(table.values())})
    after = machine.ceilings(device, dtypes)
    seconds = time.monotonic() - begin
    return {**result, "finished": True, "ceilings_after": after, "seconds": seconds, "rows": list(table.values())}


def write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(partial, path)


def main(argv: list[str] | None = None) -> Path:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = arguments(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stamp = time.strftime("%Y-%m-%dT%H%M%S", time.gmtime())
    path = options.output or machine.RESULTS / machine.folder_name(device) / f"{stamp}.json"
    result = run(options, lambda found: write(path, found))
    write(path, result)
    logger.info("%d rows in %.0f s: %s", len(result["rows"]), result["seconds"], path)
    return path


if __name__ == "__main__":
    main()
    logging.shutdown()
    os._exit(0)  # an exit would wait up to five minutes for PyTorch's workers, if a compilation was interrupted
