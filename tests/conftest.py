"""What every test starts from."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, which any test file may do


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers in whatever order, and on however many workers, the tests run."""
    torch.manual_seed(0)
