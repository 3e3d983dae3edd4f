"""`cnkernels.tune` measures what serves a call, and `auto` follows it."""

import json
import multiprocessing
import pickle
from types import SimpleNamespace

import pytest
import torch

import cnkernels
from cnkernels import cache, dispatch, findings, machine, timing, tuning
from cnkernels import tune as tune_package
from cnkernels.geglu import reference
from cnkernels.tune import __main__ as command
from cnkernels.tune import missing, of_model, record, tune
from cnkernels.tune.first_call import at_first_call, never
from tests.cnkernels.test_check import own_cache  # noqa: F401  (a fixture)

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="slows down the backends of a CPU")


def recorded(training: bool = True):
    x = torch.randn(2, 8, 3, 3, requires_grad=training)
    weight = torch.randn(8, 8, 1, 1)
    with record() as calls:
        y = cnkernels.group_norm_silu(x, 4)
        y = cnkernels.zero_conv_add_group([y], [weight])[0]
        q = y.flatten(2).transpose(1, 2).unflatten(2, (2, 4))
        y = cnkernels.attention(q, q, q)
        y = cnkernels.geglu(y)
        cnkernels.group_norm_silu(x * 2, 4)
        if training:
            y.sum().backward()
    return calls


def test_record_notes_each_kind_of_call_once():
    calls = recorded()
    assert [call.op for call in calls] == ["group_norm_silu", "zero_conv_add", "attention", "geglu"]
    assert [any(call.gradients) for call in calls] == [True] * 4
    norm, _, attention, _ = calls
    assert norm.first.shape == (2, 8, 3, 3) and norm.arguments[1] == 4
    assert attention.head_dim == 4 and attention.first.stride == (72, 1, 36, 9)
    assert not any(any(call.gradients) for call in recorded(training=False))


def test_a_slowed_backend_is_not_chosen(own_cache, monkeypatch):  # noqa: F811
    aten = cnkernels.dispatch.implementation("geglu", torch.zeros(2))
    now = [0.0]  # a clock that goes by what the backends are said to take

    def taking(seconds, function):
        def timed(projected):
            now[0] += seconds
            return function(projected)

        return timed

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(aten, "geglu_fwd", taking(2.0, aten.geglu_fwd))
    monkeypatch.setattr(reference, "geglu_fwd", taking(1.0, reference.geglu_fwd))
    monkeypatch.setattr("cnkernels.tune.timings.candidates", lambda *_: ["aten", "reference"])
    call = next(call for call in recorded(training=False) if call.op == "geglu")
    [entry] = tune([call], CPU, rounds=3)
    assert entry["backend"] == "reference" and entry["seconds"] == {"aten": 2.0, "reference": 1.0}
    with cnkernels.backend("auto"):
        assert dispatch.select("geglu", CPU, torch.float32, size=call.size) == "reference"
        assert dispatch.implementation("geglu", torch.zeros(call.first.shape)) is reference
        assert dispatch.select("geglu", CPU, torch.float32, size=call.size, direction="backward") == "aten"
        assert dispatch.select("geglu", CPU, torch.float16, size=call.size) == "aten"  # was not measured
    assert missing([call], CPU) == []


def test_training_calls_are_measured_in_both_directions(own_cache):  # noqa: F811
    calls = recorded()
    entries = tune(calls, CPU, rounds=1)
    assert [(e["op"], e["direction"]) for e in entries] == [(c.op, d) for c in calls for d in ("forward", "backward")]
    assert all(set(entry["seconds"]) == {"aten"} for entry in entries)


def test_tuning_again_replaces_what_was_measured(own_cache):  # noqa: F811
    calls = recorded(training=False)
    for _ in range(2):
        tune(calls, CPU, rounds=1)
    kept = cache.read(machine.identity(CPU))["choices"]
    assert {op: len(entries) for op, entries in kept.items()} == {call.op: 1 for call in calls}


def test_what_was_measured_before_an_interruption_is_kept(own_cache):  # noqa: F811
    calls = recorded(training=False)

    def interrupt(done, count, call):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(calls, CPU, rounds=1, progress=interrupt)
    assert missing(calls, CPU) == calls[2:]


def test_self_and_cross_attention_are_measured_apart(own_cache):  # noqa: F811
    q, text = torch.randn(1, 64, 2, 8), torch.randn(1, 7, 2, 8)
    with record() as calls:
        cnkernels.attention(q, q, q)
        cnkernels.attention(q, text, text)
    tune(calls, CPU, rounds=1)
    assert {entry["size"] for entry in cache.read(machine.identity(CPU))["choices"]["attention"]} == {65536, 7168}


def _add(folder, number, rounds):
    import os

    os.environ["CNKERNELS_CACHE"] = folder
    for i in range(rounds):
        entry = {"dtype": "float16", "head_dim": None, "direction": "forward", "size": 1 + i, "backend": str(number)}
        cache.update(
            {"device": "X"}, lambda record, entry=entry: record["choices"].setdefault(f"op{number}", []).append(entry)
        )


