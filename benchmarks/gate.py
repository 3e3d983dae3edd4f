"""No row without passing tests: which backends of which ops fail theirs, on this machine, at this commit.

python -m benchmarks.gate [--op OP] [--output FILE]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import torch

from benchmarks.machine import ROOT
from cnkernels import dispatch


def backends_here() -> tuple[str, ...]:
    return ("triton", "cuda") if torch.cuda.is_available() else ("reference",)


def status(op: str, backend: str) -> dict:
    """Runs the tests of one backend of an op. {"passed": n, "failed": n, "skipped": n, "failures": [names]}"""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", f"tests/cnkernels/test_{op}.py"]
        done = subprocess.run([*command, "-k", backend], cwd=ROOT, capture_output=True, text=True)
        if not report.exists():
            return {"passed": 0, "failed": 1, "skipped": 0, "failures": [done.stdout[-2000:] + done.stderr[-2000:]]}
        cases = list(ElementTree.parse(report).iter("testcase"))
    failures = [c.get("name", "?") for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = sum(c.find("skipped") is not None for c in cases)
    counts = {"passed": len(cases) - len(failures) - skipped, "failed": len(failures), "skipped": skipped}
    return {**counts, "failures": failures}


def statuses(ops: list[str]) -> dict[str, dict[str, dict]]:
    """Op -> backend -> `status`."""
    return {op: {b: status(op, b) for b in backends_here() if (op, b) in dispatch.CAPABILITIES} for op in ops}


def refused(of_op: dict[str, dict]) -> dict[str, str]:
    """The backends that get no row, with the reason, from the statuses of one op."""
    reasons = {}
    for backend, found in of_op.items():
        if found["failed"]:
            names = ", ".join(found["failures"][:3])
            reasons[backend] = f"refused: {found['failed']} of its tests fail on this machine ({names})"
        elif not found["passed"]:
            reasons[backend] = "refused: none of its tests ran on this machine"
    return reasons


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gate", description=__doc__)
    parser.add_argument("--op", action="append", choices=dispatch.OPS, help="may be given more than once; default: all")
    parser.add_argument("--output", type=Path, help="JSON file, for benchmarks.run --gate")
    arguments = parser.parse_args()
    found = statuses(arguments.op or list(dispatch.OPS))
    text = json.dumps(found, indent=1)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
