"""The accuracy rule on results of known error: PyTorch's own, a multiple of it, and a luckily exact PyTorch."""

import functools

import pytest
import torch

from cnkernels.check import rule
from tests.cnkernels.harness import DEVICE, DTYPES, randn


def product(*factors):
    """Seven roundings of each element."""
    return functools.reduce(torch.mul, factors)


def peer(dtype):
    factors = [(1 + torch.rand(64, 64, dtype=torch.float64, device=DEVICE)).to(dtype) for _ in range(8)]
    return rule.Eager(product, factors, randn(64, 64).to(dtype))


@pytest.mark.parametrize("times, passes", [(1.0, True), (3.0, False)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index", [0, 1], ids=["output", "gradient"])
def test_eager_passes_and_three_times_its_error_does_not(index, dtype, times, passes, request):
    """With each of five seeds."""
    for seed in range(5):
        torch.manual_seed(request.config.getoption("--seed") + seed)
        eager = peer(dtype)
        error = eager.results[index].double() - eager.exact[index]
        fault = eager.fault(index, "result", (eager.exact[index] + times * error).to(dtype))
        assert (fault is None) == passes, fault


def test_an_eager_that_is_right_by_luck_is_no_yardstick():
    """On this one element eager is exact and a neighbour of its result is two roundings away: as good a kernel."""
    x = torch.tensor([3.0])
    third = rule.Eager(lambda x: x / 3 * 3, [x], None)
    assert third.results[0].item() == 3.0
    near = torch.nextafter(x, torch.tensor([4.0]))
    assert rule.fault("alone", torch.nextafter(near, torch.tensor([4.0])), third.results[0], third.exact[0]) is not None
    assert third.fault(0, "of many", near) is None


def test_no_draw_is_taken_that_is_not_needed(monkeypatch):
    eager = peer(torch.float32)
    monkeypatch.setattr(eager, "_neighbour", lambda t: pytest.fail("drew"))
    assert eager.fault(0, "output", eager.results[0]) is None


def test_draws_leave_the_random_numbers_alone():
    eager = peer(torch.float16)
    before = torch.get_rng_state()
    assert len(list(eager.draws(0))) == rule.DRAWS - 1
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_values_that_are_not_finite_must_be_in_their_places(value):
    theirs = exact = torch.tensor([1.0, value, 2.0])
    assert rule.fault("same", theirs.clone(), theirs, exact.double()) is None
    assert "places where PyTorch has none" in rule.fault("none", torch.tensor([1.0, 1.0, 2.0]), theirs, exact.double())
