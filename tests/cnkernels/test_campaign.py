"""The campaign with a stand-in for its tests: it resumes, repeats pieces of changed sources, and counts."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tests.cnkernels import campaign


@pytest.fixture
def started(monkeypatch, tmp_path):
    """Names of the pieces that a process was started for; seed 1 of avx2 fails a test, and mutants are all caught."""
    names = []

    def run(command, env, **_):
        output, first, count, *tests = (command[command.index(flag) + 1] for flag in ("--output", "--first", "--count"))
        tests = command[command.index("--count") + 2 :]
        narrow, mutants = env.get("ATEN_CPU_CAPABILITY") == "avx2", tests == [str(campaign.MUTANTS)]
        names.append(("mutants" if mutants else "tightest" if int(count) > 1 else "tests", narrow, int(first)))
        failures = [{"test": "t::a", "seed": 1, "message": "wide"}] if names[-1] == ("tests", True, 1) else []
        closest = [
            {"test": f"t::{i}", "seed": int(first), "used": i / 20, "name": "output", "measure": "rms", "elements": 9}
            for i in range(15)
        ]
        found = {"passed": 7, "skipped": 0, "failures": failures, "tightest": [] if mutants else closest, "seconds": 1}
        with open(output, "w") as file:
            json.dump(found, file)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(campaign, "subprocess", SimpleNamespace(run=run))
    sets = ["--sets", "default", "avx2"]
    parts = ["--seeds", "2", "--mutants", "1", "--tightest", "50"]
    monkeypatch.setattr(sys, "argv", ["campaign", str(tmp_path), *sets, *parts])
    return names


def test_it_goes_on_where_it_was_and_starts_anew_for_other_sources(started, monkeypatch, tmp_path, capsys):
    for _ in range(2):
        with pytest.raises(SystemExit) as end:
            campaign.main()
        assert end.value.code == 1
    parts = [("tests", 0), ("tests", 1), ("mutants", 0), ("tightest", 0), ("tightest", 25)]
    assert sorted(started) == sorted((part, narrow, first) for part, first in parts for narrow in (False, True))
    (victim, *_) = tmp_path.glob("mutants-avx2-*.json")
    victim.unlink()
    del started[:]
    with pytest.raises(SystemExit):
        campaign.main()
    assert started == [("mutants", True, 0)]
    del started[:]
    monkeypatch.setattr(campaign, "SOURCES", ("csrc",))
    with pytest.raises(SystemExit):
        campaign.main()
    assert len(started) == 10
    assert "\n6 of 6: mutants, avx2, seed 0: 7 passed, 0 failed" in capsys.readouterr().out


def test_the_table_counts_failures_margins_and_mutants(started, tmp_path):
    with pytest.raises(SystemExit):
        campaign.main()
    lines = (tmp_path / "summary.md").read_text().splitlines()
    assert lines[2] == "| default | 2 | 7 | 0 | 0.70 | 7 of 7, 1 seeds | 50 | 0.70 |"
    assert lines[3] == "| avx2 | 2 | 7 to 8 | 1 | 0.70 | 7 of 7, 1 seeds | 50 | 0.70 |"
    assert "FAILED avx2, seed 1: t::a: wide" in lines
    assert len([line for line in lines if line.startswith("- ")]) == campaign.DOZEN


def test_a_process_that_dies_is_told(started, monkeypatch):
    dead = subprocess.CompletedProcess([], 1, "", "no module named x")
    monkeypatch.setattr(campaign, "subprocess", SimpleNamespace(run=lambda *a, **k: dead))
    with pytest.raises(RuntimeError, match="default, seed 0: the tests did not run:\nno module named x"):
        campaign.main()


def test_the_worker_sees_comparisons_and_failures(tmp_path):
    """In a process of its own, on one test that passes and one that cannot."""
    output, wrong = tmp_path / "found.json", tmp_path / "test_wrong.py"
    wrong.write_text("def test_it():\n    assert 1 == 2\n")
    right = "tests/cnkernels/test_rule.py::test_no_draw_is_taken_that_is_not_needed"
    command = [sys.executable, "-m", "tests.cnkernels.campaign_worker", "--output", output, "--first", "5"]
    subprocess.run([*command, "--count", "2", right, wrong], cwd=campaign.ROOT, check=True, capture_output=True)
    found = json.loads(output.read_text())
    assert found["passed"] == 2
    assert {one["seed"] for one in found["tightest"]} == {5, 6} and all(one["used"] < 1 for one in found["tightest"])
    assert [one["seed"] for one in found["failures"]] == [5, 6]
    assert all(one["test"].endswith("::test_it") and "assert 1 == 2" in one["message"] for one in found["failures"])
