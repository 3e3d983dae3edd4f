"""The benchmark harness on cases with a known answer: a sleep, a copy, a run against itself, a wrong provider."""

import itertools
import json
import os
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gate, measure, ops, peers, run
from benchmarks import rows as results
from benchmarks.budget import NOT_REACHED, Budget, OverBudget
from cnkernels import timing

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def case(**providers):
    def inputs(device):
        return [torch.randn(64, 64)]

    return ops.Case("geglu", "64x64", torch.float32, "rows", "backward", inputs, providers, 64 * 64 * 12, 0, (0,))


class Clock:
    """A clock that only `work` moves: what a machine does beside the tests changes no time."""

    now = 0.0

    def work(self, *seconds: float):
        """A run that takes these times in turn."""
        taken = itertools.cycle(seconds)

        def run(i):
            self.now += next(taken)

        return run


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def test_a_known_time(clock):
    result = timing.time_one(clock.work(0.02), CPU, rounds=5)
    assert [result.p20, result.median, result.p80] == pytest.approx([0.02] * 3)


def test_a_slow_turn_in_three_moves_the_upper_percentile_alone(clock):
    result = timing.time_one(clock.work(0.02, 0.02, 0.5), CPU, rounds=9)
    assert [result.p20, result.median, result.p80] == pytest.approx([0.02, 0.02, 0.5])


def test_times_are_each_run_s_own(clock):
    results = timing.time_together(
        {"one": clock.work(0.01), "other": clock.work(0.01), "slow": clock.work(0.64)}, CPU, rounds=9
    )
    assert [results[name].p20 for name in ("one", "other", "slow")] == pytest.approx([0.01, 0.01, 0.64])


def test_a_real_clock_sees_a_sleep():
    assert timing.time_one(lambda i: time.sleep(0.02), CPU, rounds=3).p20 >= 0.02


def test_every_provider_gets_every_turn_and_every_input_set():
    calls = []
    timing.time_together(
        {"a": lambda i: calls.append(("a", i)), "b": lambda i: calls.append(("b", i))}, CPU, 3, rounds=4
    )
    warm_up = [(name, i) for name in "ab" for i in (0, 1, 2)]
    assert [call for call in warm_up if calls.count(call) < 1] == []
    turns = [name for name, _ in calls[-8:]]
    assert turns == ["a", "b", "b", "a", "a", "b", "b", "a"], "providers must alternate, each going first in turn"


def test_a_provider_that_fails_is_a_row_that_says_why():
    def absent(x):
        raise ModuleNotFoundError("No module named 'flash_attn'")

    rows = measure.rows(case(eager=torch.square, absent=absent), CPU, {"copy_bytes_per_s": 1e10}, {})
    assert rows[1]["reason"] == "ModuleNotFoundError: No module named 'flash_attn'"
    assert "median" not in rows[1] and rows[0]["median"] > 0


@pytest.mark.parametrize(
    "broken",
    [
        lambda x: x.square() * 1.001,
        lambda x: torch.where(torch.arange(64) == 63, 0.0, x.square()),
        lambda x: x * x.detach(),
    ],
    ids=["slightly-off", "last-column-unwritten", "wrong-gradient"],
)
def test_a_provider_that_computes_something_else_is_refused(broken):
    rows = measure.rows(case(eager=torch.square, broken=broken), CPU, {"copy_bytes_per_s": 1e10}, {})
    assert rows[1]["reason"].startswith("wrong: relative error")


def test_a_backend_whose_tests_fail_gets_no_row():
    statuses = {
        "triton": {"passed": 40, "failed": 1, "skipped": 0, "failures": ["test_equals_pytorch[d40]"]},
        "cuda": {"passed": 0, "failed": 0, "skipped": 9, "failures": []},
        "reference": {"passed": 50, "failed": 0, "skipped": 2, "failures": []},
    }
    refused = gate.refused(statuses)
    assert "test_equals_pytorch[d40]" in refused["triton"] and "none of its tests ran" in refused["cuda"]
    assert "reference" not in refused
    providers = {"eager": torch.square, "triton": torch.square}
    rows = measure.rows(case(**providers), CPU, {"copy_bytes_per_s": 1e10}, refused)
    assert rows[1]["reason"] == refused["triton"] and "median" not in rows[1]


