"""The grouped CUDA zero convolution, and splits of its backward that the shared tests do not reach."""

import pytest
import torch

from cnkernels import extension
from cnkernels.zero_conv_add import cuda_kernels
from tests.cnkernels import harness, host_build
from tests.cnkernels.harness import DEVICE, randn
from tests.cnkernels.test_zero_conv_add import eager, fused, inputs, reductions

pytestmark = pytest.mark.cuda

SIZES = [(32, 32, 8, 8), (32, 32, 8, 8), (64, 96, 4, 4), (40, 72, 3, 5)]  # Cin, Cout, H, W: two alike, odd ones


def make_calls(dtype, layout) -> list[tuple]:
    """Arguments of zero_conv_add_fwd with every kind of scale."""
    arrange = harness.channels_last if layout == "channels_last" else harness.as_is
    calls = []
    for index, (cin, cout, height, width) in enumerate(SIZES):
        x, residual = (arrange(randn(2, c, height, width).to(dtype)) for c in (cin, cout))
        weight, bias = randn(cout, cin, 1, 1).to(dtype), randn(cout).to(dtype)
        scale = (0.5, randn().float(), randn(2).float(), 1.0)[index]
        calls.append((x, weight, bias if index else None, residual if index != 2 else None, scale))
    return calls


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", harness.DTYPES, ids=str)
def test_a_group_is_its_layers_to_the_bit(dtype, layout):
    calls = make_calls(dtype, layout)
    outs = cuda_kernels.zero_conv_add_group_fwd(calls)
    backward_calls = []
    for out, (x, weight, bias, _, scale) in zip(outs, calls, strict=True):
        need = (True, True, bias is not None, isinstance(scale, torch.Tensor))
        backward_calls.append((torch.randn_like(out), x, weight, bias, scale, need))
    gradients = cuda_kernels.zero_conv_add_group_bwd(backward_calls)
    for call, backward_call, out, together in zip(calls, backward_calls, outs, gradients, strict=True):
        assert torch.equal(out, cuda_kernels.zero_conv_add_fwd(*call))
        for ours, theirs in zip(together, cuda_kernels.zero_conv_add_bwd(*backward_call), strict=True):
            assert (ours is None and theirs is None) or torch.equal(ours, theirs)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="launches are listed by the build for the CPU")
def test_a_group_is_one_launch_of_each_memory_format():
    library = extension.module_for(DEVICE)
    calls = make_calls(torch.float16, "contiguous")
    cuda_kernels.zero_conv_add_group_fwd(calls)
    assert [name for name, *_ in library.launches()] == ["zero_conv_add_fwd"]
    cuda_kernels.zero_conv_add_group_fwd(calls + make_calls(torch.float16, "channels_last"))
    assert [name for name, *_ in library.launches()] == ["zero_conv_add_fwd"] * 2


def test_more_layers_than_one_launch_holds():
    library = extension.module_for(DEVICE)
    calls = make_calls(torch.float16, "contiguous") * 5
    assert len(calls) > library.ZERO_CONV_GROUP
    outs = cuda_kernels.zero_conv_add_group_fwd(calls)
    for index, out in enumerate(outs):
        assert torch.equal(out, outs[index % 4])


@pytest.mark.parametrize("blocks", [1, 64])
@pytest.mark.parametrize("scale", ["0-d", "per-sample"])
@pytest.mark.parametrize("dtype", harness.DTYPES, ids=str)
def test_every_cut_of_the_backward_keeps_the_rule(monkeypatch, dtype, scale, blocks):
    """From no split of dweight's sum to as many as there are steps for."""
    monkeypatch.setattr(extension, "multiprocessors", lambda device: blocks)
    shape = (3, 24, 40, 16, 20)
    tensors = inputs(*shape, randn() if scale == "0-d" else randn(3))
    terms = {**reductions(3, *shape[2:]), 4: tensors[3].numel()}
    harness.compare(fused(), eager(), tensors, dtype, "cuda", reductions=terms)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the build for the CPU has as many multiprocessors as it is told")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", harness.DTYPES, ids=str)
def test_a_long_depth_is_cut_into_splits(dtype, layout):
    """Few tiles on many multiprocessors: the sum over 800 channels in three parts, the last one shorter, and ragged."""
    arrange = harness.channels_last if layout == "channels_last" else harness.as_is
    tensors = inputs(2, 792, 48, 3, 5, randn(2))
    with host_build.execute_as(80):
        harness.compare(fused(), eager(), tensors, dtype, "cuda", arrange=arrange, backward=False)
        names = [(name, blocks) for name, blocks, *_ in extension.module_for(DEVICE).launches()]
    assert len(names) == 2  # the products, and the sum over the splits
    assert names[0][1] % 3 == 0


@pytest.mark.skipif(DEVICE.type != "cpu", reason="launches are listed by the build for the CPU")
def test_samples_share_tiles_in_channels_last():
    """Two samples of 64 positions are one tile of 128 rows; each has its own scale and its place in a wider tensor."""
    x, weight = randn(2, 160, 8, 8).half(), randn(160, 160, 1, 1).half()
    wide = harness.channels_last(torch.full((2, 200, 8, 8), torch.nan, dtype=torch.float16, device=DEVICE))
    scale = torch.tensor([0.5, -2.0], device=DEVICE)
    arguments = (harness.channels_last(x), weight, None, None, scale)
    cuda_kernels.zero_conv_add_fwd(*arguments, wide[:, 24:184])
    assert [blocks for _, blocks, *_ in extension.module_for(DEVICE).launches()] == [1]
    expected = torch.nn.functional.conv2d(x.double(), weight.double()) * scale.double()[:, None, None, None]
    torch.testing.assert_close(wide[:, 24:184].double(), expected, rtol=1e-3, atol=1e-2)
    assert wide[:, :24].isnan().all() and wide[:, 184:].isnan().all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_several_tiles_that_end_within_the_tensor(dtype, layout):
    """Rows and columns beyond the edge are read from the last ones that are there, and must reach no result."""
    arrange = harness.channels_last if layout == "channels_last" else harness.as_is
    shape = (1, 168, 176, 9, 16)
    harness.compare(
        fused(), eager(), inputs(*shape, randn()), dtype, "cuda", arrange=arrange,
        reductions={**reductions(1, *shape[2:]), 4: shape[2] * shape[3] * shape[4]},
    )  # fmt: skip
