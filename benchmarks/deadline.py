"""A pytest plugin: tests that have not begun by a given time are skipped and said to be, and such a run fails.

    pytest -p benchmarks.deadline --end UNIX_SECONDS

An interruption would leave half a test that looks like a failure, and with pytest-xdist no report at all.
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