REPORT = """<testsuites><testsuite>
<testcase classname="tests.cnkernels.test_geglu" name="test_one[cuda-float16]"/>
<testcase classname="tests.cnkernels.test_geglu" name="test_latent[triton-float16]"><failure/></testcase>
<testcase classname="tests.cnkernels.test_geglu" name="test_two[cuda-float32]"><skipped/></testcase>
<testcase classname="tests.cnkernels.test_cuda_geglu" name="test_three"/>
<testcase classname="tests.cnkernels.test_geglu_triton" name="test_four"><error/></testcase>
<testcase classname="tests.cnkernels.test_attention" name="test_five[cuda]"><failure/></testcase>
</testsuite></testsuites>"""


def test_the_gate_reads_a_report_of_all_tests(tmp_path):
    path = tmp_path / "tests.xml"
    path.write_text(REPORT)
    cuda = gate.counts(path, "geglu", "cuda")
    assert cuda == {"passed": 2, "failed": 0, "skipped": 1, "failures": []}
    triton = gate.counts(path, "geglu", "triton")
    assert triton["failures"] == ["test_latent[triton-float16]", "test_four"]
    assert gate.counts(path, "geglu", "aten") == {"passed": 0, "failed": 0, "skipped": 0, "failures": []}


@pytest.mark.parametrize("key", ["commit", "device", "sources", "extension", "torch"])
def test_a_gate_of_something_else_is_refused(key, tmp_path, no_gpu):
    path = tmp_path / "gate.json"
    gate.write(path, {"geglu": {}})
    assert gate.read(path) == {"geglu": {}}
    kept = json.loads(path.read_text())
    kept["of"][key] = "another"
    path.write_text(json.dumps(kept))
    with pytest.raises(ValueError, match=f"the gate of another {key}, another, and here it is"):
        run.main(["--op", "geglu", "--gate", str(path), "--output", str(tmp_path / "out.json")])
    assert not (tmp_path / "out.json").exists()


def test_a_file_that_is_no_gate_is_refused(tmp_path):
    path = tmp_path / "gate.json"
    path.write_text('{"geglu": {}}')
    with pytest.raises(ValueError, match="is not a gate's file"):
        gate.read(path)


def test_a_report_of_older_sources_is_refused(tmp_path):
    path = tmp_path / "tests.xml"
    path.write_text(REPORT)
    gate.expect_current(path)
    os.utime(path, (0, 0))
    with pytest.raises(ValueError, match="was written before .* was: run the tests again"):
        gate.expect_current(path)


def test_a_provider_over_its_budget_is_a_row_that_says_so():
    def stubborn(x):
        """Catches every Exception, as an autotuner does that tries candidate after candidate."""
        while True:
            try:
                time.sleep(0.01)
            except Exception:
                continue

    budget = Budget(each=0.2)
    begin = time.monotonic()
    rows = measure.rows(case(eager=torch.square, slow=stubborn), CPU, {"copy_bytes_per_s": 1e10}, {}, budget)
    assert time.monotonic() - begin < 5
    assert rows[1]["reason"] == "stopped: not ready within its budget of 0.2 s" and "median" not in rows[1]
    assert rows[0]["median"] > 0


def test_an_interruption_that_is_caught_comes_again(monkeypatch):
    monkeypatch.setattr("benchmarks.budget.AGAIN", 0.05)
    caught = 0
    with pytest.raises(OverBudget), Budget(each=0.05).provider():
        while True:
            try:
                time.sleep(0.01)
            except OverBudget:
                caught += 1
                if caught == 2:
                    raise
    time.sleep(0.2)  # and no more of them once the block is left


def test_a_spent_budget_starts_nothing():
    with pytest.raises(OverBudget, match=NOT_REACHED), Budget(0.0).provider():
        pytest.fail("ran")


