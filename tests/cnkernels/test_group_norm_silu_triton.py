"""The Triton group norm: each way to split a tensor among programs, and the edges."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import cnkernels
from cnkernels import dispatch
from cnkernels.launch import Launch
from tests.cnkernels import harness
from tests.cnkernels.guards import guarded_empty
from tests.cnkernels.harness import DEVICE, randn

triton = pytest.importorskip("triton")
interpreter = pytest.importorskip("triton.runtime.interpreter")
REASON = dispatch.why_not("group_norm_silu", "triton", DEVICE, torch.float32)
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

LAYOUTS = {"contiguous": harness.as_is, "channels_last": harness.channels_last}
CUTS = [  # (N, C, H, W), groups, dtype, layout, kernels of the forward and the backward pass, without the parameters'
    pytest.param((1, 20, 16, 16), 2, torch.float16, "contiguous", "rows_fused_fwd rows_fused_bwd", id="rows-held"),
    pytest.param((1, 6, 11, 9), 2, torch.float16, "contiguous", "rows_fused_fwd rows_fused_bwd", id="short-rows-held"),
    pytest.param(
        (1, 12, 49, 64), 1, torch.float16, "contiguous", "rows_stats rows_apply rows_sums rows_dx", id="rows-cut"
    ),
    pytest.param(
        (1, 3, 83, 151), 1, torch.float16, "contiguous", "rows_stats rows_apply rows_sums rows_dx", id="short-rows-cut"
    ),
    pytest.param((1, 80, 8, 8), 8, torch.float16, "channels_last", "spans_fused_fwd spans_fused_bwd", id="spans-held"),
    pytest.param(
        (1, 120, 7, 9), 12, torch.float16, "channels_last", "spans_fused_fwd spans_fused_bwd", id="last-span-short"
    ),
    pytest.param(
        (1, 120, 13, 19),
        12,
        torch.float16,
        "channels_last",
        "spans_stats spans_apply spans_sums spans_dx",
        id="spans-cut",
    ),
    pytest.param(
        (2, 40, 17, 33),
        4,
        torch.float32,
        "channels_last",
        "spans_stats spans_apply spans_sums spans_dx",
        id="40-channel-spans",
    ),
    pytest.param(
        (1, 1100, 5, 5),
        2,
        torch.float16,
        "channels_last",
        "spans_stats spans_apply spans_sums spans_dx",
        id="a-group-in-two",
    ),
]


def eager(groups, eps=1e-5):
    def function(x, weight, bias, addend):
        h = x if addend is None else x + addend[:, :, None, None]
        return F.silu(F.group_norm(h, groups, weight, bias, eps))

    return function


def fused(groups, eps=1e-5):
    def function(x, weight, bias, addend):
        return cnkernels.group_norm_silu(x, groups, weight, bias, eps, addend=addend)

    return function


def sums(shape):
    """Terms of the gradients of weight, bias and addend."""
    n, _, height, width = shape
    return {1: n * height * width, 2: n * height * width, 3: height * width}


def inputs(shape):
    return [randn(*shape), randn(shape[1]), randn(shape[1]), randn(*shape[:2])]


def kernels(shape, groups, dtype, layout):
    from cnkernels.group_norm_silu.triton_backward import backward_launches
    from cnkernels.group_norm_silu.triton_forward import forward_launches

    batch, channels, height, width = shape
    arguments = (batch, channels, height * width, groups, dtype.itemsize, layout == "channels_last", True, True)
    forward, _ = forward_launches(*arguments)
    sums, dx, *_ = backward_launches(*arguments, 3)
    launches = [*forward, sums, *([] if dx is None else [dx])]
    names = [launch.kernel.fn.__name__ for launch in launches]
    return " ".join(name.removeprefix("_group_norm_silu_").removesuffix("_kernel") for name in names), launches


@pytest.mark.parametrize("shape, groups, dtype, layout, expected", CUTS)
def test_every_cut_equals_pytorch_and_stays_inside(shape, groups, dtype, layout, expected):
    assert kernels(shape, groups, dtype, layout)[0] == expected
    with guarded_empty():
        harness.compare(
            fused(groups),
            eager(groups),
            inputs(shape),
            dtype,
            "triton",
            arrange=LAYOUTS[layout],
            reductions=sums(shape),
        )


@pytest.fixture
def few_programs(monkeypatch):
    """Cuts as on a GPU with a single multiprocessor: several tiles to a chunk, as only large tensors have otherwise."""
    from cnkernels.group_norm_silu import triton_cuts

    monkeypatch.setattr(triton_cuts, "PROGRAMS", 2)


@pytest.mark.parametrize(
    "shape, groups, dtype, layout",
    [
        pytest.param((1, 6, 83, 151), 2, torch.float32, "contiguous", id="short-rows"),
        pytest.param((1, 12, 73, 64), 1, torch.bfloat16, "contiguous", id="whole-rows"),
        pytest.param((1, 120, 17, 23), 12, torch.float16, "channels_last", id="spans"),
        pytest.param((1, 1100, 7, 11), 2, torch.float32, "channels_last", id="a-group-in-two"),
    ],
)
def test_chunks_of_several_tiles(shape, groups, dtype, layout, few_programs):
    launches = kernels(shape, groups, dtype, layout)[1]
    for sizes in (launch.sizes for launch in launches):
        assert sizes.get("run_tiles", 0) > 1 or sizes["chunk_rows"] > sizes["BLOCK_R"]
        assert sizes.get("chunk_rows", 0) % sizes["BLOCK_R"] == 0
    with guarded_empty():
        harness.compare(
            fused(groups),
            eager(groups),
            inputs(shape),
            dtype,
            "triton",
            arrange=LAYOUTS[layout],
            reductions=sums(shape),
        )


@pytest.fixture
def stores(monkeypatch):
    """Checks the stores of every launch. The interpreter runs programs one by one, so that where two write one element
    the last one wins each time; on a GPU either may, and a wrong value that is overwritten here is a race there.
    """
    if not triton.knobs.runtime.interpret:
        pytest.skip("stores are seen in Triton's interpreter alone")
    builder = interpreter.InterpreterBuilder
    store, run = builder.create_masked_store, Launch.__call__
    addresses, launched = [], []

    def recorded(self, pointers, value, mask, *rest):
        addresses.append(pointers.data[mask.data])
        return store(self, pointers, value, mask, *rest)

    def checked(launch, *operands):
        addresses.clear()
        run(launch, *operands)
        written = np.concatenate(addresses)
        assert np.unique(written).size == written.size, f"{launch.kernel.fn.__name__} writes an element twice"
        launched.append(launch)

    monkeypatch.setattr(builder, "create_masked_store", recorded)
    monkeypatch.setattr(Launch, "__call__", checked)
    return launched


@pytest.mark.parametrize("shape, groups, dtype, layout, expected", CUTS)
def test_no_element_is_written_twice(shape, groups, dtype, layout, expected, stores):
    tensors = [LAYOUTS[layout](t.to(dtype)) for t in inputs(shape)]
    with cnkernels.backend("triton"):
        harness.run(fused(groups), tensors, randn(*shape).to(dtype))
    assert len(stores) == len(expected.split()) + 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_image_fills_a_gpu(layout):
    """At batch 1 every launch over a 64 x 64 or larger tensor has at least as many programs as an H100 has SMs."""
    for channels, size in ((320, 64), (640, 64), (960, 64), (512, 64), (512, 128), (256, 256), (128, 512)):
        for launch in kernels((1, channels, size, size), 32, torch.float16, layout)[1]:
            assert launch.grid[0] >= 132, (launch.kernel.fn.__name__, channels, size, launch.grid)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_outlier_first_costs_no_digits(layout):
    """Squares are taken about the mean of a chunk's first tile: about the first value, this one would hide the rest."""
    x = randn(1, 12, 49, 64)
    x[:, :, 0, 0] = 1e4
    harness.compare(fused(1), eager(1), [x, None, None, None], torch.float32, "triton", arrange=LAYOUTS[layout])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 12, 49, 64), (1, 20, 16, 16)], ids=["cut", "held"])
