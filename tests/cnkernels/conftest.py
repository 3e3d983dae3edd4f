"""Every op test runs with uninitialised memory poisoned, and without a GPU on Triton's interpreter and csrc/host."""

import os

import pytest
import torch

from cnkernels import extension, plans
from cnkernels.check import emulation
from tests.cnkernels import host_build

if not torch.cuda.is_available() and host_build.COMPILER is not None:
    extension.load_host(host_build.build())


@pytest.fixture(autouse=True)
def no_plans():
    """Each test plans anew, with the kernels and rules that it may have put in place."""
    plans.forget()
    yield
    plans.forget()


@pytest.fixture(autouse=True)
def poisoned_empty():
    """Fills what torch.empty and its kin return with NaN, so that an element nobody wrote fails a comparison."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(autouse=True, scope="session")
def interpreter_that_rounds_as_a_gpu():
    if "TRITON_INTERPRET" in os.environ:
        emulation.repair_interpreter()
