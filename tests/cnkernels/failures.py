"""Adds to a failing test's report what is needed to repeat it: the seed and the machine's instruction set."""

import os
import shlex

import numpy as np
import pytest
import torch

# Each narrows what a library may use of the CPU, and is read when that library is loaded.
NARROWING = ("ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA", "NPY_DISABLE_CPU_FEATURES")


def arithmetic() -> list[str]:
    """The libraries that compute here, and the instructions that they use."""
    capability = torch.backends.cpu.get_cpu_capability()
    blas = np.show_config(mode="dicts").get("Build Dependencies", {}).get("blas", {})
    return [
        f"PyTorch {torch.__version__} on {capability}, {torch.get_num_threads()} threads; "
        f"NumPy {np.__version__} with {blas.get('name')} {blas.get('version')}",
        *(line.strip(" -") for line in torch.__config__.show().splitlines() if "Library" in line or "MKL-DNN" in line),
    ]


def how_to_repeat(item: pytest.Item) -> str:
    """Seed, instruction set and libraries, and the command that runs this test as it ran."""
    seed = item.config.getoption("--seed")
    narrowed = [f"{name}={shlex.quote(os.environ[name])} " for name in NARROWING if name in os.environ]
    command = f"{''.join(narrowed)}python -m pytest --seed {seed} {shlex.quote(item.nodeid)}"
    return "\n".join([f"seed {seed}", *arithmetic(), command])
