"""What every test starts from."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers in whatever order, and on however many workers, the tests run."""
    torch.manual_seed(0)
