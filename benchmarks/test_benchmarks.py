"""The same cases through pytest-benchmark: pytest benchmarks --benchmark-only [-k "attention and forward"]."""

import pytest
import torch

from benchmarks import measure, ops

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is an extra (bench)")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCHES, DTYPES = ([2], [torch.float16]) if DEVICE.type == "cuda" else ([1], [torch.float32])


def parameters():
    for case in ops.cases(list(ops.OPS), BATCHES, DTYPES, small=DEVICE.type != "cuda"):
        for provider in case.providers:
            yield pytest.param(case, provider, id=f"{case.label} {provider}".replace(" ", "-"))


@pytest.fixture(autouse=True)
def reusable_graphs():
    with measure.reusable_graphs():
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("case, provider", list(parameters()))
def test_op(case, provider, benchmark):
    only = ops.Case(
        **{**vars(case), "providers": {"eager": case.providers["eager"], provider: case.providers[provider]}}
    )
    found = measure.errors(only, DEVICE)
    reason = measure.refusal(provider, found, case.dtype)
    if reason:
        pytest.skip(reason)
    run = measure.run_of(case, provider, case.providers[provider], [measure.leaves_of(case, case.inputs(DEVICE))])

    def call():
        run(0)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(call, warmup_rounds=3, rounds=20)
    benchmark.extra_info.update(floor_bytes=case.floor_bytes, floor_flops=case.floor_flops, error=found[provider])
