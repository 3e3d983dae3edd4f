"""What a fuzzer found worth keeping, read once more by each reader: `python -m tests.reliability fuzz --keep` adds."""

import importlib.util

import pytest

from tests.reliability import fuzz
from tests.reliability.__main__ import main
from tests.reliability.targets import TARGETS, Defect, Target, attempt


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", TARGETS)
def test_kept_inputs(name, tmp_path):
    target = TARGETS[name]
    inputs = [target.mend(data) for data in (*target.seeds(), *(data for _, data in fuzz.corpus(name)))]
    taken = [attempt(target, data, tmp_path) for data in inputs]
    assert True in taken  # something is read, so that refusals are not for a reason of the test's
    assert len(inputs) > len(target.seeds())


@pytest.mark.parametrize(
    "run",
    [
        lambda data, folder: {}["an error that is no refusal"],
        lambda data, folder: bytes(1 << 27),
    ],
    ids=["raises", "takes memory"],
)
def test_broken_promises_are_seen(run, tmp_path):
    with pytest.raises((Defect, KeyError)):
        attempt(Target(run, (ValueError,), list), b"", tmp_path)


def test_unknown_targets_are_an_error(capsys):
    with pytest.raises(SystemExit):
        main(["fuzz", "no_such_reader"])
    assert "no_such_reader" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris (the extra fuzz) is not installed")
def test_fuzzing_runs(tmp_path, capfd):
    assert main(["fuzz", "--seconds", "1", "--findings", str(tmp_path), "hint"]) == 0
    assert '"defects": 0' in capfd.readouterr().out and not list(tmp_path.iterdir())
