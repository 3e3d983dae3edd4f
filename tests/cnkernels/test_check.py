"""`python -m cnkernels.check` finds and survives each kind of fault, after which `auto` avoids the kernel."""

import json
import logging
import re

import pytest
import torch

import cnkernels
from cnkernels import cache, dispatch, findings, machine
from cnkernels.check import __main__ as check
from cnkernels.check import run
from cnkernels.check.cases import LEVELS, cases
from cnkernels.check.rule import Eager
from cnkernels.check.runner import Runner
from cnkernels.check.trial import trials

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the faults are made in the backends of a CPU")


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CNKERNELS_CACHE", str(tmp_path / "cache"))
    findings.forget()
    yield tmp_path / "cache"
    monkeypatch.undo()
    findings.forget()


def test_every_fault_is_found_and_named_and_auto_goes_on_without_the_kernel(own_cache, tmp_path, capsys, caplog):
    arguments = ["--op", "geglu", "--backend", "aten", "--seconds", "20", "--report", str(tmp_path / "report.json")]
    status = check.main([*arguments, "--preload", "tests.cnkernels.broken_backends"])
    told = capsys.readouterr().out
    assert status == 1
    faults = {t["trial"]: t["fault"] for t in json.loads((tmp_path / "report.json").read_text())["trials"]}
    expected = {
        "geglu, primes, contiguous, float16, aten": "output: largest error",
        "geglu, 1280 columns, contiguous, float16, aten": "written outside",
        "geglu, one row, contiguous, float16, aten": "NaN in",
        "geglu, primes, contiguous, float32, aten": "other bits",
        "geglu, 1280 columns, contiguous, bfloat16, aten": "no result after 20 s",
        "geglu, one row, contiguous, bfloat16, aten": "SIGABRT",
    }
    for trial, fault in expected.items():
        assert fault in faults[trial], (trial, faults[trial])
        assert f"WRONG {trial}" in told
    assert faults["geglu, 1280 columns, contiguous, float32, aten"] is None
    assert faults["geglu, one row, contiguous, float32, aten"] is None
    assert re.search(r"python -m cnkernels.check --op geglu --backend aten --report", told)

    findings.forget()
    with cnkernels.backend("auto"), caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert dispatch.select("geglu", CPU, torch.float16, size=10) == "reference"
        assert dispatch.select("attention", CPU, torch.float16, size=10) == "aten"
    warnings = [r.getMessage() for r in caplog.records if "the aten backend of geglu in float16" in r.getMessage()]
    assert len(warnings) == 1
    assert "primes" in warnings[0] and str(own_cache) in warnings[0]
    with cnkernels.backend("aten"):  # forcing goes on working
        assert dispatch.select("geglu", CPU, torch.float16, size=10) == "aten"

    assert check.main(arguments) == 0  # nothing is broken any more, and the record says so
    findings.forget()
    with cnkernels.backend("auto"):
        assert dispatch.select("geglu", CPU, torch.float16, size=10) == "aten"


def test_levels_grow_and_labels_are_unique():
    sizes = []
    for level in LEVELS:
        labels = [case.label for case in cases(level)]
        assert len(set(labels)) == len(labels)
        sizes.append(len(labels))
    assert sizes == sorted(set(sizes))


@pytest.mark.parametrize(
    "case", [case for case in cases("emulated") if case.layout == "contiguous"], ids=lambda case: case.label
)
def test_the_cases_say_what_the_ops_compute(case):
    inputs = case.inputs(torch.float64, CPU)
    upstream = torch.randn_like(case.eager(*inputs))
    peer = Eager(case.eager, inputs, upstream)
    with cnkernels.backend("reference"):
        actual = Eager(case.function, inputs, upstream).results
    for ours, theirs in zip(actual, peer.results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_a_worker_that_cannot_start_is_an_answer_not_a_crash():
    with Runner("tests.cnkernels.no_such_module", seconds=30) as runner:
        [(job, answer)] = runner.run([("job", {})])
    assert job == "job"
    assert answer["lost"] == "exit status 1"


def test_a_cache_of_another_driver_is_not_read(own_cache):
    identity = machine.identity(CPU)
    fault = {"op": "geglu", "backend": "aten", "dtype": "float16", "case": "x", "fault": "y"}
    cache.update({**identity, "driver": "1.0"}, lambda record: record["faults"].append(fault))
    findings.forget()
    assert not findings.wrong("geglu", "aten", CPU, torch.float16)
    assert cache.read({**identity, "driver": "1.0"})["faults"] == [fault]


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "[]", '{"identity": {}}', '{"identity": IDENTITY, "faults": [1], "choices": {}}',
     '{"identity": IDENTITY, "faults": [], "choices": {"geglu": [{"dtype": "float16"}]}}',
     '{"identity": IDENTITY, "faults": [], "choices": {"geglu": [{"dtype": "float16", "direction": "forward",'
     ' "size": 9, "backend": "aten", "head_dim": null, "configurations": {"triton": {"geglu": [8]}}}]}}',
     "\udcff"],
)  # fmt: skip
def test_a_damaged_cache_is_one_warning_and_the_rule(own_cache, caplog, text):
    identity = machine.identity(CPU)
    file = cache.path(identity)
    file.parent.mkdir()
    file.write_bytes(text.replace("IDENTITY", json.dumps(identity)).encode(errors="surrogateescape"))
    with caplog.at_level(logging.WARNING), cnkernels.backend("auto"):
        for _ in range(3):
            assert dispatch.select("geglu", CPU, torch.float16, size=10) == "aten"
    assert [str(file) in record.getMessage() for record in caplog.records] == [True]