def test_mean_far_from_zero_in_every_cut(shape, layout):
    x = randn(*shape, scale=0.1, offset=1000.0)
    harness.compare(fused(1), eager(1), [x, None, None, None], torch.float32, "triton", arrange=LAYOUTS[layout])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_non_finite_stays_in_its_group_when_cut(layout):
    x = randn(1, 6, 83, 77)
    x[0, 3, 70, 5] = float("inf")
    y, *_ = harness.compare(fused(3), eager(3), [x, None, None, None], torch.float32, "triton", arrange=LAYOUTS[layout])
    assert torch.isnan(y[:, 2:4]).all() and torch.isfinite(y[:, :2]).all() and torch.isfinite(y[:, 4:]).all()


@pytest.mark.parametrize("shape, groups, dtype, layout, expected", [CUTS[0], CUTS[3], CUTS[4], CUTS[6]])
def test_views_at_odd_offsets(shape, groups, dtype, layout, expected):
    tensors = inputs(shape)
    for offset in (1, 3, 8):
        harness.compare(
            fused(groups),
            eager(groups),
            tensors,
            dtype,
            "triton",
            arrange=lambda t, offset=offset: harness.misaligned(LAYOUTS[layout](t), offset),
            arrange_upstream=lambda t, offset=offset: harness.misaligned(t, offset),
            reductions=sums(shape),
        )


@pytest.mark.parametrize("shape, groups, dtype, layout, expected", CUTS)
def test_every_cut_is_repeatable_bit_for_bit(shape, groups, dtype, layout, expected):
    tensors = [LAYOUTS[layout](t.to(dtype)) for t in inputs(shape)]
    upstream = randn(*shape).to(dtype)
    with cnkernels.backend("triton"):
        harness.assert_repeatable(lambda: harness.run(fused(groups), tensors, upstream))
