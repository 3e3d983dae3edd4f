"""A pytest plugin with a deadline: skips and reports tests that would start after it, and fails such a run.

    pytest -p benchmarks.deadline --end UNIX_SECONDS

Killing pytest instead would leave a test that looks like a failure, and with pytest-xdist no report.
"""

import time

import pytest

REASON = "not reached: the time for the tests is over"
_skipped: list[str] = []


def pytest_addoption(parser):
    parser.addoption("--end", type=float, metavar="UNIX_SECONDS", help="start no test after this time")


def pytest_runtest_setup(item):
    end = item.config.getoption("end")
    if end is not None and time.time() > end:
        pytest.skip(REASON)


def pytest_runtest_logreport(report):
    if report.skipped and REASON in str(report.longrepr):
        _skipped.append(report.nodeid)


def pytest_sessionfinish(session, exitstatus):
    if _skipped and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    if _skipped:
        terminalreporter.write_line(f"{len(_skipped)} tests were not reached within the time for the tests")
