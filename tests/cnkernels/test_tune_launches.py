"""`cnkernels.tune` measures launch configurations, and plans follow those that are right and fast."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

import cnkernels
from cnkernels import cache, configurations, findings, machine, timing
from cnkernels.check import emulation
from cnkernels.geglu.triton_common import Tile
from cnkernels.launch import Launch
from cnkernels.tune import __main__ as command
from cnkernels.tune import of_model, tune
from cnkernels.tune.launches import fault
from tests.cnkernels.test_check import own_cache  # noqa: F401  (a fixture)

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tampers with kernels in Triton's interpreter")


def geglu_call(rows: int = 3):
    with cnkernels.record() as calls:
        cnkernels.geglu(torch.randn(rows, 600))
    return calls[0]


@pytest.fixture
def launched(monkeypatch):
    """The tiles that geglu is launched with; `behaviour` maps one to the seconds that it takes, or to what it breaks.

    The clock goes by these seconds alone.
    """
    tiles, behaviour, right, now = [], {}, Launch.__call__, [0.0]

    def tampered(self, *operands):
        tile = Tile(self.sizes["BLOCK_ROWS"], self.sizes["BLOCK_COLUMNS"], self.num_warps)
        tiles.append(tile)
        what = behaviour.get(tile)
        now[0] += what if isinstance(what, float) else 1.0
        result = right(self, *operands)
        if callable(what):
            what(operands[-1])
        return result

    monkeypatch.setattr(Launch, "__call__", tampered)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return tiles, behaviour


def test_the_fastest_right_configuration_is_chosen_and_followed(own_cache, launched, monkeypatch, caplog):  # noqa: F811
    tiles, behaviour = launched
    own, fast = Tile(8, 256, 4), Tile(16, 256, 8)
    broken = Tile(8, 512, 8)
    behaviour |= {own: 2.0, Tile(4, 256, 4): 3.0, Tile(2, 1024, 4): 1.9, broken: lambda out: out.mul_(1.01)}
    monkeypatch.setattr("cnkernels.tune.timings.candidates", lambda *_: ["triton"])
    call = geglu_call()
    [entry] = tune([call], CPU, rounds=3, emulated=True)
    assert entry["configurations"] == {"triton": {"geglu": dataclasses.asdict(fast)}}
    assert entry["seconds"] == {"triton": 1.0} and entry["by_rule"] == {"triton": 2.0}
    assert "is not used: output: largest error" in caplog.text and "'rows': 8, 'columns': 512" in caplog.text

    kept = json.loads(cache.path(machine.identity(CPU)).read_text())["choices"]["geglu"]
    assert kept[0]["configurations"] == entry["configurations"]
    findings.forget()
    asked = []
    measured = findings.measured
    monkeypatch.setattr(findings, "measured", lambda *a: asked.append(a) or measured(*a))
    with cnkernels.backend("auto"):
        tiles.clear()
        for _ in range(3):
            cnkernels.geglu(torch.randn(3, 600))
        assert tiles == [fast] * 3 and len(asked) == 2  # once for the backend, once for the launch: when it was planned
        tiles.clear()
        cnkernels.geglu(torch.randn(4, 600))  # a size that was not measured
    assert tiles == [own]


@pytest.mark.parametrize("wrong", ["writes outside", "leaves NaN", "gives other bits", "raises"])
def test_a_configuration_broken_on_purpose_is_not_chosen(own_cache, launched, monkeypatch, wrong):  # noqa: F811
    _, behaviour = launched
    calls = []

    def break_(out):
        calls.append(out)
        if wrong == "writes outside":
            out.as_strided((1,), (1,), out.storage_offset() + out.numel()).fill_(3.0)
        elif wrong == "leaves NaN":
            out[1, 5] = torch.nan
        elif wrong == "gives other bits" and len(calls) % 2:
            out[0, 0] = torch.nextafter(out[0, 0], torch.tensor(9.0))
        elif wrong == "raises":
            raise RuntimeError("out of resource: shared memory")

    behaviour |= dict.fromkeys((Tile(4, 256, 4), Tile(8, 512, 8), Tile(16, 256, 8), Tile(2, 1024, 4)), break_)
    behaviour[Tile(8, 256, 4)] = 2.0
    monkeypatch.setattr("cnkernels.tune.timings.candidates", lambda *_: ["triton"])
    [entry] = tune([geglu_call()], CPU, rounds=2, emulated=True)
    assert calls and "configurations" not in entry


def test_candidates_that_are_slower_or_hardly_faster_change_nothing(own_cache, launched, monkeypatch):  # noqa: F811
    _, behaviour = launched
    behaviour |= dict.fromkeys((Tile(4, 256, 4), Tile(8, 512, 8), Tile(16, 256, 8), Tile(2, 1024, 4)), 0.98)
    behaviour[Tile(4, 256, 4)] = 1.5
    monkeypatch.setattr("cnkernels.tune.timings.candidates", lambda *_: ["triton"])
    [entry] = tune([geglu_call()], CPU, rounds=2, emulated=True)
    assert "configurations" not in entry and "by_rule" not in entry


@pytest.mark.parametrize("call", of_model("tiny", torch.float16, training=True), ids=str)
def test_every_candidate_of_every_rule_keeps_the_accuracy_rule(call):
    with cnkernels.backend("triton"), configurations.trying({}), configurations.asked() as asked:
        output = call.function(*(tensors := call.tensors(CPU)))
        torch.autograd.grad(output.sum(), [t for t in tensors if isinstance(t, torch.Tensor) and t.requires_grad])
    assert asked
    for name, (_, *others) in asked.items():
        assert others, name
        for fields in others:
            assert fault(call, CPU, "triton", "backward", {name: fields}) is None, (name, fields)


def test_fields_of_another_version_of_a_rule_are_not_followed():
    rule = configurations.rule("a rule", lambda own: [])(lambda: Tile(8, 256, 4))
    with configurations._following({"a rule": {"rows": 4, "columns": 64, "num_warps": 2}}):
        assert rule() == Tile(4, 64, 2)
    with configurations._following({"a rule": {"rows": 4, "columns": 64}}):
        assert rule() == Tile(8, 256, 4)
    assert rule() == Tile(8, 256, 4)


def test_the_command_tries_it_all_without_a_gpu(own_cache, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(emulation, "prepare", lambda: "not for this test")  # it takes a minute
    arguments = ["--emulated", "--dtype", "float16", "--rounds", "1", "--batch", "1"]
    assert command.main(arguments) == 0
    told = capsys.readouterr().out
    assert "5 kinds of call, 0 of them measured before" in told and "triton" in told
    assert "the CUDA kernels are left out: not for this test" in told
    assert command.main(arguments) == 0
    assert "5 kinds of call, 5 of them measured before" in capsys.readouterr().out
