"""Every op's kernels compile for every generation of GPU: matrix units, shared memory, no spills, no float64.

Compiled in a process of its own, because under TRITON_INTERPRET=1, as the other op tests run, kernels are Python.
One in `EVERY` of each kernel's cases, different ones for each architecture: all of them take minutes, and are what
`python -m cnkernels.aot` compiles.
"""

import os
import re
import subprocess
import sys

import pytest

from cnkernels.aot import ARCHITECTURES
from cnkernels.dispatch import OPS

EVERY = 24


def run(*arguments, interpret=False):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    return subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("op", OPS)
def test_no_default_configuration_has_a_fault(op):
    done = run("cnkernels.aot", "--op", op, "--every", str(EVERY))
    assert done.returncode == 0, done.stdout + done.stderr
    _, *rows, verdict = done.stdout.splitlines()
    assert verdict == "0 with faults"
    assert {row.split()[0] for row in rows} == {f"sm_{arch}" for arch in ARCHITECTURES}


def test_each_fault_is_found():
    done = run("tests.cnkernels.aot_kernels")
    assert done.returncode == 0, done.stderr
    rows = [line.split("|") for line in done.stdout.splitlines()]
    sound = [row for row in rows if row[0] == "sound"]
    assert [row[1:] for row in sound] == [[str(arch), target.matrix_unit, ""] for arch, target in ARCHITECTURES.items()]
    faults = {name: fault for name, _, _, fault in rows if name != "sound"}
    assert re.fullmatch(r"\d+ spill instructions", faults["spills"])
    assert faults["shared"] == "393216 bytes of shared memory, the limit is 232448"
    assert faults["unit"] == "no HGMMA"
    assert re.fullmatch(r"\d+ float64 instructions", faults["double"])


def test_the_interpreter_is_refused():
    done = run("cnkernels.aot", interpret=True)
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stderr