def test_without_a_limit_any_thread_may_measure():
    done = []

    def measured():
        with Budget().provider():
            done.append(True)

    thread = threading.Thread(target=measured)
    thread.start()
    thread.join()
    assert done


def test_a_run_that_is_out_of_budget_has_every_row_all_the_same(tmp_path, no_gpu):
    path = tmp_path / "gate.json"
    gate.write(path, {"geglu": {}, "attention": {}})
    few = ["--op", "geglu", "--op", "attention", "--gate", str(path), "--output", str(tmp_path / "out.json")]
    run.main([*few, "--budget", "0.001"])
    rows = results.load(tmp_path / "out.json")["rows"]
    assert {row["reason"] for row in rows} == {NOT_REACHED}
    assert len(rows) == sum(len(c.providers) for c in ops.cases(["geglu", "attention"], [1], [torch.float32], True))


def test_what_is_compiled_comes_last_and_the_first_shapes_first(no_gpu):
    options = run.arguments(["--quick"])
    _, steps = run.steps(options, CPU, {}, dict.fromkeys(ops.OPS, {}), Budget())
    order = [step.turn for step in steps]
    assert order == sorted(order) and [step.slow for step in steps] == sorted(step.slow for step in steps)
    assert steps[0].slow < steps[-1].slow
    fast = [step.label.split()[0] for step in steps if step.place == 0 and not step.slow]
    assert set(fast) == set(ops.OPS), "every op has its first shape before any has its second"


def test_a_backend_that_the_gate_knows_nothing_of_gets_no_row(tmp_path, no_gpu):
    path = tmp_path / "gate.json"
    gate.write(path, {})
    run.main(
        [
            "--op",
            "geglu",
            "--provider",
            *ops.backends("geglu"),
            "--gate",
            str(path),
            "--output",
            str(tmp_path / "out.json"),
        ]
    )
    rows = results.load(tmp_path / "out.json")["rows"]
    reasons = {row["provider"]: row.get("reason") for row in rows}
    assert reasons.pop("eager") is None
    assert set(reasons.values()) == {"refused: none of its tests ran on this machine"}


def test_times_of_two_measurements_are_not_mixed():
    def row(provider, **found):
        return {"kind": "op", "provider": provider, **found}

    first = [row("triton", median=1.0), row("eager", median=2.0), row("torch.compile", reason=NOT_REACHED)]
    table = {results.key(r): r for r in first}
    run.merge(table, [row("triton", median=9.0), row("eager", reason="x"), row("torch.compile", reason="stopped")])
    assert list(table.values()) == [*first[:2], row("torch.compile", reason="stopped")]
    again = [row("triton", median=1.1), row("eager", median=2.2), row("torch.compile", median=3.3)]
    run.merge(table, again)
    assert list(table.values()) == again


def test_the_floor_is_the_slower_of_bytes_and_arithmetic():
    bytes_bound = measure.rows(case(eager=torch.square), CPU, {"copy_bytes_per_s": 1e6}, {})[0]
    assert bytes_bound["floor_seconds"] == pytest.approx(64 * 64 * 12 / 1e6)
    assert bytes_bound["fraction_of_floor"] == pytest.approx(bytes_bound["floor_seconds"] / bytes_bound["median"])


@pytest.mark.parametrize("op", ops.OPS)
def test_every_provider_of_every_op_computes_the_same(op):
    """A library that is absent, or that does not serve the case, says so; a backend of ours has no such excuse."""
    dtype = torch.float16 if DEVICE.type == "cuda" else torch.float32
    for one in ops.cases([op], [1], [dtype], small=True):
        uncompiled = {name: f for name, f in one.providers.items() if name not in peers.SLOW}
        found = measure.errors(replace(one, providers=uncompiled), DEVICE)
        reasons = {name: measure.refusal(name, found, dtype) for name in found}
        assert {name: r for name, r in reasons.items() if r and r.startswith("wrong")} == {}
        assert {name: r for name, r in reasons.items() if r and name in ("eager", *ops.backends(op))} == {}
        assert DEVICE.type == "cuda" or set(reasons.values()) == {None}
