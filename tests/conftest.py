"""Fixtures and settings of all tests."""

import os
import signal
import tempfile

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, which any test file may do
# A folder that is not there: what was found out on this machine decides nothing in a test.
os.environ["CNKERNELS_CACHE"] = os.path.join(tempfile.gettempdir(), f"cnkernels-of-no-test-{os.getpid()}")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell's background jobs inherit it; tests send the signal
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=0, help="of the random numbers that every test starts from")


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> None:
    """The same random numbers in whatever order, and on however many workers, the tests run."""
    torch.manual_seed(request.config.getoption("--seed"))
