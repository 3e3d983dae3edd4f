"""Every op test runs with uninitialised memory poisoned, and without a GPU under Triton's interpreter."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined, hence before any is imported


@pytest.fixture(autouse=True)
def poisoned_empty():
    """Fills what torch.empty and its kin return with NaN, so that an element nobody wrote fails a comparison."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
