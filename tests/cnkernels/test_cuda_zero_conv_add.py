"""The grouped form of the CUDA zero convolution, and the cuts of its backward that the shared tests do not choose."""

import pytest
import torch

from cnkernels import extension
from cnkernels.zero_conv_add import cuda_kernels
from cnkernels.zero_conv_add.cuda_kernels import Layer
from tests.cnkernels import harness
from tests.cnkernels.harness import DEVICE, randn
from tests.cnkernels.test_zero_conv_add import eager, fused, inputs, reductions

pytestmark = pytest.mark.skipif(
    extension.module_for(DEVICE) is None, reason=extension.why_host_absent() or "no CUDA extension"
)

SIZES = [(32, 32, 8, 8), (32, 32, 8, 8), (64, 96, 4, 4), (40, 72, 3, 5)]  # Cin, Cout, H, W: two alike, odd ones


def make_layers(dtype, layout) -> list[Layer]:
    """Layers with every kind of scale; the first writes into a channel slice of a wider tensor."""
    arrange = harness.channels_last if layout == "channels_last" else harness.as_is
    layers = []
    for index, (cin, cout, height, width) in enumerate(SIZES):
        x, residual = (arrange(randn(2, c, height, width).to(dtype)) for c in (cin, cout))
        weight, bias = randn(cout, cin, 1, 1).to(dtype), randn(cout).to(dtype)
        scale = (0.5, randn().float(), randn(2).float(), 1.0)[index]
        layers.append(Layer(x, weight, bias if index else None, residual if index != 2 else None, scale))
    return layers


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", harness.DTYPES, ids=str)
def test_a_group_is_its_layers_to_the_bit(dtype, layout):
    layers = make_layers(dtype, layout)
    outs = cuda_kernels.zero_conv_add_group_fwd(layers)
    douts = [torch.randn_like(out) for out in outs]
    needs = [(True, True, layer.bias is not None, isinstance(layer.scale, torch.Tensor)) for layer in layers]
    gradients = cuda_kernels.zero_conv_add_group_bwd(douts, layers, needs)
    for layer, out, dout, need, together in zip(layers, outs, douts, needs, gradients, strict=True):
        arguments = (layer.x, layer.weight, layer.bias)
        assert torch.equal(out, cuda_kernels.zero_conv_add_fwd(*arguments, layer.residual, layer.scale))
        alone = cuda_kernels.zero_conv_add_bwd(dout, *arguments, layer.scale, need)
        for ours, theirs in zip(together, alone, strict=True):
            assert (ours is None and theirs is None) or torch.equal(ours, theirs)


def test_a_group_writes_each_result_to_its_place():
    layers = make_layers(torch.float16, "channels_last")
    expected = cuda_kernels.zero_conv_add_group_fwd(layers)
    placed, buffers = [], []
    for layer, out in zip(layers, expected, strict=True):
        n, channels, height, width = out.shape
        buffer = torch.full((n, channels + 24, height, width), 42.0, dtype=out.dtype, device=DEVICE)
        buffers.append(harness.channels_last(buffer))
        placed.append(Layer(**{**vars(layer), "out": buffers[-1][:, 8 : 8 + channels]}))
    cuda_kernels.zero_conv_add_group_fwd(placed)
    for buffer, out in zip(buffers, expected, strict=True):
        channels = out.shape[1]
        assert torch.equal(buffer[:, 8 : 8 + channels], out)
        assert (buffer[:, :8] == 42).all() and (buffer[:, 8 + channels :] == 42).all()


def test_more_layers_than_one_launch_holds():
    library = extension.module_for(DEVICE)
    layers = make_layers(torch.float16, "contiguous") * 5
    assert len(layers) > library.ZERO_CONV_GROUP
    outs = cuda_kernels.zero_conv_add_group_fwd(layers)
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
