"""Times every op and both jobs against every alternative, in one run, and writes one JSON file.

    python -m benchmarks.run [--quick] [--op OP] [--job JOB] [--shape TEXT] [--dtype DTYPE] [--provider NAME]

On a GPU at SD 1.5's sizes; without one at sizes that a CPU gets through, to show that the whole of it works.
"""

import argparse
import json
import logging
import time
from pathlib import Path

import torch

from benchmarks import gate, jobs, machine, measure, ops
from cnkernels import dispatch

logger = logging.getLogger("benchmarks")

RESULTS = Path(__file__).resolve().parent / "results"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="batch 2 and float16 only, one size of each job")
    parser.add_argument("--op", action="append", choices=dispatch.OPS, help="only this op; may be repeated")
    parser.add_argument("--job", action="append", choices=list(jobs.PROVIDERS), help="only this job; may be repeated")
    parser.add_argument("--shape", help="only shapes whose label contains this text")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="only this dtype; may be repeated")
    parser.add_argument("--provider", action="append", help="only these providers (and eager, the yardstick)")
    parser.add_argument("--gate", type=Path, help="test statuses from benchmarks.gate; without it the tests run first")
    parser.add_argument("--output", type=Path, help="default: a dated file in benchmarks/results/<device>/")
    return parser.parse_args(argv)


def selected(case: ops.Case, options: argparse.Namespace) -> ops.Case | None:
    """The case with the providers asked for, or None if it was not asked for."""
    if options.shape and options.shape not in case.label:
        return None
    if options.provider:
        wanted = {"eager", *options.provider}
        providers = {name: f for name, f in case.providers.items() if name in wanted}
        return ops.Case(**{**vars(case), "providers": providers})
    return case


def op_rows(options: argparse.Namespace, device: torch.device, ceilings: dict, statuses: dict) -> list[dict]:
    small = device.type != "cuda"
    names = options.op or ([] if options.job else list(dispatch.OPS))
    batches = [1] if small else [2] if options.quick else [2, 16]
    default = ["float32"] if small else ["float16"] if options.quick else ["float16", "bfloat16"]
    dtypes = [DTYPES[name] for name in options.dtype or default]
    table = []
    for case in ops.cases(names, batches, dtypes, small):
        case = selected(case, options)
        if case is None:
            continue
        logger.info("%s", case.label)
        table += measure.rows(case, device, ceilings, gate.refused(statuses[case.op]))
        torch._dynamo.reset()
    return table


def job_rows(options: argparse.Namespace, device: torch.device) -> list[dict]:
    if options.op and not options.job:
        return []
    small = device.type != "cuda"
    table = []
    for job in jobs.jobs(small, options.quick):
        if (options.job and job.name not in options.job) or (options.shape and options.shape not in job.label):
            continue
        logger.info("%s", job.label)
        table += jobs.rows(job, device, options.provider, small)
        torch._dynamo.reset()
    return table


def run(options: argparse.Namespace) -> dict:
    """The whole run, as it is written to the file."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    begin = time.monotonic()
    names = options.op or ([] if options.job else list(dispatch.OPS))
    statuses = json.loads(options.gate.read_text()) if options.gate else gate.statuses(names)
    dtypes = [DTYPES[name] for name in options.dtype or ("float16", "bfloat16")]
    dtypes = dtypes if device.type == "cuda" else [torch.float32]
    before = machine.ceilings(device, dtypes)
    table = op_rows(options, device, before, statuses) + job_rows(options, device)
    return {
        "machine": machine.describe(device),
        "ceilings_before": before,
        "ceilings_after": machine.ceilings(device, dtypes),
        "tests": statuses,
        "seconds": time.monotonic() - begin,
        "rows": table,
    }


def main(argv: list[str] | None = None) -> Path:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = arguments(argv)
    result = run(options)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stamp = result["machine"]["date"].replace(":", "").split("+")[0]
    path = options.output or RESULTS / machine.folder_name(device) / f"{stamp}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    logger.info("%d rows in %.0f s: %s", len(result["rows"]), result["seconds"], path)
    return path


if __name__ == "__main__":
    main()
