"""The harness on things whose answer is known: a sleep, a copy, a run against itself, a provider that is wrong."""

import time

import pytest
import torch

from benchmarks import gate, measure, ops, timing

CPU = torch.device("cpu")


def case(**providers):
    def inputs(device):
        return [torch.randn(64, 64)]

    return ops.Case("geglu", "64x64", torch.float32, "rows", "backward", inputs, providers, 64 * 64 * 12, 0, (0,))


def test_a_known_sleep():
    result = timing.time_one(lambda i: time.sleep(0.02), CPU, rounds=5)
    assert 0.02 <= result.p20 <= result.median <= result.p80
    assert result.p20 < 0.06, "a sleep of 20 ms was timed at more than three times that"


def test_a_run_against_itself_is_even():
    def nap(i):
        time.sleep(0.01)

    results = timing.time_together({"one": nap, "other": nap}, CPU, rounds=9)
    assert results["one"].p20 / results["other"].p20 == pytest.approx(1, abs=0.3)


def test_more_bytes_take_more_time():
    small, large = torch.ones(2**16), torch.ones(2**22)  # 64 times as many
    results = timing.time_together({"small": lambda i: small.clone(), "large": lambda i: large.clone()}, CPU, rounds=9)
    assert results["large"].p20 > 4 * results["small"].p20


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


def test_the_floor_is_the_slower_of_bytes_and_arithmetic():
    bytes_bound = measure.rows(case(eager=torch.square), CPU, {"copy_bytes_per_s": 1e6}, {})[0]
    assert bytes_bound["floor_seconds"] == pytest.approx(64 * 64 * 12 / 1e6)
    assert bytes_bound["fraction_of_floor"] == pytest.approx(bytes_bound["floor_seconds"] / bytes_bound["median"])


@pytest.mark.parametrize("op", ops.OPS)
def test_every_provider_of_every_op_computes_the_same(op):
    for one in ops.cases([op], [1], [torch.float32], small=True):
        uncompiled = {name: f for name, f in one.providers.items() if name != "torch.compile"}
        found = measure.errors(ops.Case(**{**vars(one), "providers": uncompiled}), CPU)
        assert {name: e for name, e in found.items() if not (isinstance(e, float) and e < 1e-5)} == {}
