"""Each campaign, short and with a fixed seed."""

import subprocess
import sys

import pytest

from tests.reliability.__main__ import FAILURES, subjects

# Rounds in a test: minutes in a long run, seconds here.
ROUNDS = {
    "checkpoint_files": 1500,
    "checkpoint_names": 150,
    "configurations": 100,
    "lives": 3,
    "manifests": 300,
    "pictures": 1500,
    "shards": 1500,
    "signals": 4,
}


IN_ITS_OWN_PROCESS = "lives"  # counts objects, and a worker of pytest makes some of its own meanwhile


@pytest.mark.slow
def test_lives():
    command = [sys.executable, "-m", "tests.reliability", "--rounds", str(ROUNDS["lives"]), "--seed", "0", "lives"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in subjects() if name != IN_ITS_OWN_PROCESS])
def test_campaign(name):
    counts = dict(subjects()[name].campaign(ROUNDS.get(name, 20), seed=0))
    assert sum(counts.values()) > 0
    assert not [kind for kind in FAILURES if counts.get(kind)], counts