def test_two_processes_at_once_leave_one_whole_file(tmp_path, monkeypatch):
    context, rounds = multiprocessing.get_context("spawn"), 40
    processes = [context.Process(target=_add, args=(str(tmp_path), number, rounds)) for number in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    monkeypatch.setenv("CNKERNELS_CACHE", str(tmp_path))
    choices = cache.read({"device": "X"})["choices"]
    assert {op: len(entries) for op, entries in choices.items()} == {"op0": rounds, "op1": rounds}
    assert list(tmp_path.glob("*.partial")) == []


def test_the_user_s_choice_comes_before_a_shipped_one(own_cache, tmp_path, monkeypatch):  # noqa: F811
    gpu = torch.device("cuda", 0)
    shipped = {"dtype": "float16", "head_dim": 40, "direction": "forward", "size": 1000, "backend": "cuda"}
    file = tmp_path / tuning.file_name("GPU X")
    file.write_text(json.dumps({"identity": {}, "choices": {"attention": [shipped]}}))
    own = cache.empty({})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU X")
    monkeypatch.setattr(findings, "record", lambda device: own)
    monkeypatch.setattr(findings.tuning, "table", lambda gpu: tuning.json.loads(file.read_text())["choices"])
    arguments = ("attention", gpu, torch.float16, 900, 40, "forward")
    assert findings.measured(*arguments)["backend"] == "cuda"
    assert findings.measured("attention", gpu, torch.float16, 900, 80, "forward") is None
    assert findings.measured("attention", gpu, torch.float16, 900, 40, "backward") is None
    own["choices"]["attention"] = [{**shipped, "backend": "triton", "size": 50_000}]
    assert findings.measured(*arguments)["backend"] == "triton"


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
def test_the_calls_of_a_model_run(name):
    device = torch.device("meta")
    for training in (False, True):
        for call in of_model(name, torch.float16, training):
            out = call.function(*call.tensors(device))
            assert out.requires_grad == training and out.dtype == torch.float16


def test_the_command_measures_a_script_and_says_what_it_chose(own_cache, tmp_path, capsys):  # noqa: F811
    script = tmp_path / "step.py"
    script.write_text("import torch, cnkernels\ncnkernels.geglu(torch.zeros(2, 8))\n")
    assert command.main(["--record", str(script), "--rounds", "1"]) == 0
    assert "geglu float32 forward, 16 elements: aten" in capsys.readouterr().out
    assert command.main(["--record", str(script), "--rounds", "1"]) == 0
    assert "1 of them measured before" in capsys.readouterr().out
    assert command.main(["--record", str(script), "--ship", str(tmp_path)]) == 0
    shipped = json.loads((tmp_path / tuning.file_name(machine.processor())).read_text())
    assert [entry["backend"] for entry in shipped["choices"]["geglu"]] == ["aten"]


@pytest.mark.parametrize(
    "text, message",
    [("raise RuntimeError('no data')", "RuntimeError: no data"), ("x = 1", "calls none of cnkernels' ops")],
)
def test_a_script_that_raises_or_calls_nothing_is_an_error(own_cache, tmp_path, capsys, text, message):  # noqa: F811
    script = tmp_path / "step.py"
    script.write_text(text)
    assert command.main(["--record", str(script)]) == 2
    assert message in capsys.readouterr().err


def test_what_does_not_fit_the_memory_is_measured_smaller(own_cache, monkeypatch, caplog):  # noqa: F811
    measure = tune_package.measure

    def limited(call, device, **how):
        if call.first.shape[0] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return measure(call, device, **how)

    monkeypatch.setattr(tune_package, "measure", limited)
    calls = of_model("tiny", torch.float32, training=False)
    entries = tune(calls, CPU, rounds=1)
    assert [2 * entry["size"] for entry in entries] == [call.size for call in calls]
    assert caplog.text.count("is measured with one sample: the device has too little free memory") == len(calls)
    monkeypatch.setattr(tune_package, "measure", lambda *_, **__: limited(calls[0], CPU))
    assert tune(calls[:1], CPU) == []
    assert "is not measured: the device has too little free memory" in caplog.text


@pytest.mark.parametrize("option", ["--rounds", "--batch"])
@pytest.mark.parametrize("value", ["0", "-1", "two"])
def test_counts_must_be_positive(option, value, capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main([option, value])
    assert f"argument {option}: expected a positive number, got {value}" in capsys.readouterr().err


def test_the_random_generator_is_left_alone(own_cache):  # noqa: F811
    calls, state = recorded(), torch.get_rng_state()
    tune(calls, CPU, rounds=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_unknown_shapes_are_an_error(capsys):
    assert command.main(["--shapes", "sd15,sd99"]) == 2
    assert "--shapes sd99: expected some of sd15, sd21, sdxl" in capsys.readouterr().err


class _Gated(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.project = torch.nn.Linear(4, 8)

    def forward(self, x, scale=1.0):
        return cnkernels.geglu(self.project(x)) * scale


def test_tune_at_the_first_call_checks_and_measures_once(own_cache):  # noqa: F811
    model, x = _Gated(), torch.randn(3, 4)
    expected = model(x, scale=2.0)
    at_first_call(model)
    with torch.no_grad():
        assert torch.equal(model(x, scale=2.0), expected)
    kept = cache.read(machine.identity(CPU))
    assert sorted(kept["checked"]["kernels"]) == [["geglu", "aten", "float32"], ["geglu", "reference", "float32"]]
    assert [entry["direction"] for entry in kept["choices"]["geglu"]] == ["forward"]
    assert not model._forward_pre_hooks
    at_first_call(model)
    assert len(pickle.loads(pickle.dumps(model))._forward_pre_hooks) == 1
    never(model)
    assert not model._forward_pre_hooks
    at_first_call(model)  # for training: the gradients are missing
    model(x)
    again = cache.read(machine.identity(CPU))
    assert again["checked"] == kept["checked"]
    assert [entry["direction"] for entry in again["choices"]["geglu"]] == ["forward", "backward"]


def test_nothing_is_tuned_inside_a_compiler(own_cache):  # noqa: F811
    model = _Gated()
    at_first_call(model)
    with torch.no_grad():
        torch.compile(model, backend="eager")(torch.randn(3, 4))
    assert not own_cache.exists()
