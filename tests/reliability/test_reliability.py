"""Each campaign, short and with a fixed seed."""

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


@pytest.mark.slow
@pytest.mark.parametrize("name, module", subjects().items(), ids=subjects())
def test_campaign(name, module):
    counts = dict(module.campaign(ROUNDS.get(name, 20), seed=0))
    assert sum(counts.values()) > 0
    assert not [kind for kind in FAILURES if counts.get(kind)], counts
