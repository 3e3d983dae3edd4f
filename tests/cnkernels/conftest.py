"""Every op test runs with uninitialised memory poisoned, and without a GPU on Triton's interpreter and csrc/host."""

import os

import pytest
import torch

from cnkernels import extension, plans
from cnkernels.check import emulation
from tests.cnkernels import failures, host_build


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "cuda: launches the CUDA kernels, on a CPU by the build that executes them there"
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    if report.when == "call" and report.failed and hasattr(report.longrepr, "addsection"):
        report.longrepr.addsection("to run this test alone", failures.how_to_repeat(item))
    return report


@pytest.fixture(scope="session")
def cuda_kernels_absent() -> str | None:
    """Why the CUDA kernels cannot run here. On a CPU their build takes a minute: only tests of theirs wait for it."""
    if torch.cuda.is_available():
        return extension.why_absent()
    if host_build.COMPILER is None:
        return "needs a C++ compiler"
    if extension.why_host_absent():
        extension.load_host(host_build.build())
    return None


@pytest.fixture(autouse=True)
def cuda_kernels(request: pytest.FixtureRequest) -> None:
    """Loads the CUDA kernels for a test that is marked so."""
    if request.node.get_closest_marker("cuda"):
        reason = request.getfixturevalue("cuda_kernels_absent")
        if reason is not None:
            pytest.skip(reason)


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