def test_a_home_that_cannot_be_written_works_without_a_cache(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("CNKERNELS_CACHE", str(tmp_path / "file" / "cache"))
    with caplog.at_level(logging.WARNING):
        assert cache.update(machine.identity(CPU), lambda record: None) is None
    assert "CNKERNELS_CACHE" in caplog.text
    assert cache.read(machine.identity(CPU)) == cache.empty(machine.identity(CPU))


@pytest.fixture
def results(own_cache, monkeypatch):
    """What `run` gives for each trial, in place of what it would find: a fault, None, or an exception to be raised."""
    given = {}

    def run(chosen, level, device, **_):
        for trial in chosen:
            outcome = given.get(trial.label)
            if isinstance(outcome, BaseException):
                raise outcome
            if outcome != "no memory":
                yield trial, outcome

    monkeypatch.setattr(check, "run", run)
    return given


def kernels(dtype="float16"):
    checked = cache.read(machine.identity(CPU))["checked"] or {"kernels": []}
    return [kernel for kernel in checked["kernels"] if kernel[2] == dtype]


def test_an_interrupted_check_keeps_what_is_certain(results, capsys):
    labels = [case.label for case in cases("default") if case.op == "geglu"]
    results[f"{labels[0]}, bfloat16, aten"] = "output: wrong"
    results[f"{labels[-1]}, bfloat16, aten"] = KeyboardInterrupt()  # float16 of that case was tried, float32 was not
    assert check.main(["--op", "geglu", "--backend", "aten"]) == 1
    told = capsys.readouterr().out
    assert "interrupted" in told and "2 left out" in told
    assert kernels("float16") == [["geglu", "aten", "float16"]]
    assert kernels("float32") == []  # not all of its trials were made
    assert [fault["dtype"] for fault in cache.read(machine.identity(CPU))["faults"]] == ["bfloat16"]
    results.clear()
    results[f"{labels[0]}, float16, aten"] = KeyboardInterrupt()
    assert check.main(["--op", "geglu", "--backend", "aten"]) == 130
    assert len(cache.read(machine.identity(CPU))["faults"]) == 1


def test_too_little_memory_is_no_fault(results, capsys):
    label = next(case.label for case in cases("default") if case.op == "geglu")
    results[f"{label}, float16, aten"] = "no memory"
    assert check.main(["--op", "geglu", "--backend", "aten"]) == 0
    assert "0 wrong, 1 left out" in capsys.readouterr().out
    assert kernels("float16") == [] and kernels("float32") == [["geglu", "aten", "float32"]]


def test_a_worker_says_that_memory_was_short(own_cache, caplog):
    chosen = [t for t in trials("emulated", CPU, ["geglu"], ["aten"]) if t.case.layout == "contiguous"]
    with caplog.at_level(logging.WARNING):
        judged = list(run(chosen, "emulated", CPU, preload=["tests.cnkernels.no_memory"]))
    assert judged == [] and all(f"{trial.label} is left out" in caplog.text for trial in chosen)


def test_an_old_gpu_is_served_by_pytorch_alone_and_told_so(results, monkeypatch, capsys):
    chosen = []
    monkeypatch.setattr(check, "run", lambda trials, *_, **__: chosen.extend(trials) or [(t, None) for t in trials])
    monkeypatch.setattr(check, "keep", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert check.main([]) == 0
    assert {trial.backend for trial in chosen} == {"aten", "reference"}
    assert "older than compute capability 8.0: only PyTorch's own kernels (aten)" in capsys.readouterr().out


def test_a_report_that_cannot_be_written_is_refused_at_once(results, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        check.main(["--report", str(tmp_path / "no" / "report.json")])
    assert f"the folder {tmp_path / 'no'} does not exist" in capsys.readouterr().err
