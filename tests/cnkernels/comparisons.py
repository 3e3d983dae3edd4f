"""A pytest plugin that writes down every comparison by the rule, with all draws for those that are close.

python -m pytest -p tests.cnkernels.comparisons --comparisons FILE ...

A line of FILE is {"test": ..., "name": ..., "measure": ..., "elements": ..., "error": ..., "allowed": ...}, as JSON.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from cnkernels.check import rule

_CLOSE = 0.5  # of what is allowed


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--comparisons", type=Path, required=True, help="file that gets a line for each comparison")


@pytest.fixture(autouse=True)
def written_down(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    lines = []

    def write(comparison: rule.Comparison) -> None:
        lines.append(json.dumps({"test": request.node.nodeid, **comparison._asdict()}) + "\n")

    monkeypatch.setattr(rule, "enough", _CLOSE)
    monkeypatch.setattr(rule, "observers", [write])
    yield
    with request.config.getoption("--comparisons").open("a") as file:
        file.writelines(lines)
