"""Bounds on the host's work by counts, independent of timing; in a separate process without Triton's interpreter."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
pytest.importorskip("diffusers")

PROGRAM = """
import cProfile, json, pstats
import torch
from benchmarks import host_cost, stub_gpu

torch.set_num_threads(1)


def python_calls(step):
    step(), step()
    profile = cProfile.Profile()
    profile.runcall(step)
    return pstats.Stats(profile).prim_calls


with stub_gpu.installed(90), stub_gpu.no_arithmetic(), host_cost.hints_given():
    calls = {
        kind: {name: python_calls(step) for name, step in host_cost.step_calls(training).items()}
        for kind, training in (("denoise", False), ("training", True))
    }
    ops = {op: python_calls(ours) for op, (ours, _) in host_cost.op_calls(False).items()}
compiled = []
with stub_gpu.installed(90, compiled):
    steps = host_cost.FirstSteps(False, torch.channels_last, compiled)
    kernels = [steps.step(*size) for size in host_cost.FIRST_STEPS[False]]
launched = []
with stub_gpu.installed(90, really=True):
    import cnkernels

    stub_gpu.Launcher.__call__ = lambda self, *arguments: launched.append(arguments)
    x = torch.zeros(4, 32)
    for _ in range(3):
        cnkernels.geglu(x)
ends = [tuple(a if isinstance(a, (int, float, str)) else type(a).__name__ for a in call[9:]) for call in launched]
places = [call[:4] for call in launched]
print(json.dumps({"calls": calls, "ops": ops, "kernels": kernels, "ends": ends, "places": places}))
"""


@pytest.fixture(scope="module")
def found():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


# Calls that Python makes in a step, of functions in Python and in C: measured ratios to diffusers' and a tenth more. In
# time the ratios are lower, since most of ours are look-ups: in training PyTorch's backward of diffusers makes no calls
# at all where ours looks up plans.
AT_MOST = [
    ("denoise", "ours", 1.12),  # 1.02
    ("denoise", "accelerated", 1.32),  # 1.20
    ("training", "ours", 1.67),  # 1.51
    ("training", "accelerated", 1.95),  # 1.77
]
OP_CALLS = {"attention": 42, "group_norm_silu": 45, "zero_conv_add": 51, "geglu": 28}  # of one call of an op


@pytest.mark.parametrize("step, provider, ratio", AT_MOST)
def test_a_step_makes_few_python_calls(found, step, provider, ratio):
    """Forward and backward in training."""
    calls = found["calls"][step]
    assert calls[provider] <= ratio * calls["diffusers"]


@pytest.mark.parametrize("op", OP_CALLS)
def test_a_call_of_an_op_makes_few_python_calls(found, op):
    assert found["ops"][op] <= 1.1 * OP_CALLS[op]


def test_a_first_step_compiles_few_kernels(found):
    first, other_batch, other_size = found["kernels"]
    assert first <= 24 and other_batch <= 2 and other_size <= 6


def test_a_bound_launch_gives_the_compiled_kernel_what_triton_s_own_launch_gives(found):
    assert len(found["ends"]) == 3
    assert found["ends"][1] == found["ends"][2] == found["ends"][0]
    assert found["places"][1] == found["places"][0]
