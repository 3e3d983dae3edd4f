"""benchmarks/gpu_proof.sh with a stand-in for Python: failing, hanging and missing steps are reported, others run."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_proof.sh"
STEPS = ["env", "build", "check", "tests", "gate", "tune", "bench", "report", "memcheck", "racecheck", "initcheck"]

pytestmark = pytest.mark.skipif(
    shutil.which("bash") is None or shutil.which("timeout") is None, reason="needs bash and coreutils"
)


def proof(tmp_path, behaviour="", gpu=False, **limits):
    """(exit status, step -> (status, note)) of the script, whose every Python command does as `behaviour` says."""
    stub, nvcc, sanitizer = (tmp_path / name for name in ("python", "nvcc", "compute-sanitizer"))
    there = f"*is_available*) exit {0 if gpu else 1};;"
    stub.write_text(f'#!/bin/sh\ncase "$*" in\n{there}\n{behaviour}\n*) echo "all good $*";;\nesac\n')
    nvcc.write_text("#!/bin/sh\n")
    sanitizer.write_text('#!/bin/sh\necho "$2 sees $*"\n[ "$2" != racecheck ] || exit 9\n')
    for program in (stub, nvcc, sanitizer):
        program.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_HOME"}
    environment |= {"PYTHON": str(stub), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment |= {name: str(value) for name, value in limits.items()}
    done = subprocess.run(
        ["bash", SCRIPT, tmp_path / "out"], env=environment, capture_output=True, text=True, timeout=60
    )
    told = {}
    for line in (tmp_path / "out" / "summary.txt").read_text().splitlines():
        if not line.startswith(" "):
            name, status, seconds, _, note = line.split(maxsplit=4)
            told[name] = status, note
            assert seconds.isdigit()
    return done.returncode, told


def test_all_steps_run_and_the_gpu_is_said_to_be_missing(tmp_path):
    code, told = proof(tmp_path)
    assert code == 0
    assert list(told) == ["gpu", *STEPS, "total"]
    assert told["gpu"][0] == "skipped" and "no GPU" in told["gpu"][1]
    assert {told[name][0] for name in STEPS} == {"ok"}
    assert "benchmarks.run --quick --budget" in (tmp_path / "out" / "bench.log").read_text()


def test_on_a_gpu_the_sanitizers_are_run_and_what_they_find_fails_the_proof(tmp_path):
    code, told = proof(tmp_path, gpu=True)
    assert code == 1
    assert "gpu" not in told and told["graphs"][0] == "ok"
    assert {name for name, (status, _) in told.items() if status == "FAILED"} == {"racecheck", "total"}
    assert told["racecheck"][1].startswith("exit 9; racecheck sees --tool racecheck")
    assert "-n 8" in told["tests"][1]


def test_a_step_that_fails_or_hangs_is_told_and_the_others_run(tmp_path):
    behaviour = "*setup.py*) echo no compiler; exit 3;;\n*tests/benchmarks*) echo half-way; exec sleep 50;;"
    code, told = proof(tmp_path, behaviour, TESTS_SECONDS=1)
    assert code == 1
    assert told["build"] == ("FAILED", "exit 3; no compiler")
    assert told["tests"] == ("TIMEOUT", "stopped after its 1 s; half-way")
    assert {told[name][0] for name in STEPS if name not in ("build", "tests")} == {"ok"}
    assert told["total"] == ("FAILED", f"2 steps failed; everything is in {tmp_path / 'out'}")


def test_what_is_not_installed_is_told_and_is_no_failure(tmp_path):
    code, told = proof(tmp_path, "*find_spec*pytest*|*find_spec*ninja*) exit 1;;")
    assert code == 0
    assert told["build"] == ("skipped", "pybind11 or ninja is not installed: no CUDA kernels")
    assert {told[name][0] for name in ("tests", "memcheck", "racecheck", "initcheck")} == {"skipped"}
    assert told["bench"][0] == "ok"


def test_the_whole_has_a_limit(tmp_path):
    code, told = proof(tmp_path, "*cnkernels.env*) exec sleep 50;;", TOTAL_SECONDS=2)
    assert code == 1
    assert told["env"][0] == "TIMEOUT"
    assert {told[name][0] for name in STEPS[1:]} == {"LEFT-OUT"}


@pytest.mark.parametrize("workers", [[], ["-n", "1"]], ids=["one process", "xdist"])
def test_tests_that_are_not_reached_are_told(tmp_path, workers):
    """The plugin that ends the tests in time: the report names every test, and a run that lacks some fails."""
    if workers:
        pytest.importorskip("xdist")
    (tmp_path / "test_two.py").write_text("def test_one():\n    pass\n\n\ndef test_two():\n    pass\n")
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", tmp_path, "-p", "benchmarks.deadline"]
    command += [*workers, f"--junitxml={tmp_path / 'report.xml'}", tmp_path / "test_two.py", "--end"]
    for end, code, told in ((0, 1, "2 tests were not reached"), (time.time() + 3600, 0, "2 passed")):
        done = subprocess.run([*command, str(end)], cwd=SCRIPT.parents[1], capture_output=True, text=True, timeout=60)
        assert done.returncode == code and told in done.stdout
        assert (tmp_path / "report.xml").read_text().count("<skipped") == 2 * code
