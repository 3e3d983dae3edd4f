"""Runs tests of the ops for some seeds in this process, and records the result of every comparison.

python -m tests.cnkernels.campaign_worker --output FILE --first SEED --count N TEST...
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cnkernels.check import rule
from tests.cnkernels import failures

KEPT = 200  # of the comparisons with the least margin
_CLOSE = 0.5  # of what is allowed: from here on eager gets all its draws


class Recorder:
    """A pytest plugin: counts outcomes, and keeps the tightest comparison of every test and seed."""

    def __init__(self) -> None:
        self.seed, self.passed, self.skipped = 0, 0, 0
        self.failures: list[dict] = []
        self.tightest: dict[tuple[str, int], dict] = {}

    @pytest.fixture(autouse=True)
    def compared(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.setattr(rule, "enough", _CLOSE)
        monkeypatch.setattr(rule, "observers", [lambda comparison: self._compare(request.node.nodeid, comparison)])
        yield

    def _compare(self, test: str, comparison: rule.Comparison) -> None:
        used = comparison.error / comparison.allowed if comparison.error else 0.0
        if used > self.tightest.get((test, self.seed), {"used": 0.0})["used"]:
            self.tightest[test, self.seed] = {"test": test, "seed": self.seed, "used": used, **comparison._asdict()}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            message = getattr(getattr(report.longrepr, "reprcrash", None), "message", str(report.longrepr))
            self.failures.append({"test": report.nodeid, "seed": self.seed, "message": message[:500]})
        elif report.skipped:
            self.skipped += 1
        elif report.when == "call":
            self.passed += 1

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.failures.append({"test": report.nodeid, "seed": self.seed, "message": str(report.longrepr)[-500:]})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.cnkernels.campaign_worker", description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("tests", nargs="+")
    options = parser.parse_args()
    recorder, begin = Recorder(), time.monotonic()
    for recorder.seed in range(options.first, options.first + options.count):
        arguments = ["-q", "-p", "no:cacheprovider", "-p", "no:warnings", "--tb=line", f"--seed={recorder.seed}"]
        status = pytest.main([*arguments, *options.tests], plugins=[recorder])
        if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            raise SystemExit(f"pytest ended with {status!r}")
    found = {
        "passed": recorder.passed,
        "skipped": recorder.skipped,
        "failures": recorder.failures,
        "tightest": sorted(recorder.tightest.values(), key=lambda one: -one["used"])[:KEPT],
        "seconds": time.monotonic() - begin,
        "arithmetic": failures.arithmetic(),
    }
    options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
