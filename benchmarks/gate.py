"""Runs the tests of the ops and reports which backends fail: `benchmarks.run` gives these no row.

python -m benchmarks.gate [--op OP] [--output FILE]                   # runs the tests of the ops' backends
python -m benchmarks.gate --report JUNIT.xml [--op OP] [--output FILE]  # reads what `pytest --junitxml` left

FILE records commit, sources, extension and machine. `benchmarks.run --gate FILE` refuses a file of others.
"""

import hashlib
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import torch

from benchmarks import machine, ops
from benchmarks.machine import ROOT
from cnkernels import dispatch
from cnkernels.progress import say
from controlnet.common.command import parser as command_parser

TESTS = Path("tests", "cnkernels")
SOURCES = ("cnkernels", "csrc", "tests/cnkernels", "tests/conftest.py")
NONE = {"passed": 0, "failed": 0, "skipped": 0, "failures": []}  # what is known of a backend that nobody tested


def names(op: str, backend: str) -> set[str]:
    """Returns the test files of an op: those shared by all backends, and the backend's own."""
    return {f"test_{op}", f"test_{op}_{backend}", f"test_{backend}_{op}"}


def counts(report: Path, op: str, backend: str) -> dict:
    """Counts one backend's tests in a JUnit report: {"passed": n, "failed": n, "skipped": n, "failures": [names]}."""
    cases = []
    for case in ElementTree.parse(report).iter("testcase"):
        file = case.get("classname", "").rpartition(".")[2]
        words = re.split(r"[^a-zA-Z0-9]+|_", f"{file}-{case.get('name', '')}")
        if file in names(op, backend) and backend in words:
            cases.append(case)
    failures = [c.get("name", "?") for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = sum(c.find("skipped") is not None for c in cases)
    passed = len(cases) - len(failures) - skipped
    return {"passed": passed, "failed": len(failures), "skipped": skipped, "failures": failures}


def run_tests(of: dict[str, list[str]], report: Path, end: float = math.inf) -> None:
    """Runs the tests of these ops' backends once and leaves a JUnit report; none begins after `end` (Unix seconds)."""
    wanted = sorted({name for op, backends in of.items() for backend in backends for name in names(op, backend)})
    files = [str(TESTS / f"{name}.py") for name in wanted if (ROOT / TESTS / f"{name}.py").exists()]
    command = [sys.executable, "-m", "pytest", f"--junitxml={report}", *files]
    command += ["-k", " or ".join(sorted({backend for backends in of.values() for backend in backends}))]
    if end < math.inf:
        command += ["-p", "benchmarks.deadline", "--end", str(end)]
    if importlib.util.find_spec("xdist") and (processes := min(8, (os.cpu_count() or 1) // 2)) > 1:
        command += ["-n", str(processes)]
    say(f"running the tests of {', '.join(of)}, which takes minutes")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if not report.exists():
        raise RuntimeError(f"the tests did not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def statuses(of: list[str], report: Path | None = None, end: float = math.inf) -> dict[str, dict[str, dict]]:
    """Returns op -> backend -> `counts`, from a report or, without one, by running the tests until `end`."""
    backends = {op: ops.backends(op) for op in of}
    with tempfile.TemporaryDirectory() as folder:
        if report is None and of:
            report = Path(folder) / "report.xml"
            run_tests(backends, report, end)
        return {op: {name: counts(report, op, name) for name in backends[op]} for op in of}


def sources() -> list[Path]:
    """Returns the files that determine the test results: sources, tests and the extension."""
    found = [file for name in SOURCES for file in [ROOT / name, *(ROOT / name).rglob("*")]]
    return sorted(file for file in found if file.suffix in (".py", ".cu", ".cuh", ".h", ".cpp", ".so"))


def identity() -> dict[str, str | None]:
    """Identifies what test results are valid for: commit, sources, extension and machine."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    described = machine.describe(device)
    digests = {False: hashlib.sha256(), True: hashlib.sha256()}
    extensions = [file for file in sources() if file.suffix == ".so"]
    for file in sources():
        digests[file.suffix == ".so"].update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return {
        **{key: described[key] for key in ("commit", "device", "processor", "driver", "torch", "triton")},
        "sources": digests[False].hexdigest(),
        "extension": digests[True].hexdigest() if extensions else None,
    }


def write(path: Path, of: dict[str, dict[str, dict]]) -> None:
    """Writes the statuses of ops with their `identity`."""
    path.write_text(json.dumps({"of": identity(), "tests": of}, indent=1) + "\n")


def read(path: Path) -> dict[str, dict[str, dict]]:
    """Reads the statuses that `write` wrote.

    Raises:
        ValueError: they hold for another commit, machine, extension or state of the sources, or the file is no gate.
    """
    again = "run `python -m benchmarks.gate --output FILE` again"
    kept = json.loads(path.read_text())
    if not isinstance(kept, dict) or kept.keys() != {"of", "tests"}:
        raise ValueError(f'{path}: is not a gate\'s file, which has "of" and "tests": {again}')
    for key, here in identity().items():
        if kept["of"].get(key) != here:
            raise ValueError(
                f"{path}: is the gate of another {key}, {kept['of'].get(key)}, and here it is {here}: {again}"
            )
    return kept["tests"]


def expect_current(report: Path) -> None:
    """Raises ValueError if a file that was tested, or is a test, has changed since the report was written."""
    for file in sources():
        if file.stat().st_mtime > report.stat().st_mtime:
            raise ValueError(f"{report}: was written before {file.relative_to(ROOT)} was: run the tests again")


def refused(of_op: dict[str, dict]) -> dict[str, str]:
    """Returns the backends that get no row, with the reason, from the statuses of one op."""
    reasons = {}
    for backend, found in of_op.items():
        if found["failed"]:
            names = ", ".join(found["failures"][:3])
            reasons[backend] = f"refused: {found['failed']} of its tests fail on this machine ({names})"
        elif not found["passed"]:
            reasons[backend] = "refused: none of its tests ran on this machine"
    return reasons


EXAMPLES = """
python -m benchmarks.gate --op geglu --output gate.json
python -m benchmarks.run --gate gate.json
"""


def main() -> None:
    parser = command_parser("benchmarks.gate", __doc__, EXAMPLES)
    parser.add_argument("--op", action="append", choices=dispatch.OPS, help="may be given more than once; default: all")
    parser.add_argument("--report", type=Path, help="JUnit XML of a run of the tests; default: run them")
    parser.add_argument("--output", type=Path, help="JSON file, for benchmarks.run --gate")
    arguments = parser.parse_args()
    if arguments.report:
        expect_current(arguments.report)
    found = statuses(arguments.op or list(dispatch.OPS), arguments.report)
    print(json.dumps(found, indent=1))
    if arguments.output:
        write(arguments.output, found)
    for op, of_op in found.items():
        for backend, reason in refused(of_op).items():
            print(f"{op}, {backend}: {reason}", file=sys.stderr)
    if any(refused(of_op) for of_op in found.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
