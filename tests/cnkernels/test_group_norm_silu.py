"""Group norm + SiLU in every backend against PyTorch: results, gradients, layouts, extreme values, bad input."""

import math

import pytest
import torch
import torch._dynamo.testing
from torch.nn import functional as F

import cnkernels
from cnkernels.group_norm_silu import registration
from cnkernels.nn import GroupNormSiLU
from tests.cnkernels import harness
from tests.cnkernels.harness import DEVICE, DTYPES, randn

BACKENDS = harness.backends("group_norm_silu")
LAYOUTS = {
    "contiguous": harness.as_is,
    "channels_last": harness.channels_last,
    "misaligned": harness.misaligned,
    "strided": harness.strided,
}
SHAPES = [  # (N, C, H, W), groups
    pytest.param((2, 320, 8, 8), 32, id="10-channel-groups-of-SD1.5"),
    pytest.param((1, 96, 24, 21), 4, id="a-group-larger-than-a-tile"),
    pytest.param((2, 7, 5, 13), 7, id="one-channel-per-group"),
    pytest.param((3, 6, 1, 1), 2, id="one-pixel"),
    pytest.param((1, 22, 63, 65), 2, id="batch-1-odd-image"),
]


def eager(groups, eps=1e-5, activation="silu"):
    def function(x, weight=None, bias=None, addend=None):
        h = x if addend is None else x + addend.reshape(*addend.shape, *[1] * (x.dim() - 2))
        z = F.group_norm(h, groups, weight, None, eps)
        z = z if bias is None else z + bias.reshape(1, -1, *[1] * (x.dim() - 2))  # it has no backward of bias alone
        return F.silu(z) if activation == "silu" else z

    return function


def fused(groups, eps=1e-5, activation="silu"):
    def function(x, weight=None, bias=None, addend=None):
        return cnkernels.group_norm_silu(x, groups, weight, bias, eps, activation, addend)

    return function


def sums(shape):
    """Terms that a gradient adds up: those of weight and bias over samples and pixels, that of addend over pixels."""
    pixels = math.prod(shape[2:])
    return {1: shape[0] * pixels, 2: shape[0] * pixels, 3: pixels}


def inputs(shape, addend=True):
    channels = shape[1]
    return [randn(*shape), randn(channels), randn(channels), randn(*shape[:2]) if addend else None]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape, groups", SHAPES)
def test_equals_pytorch(shape, groups, layout, dtype, backend):
    addend = groups < shape[1]  # with one channel per group the addend cancels: its gradient is zero but for rounding
    harness.compare(
        fused(groups),
        eager(groups),
        inputs(shape, addend),
        dtype,
        backend,
        arrange=LAYOUTS[layout],
        reductions=sums(shape),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_and_upstream_layout(layout, backend):
    shape = (2, 12, 5, 7)
    for upstream in LAYOUTS.values():
        y, dx, *_ = harness.compare(
            fused(4),
            eager(4),
            inputs(shape),
            torch.float32,
            backend,
            arrange=LAYOUTS[layout],
            arrange_upstream=upstream,
            reductions=sums(shape),
        )
        kept = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        assert y.is_contiguous(memory_format=kept)
        assert dx.is_contiguous(memory_format=kept)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("given", ["weight", "bias", "addend", "nothing"])
def test_optional_arguments(given, activation, backend):
    x, weight, bias, addend = inputs((2, 12, 4, 6))
    chosen = [
        x,
        *(t if name == given else None for name, t in (("weight", weight), ("bias", bias), ("addend", addend))),
    ]
    for layout in (harness.as_is, harness.channels_last):
        harness.compare(
            fused(3, activation=activation),
            eager(3, activation=activation),
            chosen,
            torch.float32,
            backend,
            arrange=layout,
            reductions=sums(x.shape),
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(2, 6, 9), (2, 6, 3, 2, 2)], ids=str)
def test_other_ranks(shape, backend):
    harness.compare(fused(3), eager(3), inputs(shape), torch.float32, backend, reductions=sums(shape))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_mean_far_from_zero(layout, backend):
    """x = 1000 + 0.1 n: E[x^2] - E[x]^2 in float32 would lose every digit of the variance."""
    x = randn(2, 8, 24, 24, scale=0.1, offset=1000.0)
    harness.compare(fused(2), eager(2), [x, None, None], torch.float32, backend, arrange=LAYOUTS[layout])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_eps_counts(layout, backend):
    """Where the variance is of the order of eps, a wrong eps is visible; 1e-6 and 1e-5 both occur in a U-Net."""
    x = randn(1, 4, 8, 8, scale=1e-3)
    for eps in (1e-6, 1e-5, 1e-2):
        harness.compare(fused(2, eps), eager(2, eps), [x, None, None], torch.float32, backend, arrange=LAYOUTS[layout])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_non_finite_stays_in_its_group(layout, value, backend):
    x = randn(2, 8, 6, 6)
    x[1, 2, 3, 4] = value
    y, *_ = harness.compare(fused(4), eager(4), [x, None, None], torch.float32, backend, arrange=LAYOUTS[layout])
    assert torch.isnan(y[1, 2:4]).all()
    assert torch.isfinite(y[0]).all() and torch.isfinite(y[1, :2]).all() and torch.isfinite(y[1, 4:]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_constant_input_is_the_bias(backend):
    bias = randn(8).float()
    with cnkernels.backend(backend):
        y = cnkernels.group_norm_silu(torch.full((1, 8, 5, 5), 3.25, device=DEVICE), 2, None, bias, activation=None)
    torch.testing.assert_close(y, bias[None, :, None, None].expand_as(y), rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_parameters_of_half_precision_input(backend):
    x, weight, bias, addend = inputs((2, 64, 6, 6))
    wide = [t.bfloat16().float().requires_grad_() for t in (weight, bias, addend)]
    narrow = [t.detach().bfloat16().requires_grad_() for t in wide]
    x, upstream = x.bfloat16().requires_grad_(), randn(2, 64, 6, 6).bfloat16()
    with cnkernels.backend(backend):
        y = fused(8)(x, *wide)
        gradients = torch.autograd.grad(y, (x, *wide), upstream)
    assert [g.dtype for g in gradients] == [torch.bfloat16, *[torch.float32] * 3]
    peer = harness.Eager(eager(8), [t.detach() for t in (x, *narrow)], upstream)
    for index, (name, ours) in enumerate(zip(["y", "x", "weight", "bias", "addend"], (y, *gradients), strict=True)):
        peer.assert_by_rule(index, name, ours)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_gradients_asked_for(backend, monkeypatch):
    asked = []
    kernels = registration.backward
    monkeypatch.setattr(registration, "backward", lambda *a: asked.append(list(a[-1])) or kernels(*a))
    x, weight, bias, addend = (t.float() for t in inputs((2, 8, 4, 4)))
    for index, tensor in enumerate((x, weight, bias, addend)):
        tensor.requires_grad_()
        with cnkernels.backend(backend):
            fused(2)(x, weight, bias, addend).sum().backward()
        assert asked.pop() == [i == index for i in range(4)]
        assert tensor.grad.shape == tensor.shape and torch.isfinite(tensor.grad).all()
        tensor.requires_grad_(False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (2, 8, 0, 4)], ids=str)
def test_empty(shape, backend):
    x, weight = torch.randn(shape, device=DEVICE, requires_grad=True), torch.ones(8, device=DEVICE, requires_grad=True)
    with cnkernels.backend(backend):
        y = cnkernels.group_norm_silu(x, 4, weight)
        y.sum().backward()
    assert y.shape == x.shape == x.grad.shape
    assert torch.equal(weight.grad, torch.zeros(8, device=DEVICE))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_repeatable_bit_for_bit(layout, backend):
    tensors = [LAYOUTS[layout](t.half()) for t in inputs((2, 40, 17, 19))]
    upstream = randn(2, 40, 17, 19).half()
    with cnkernels.backend(backend):
        harness.assert_repeatable(lambda: harness.run(fused(4), tensors, upstream))


def test_gradcheck():
    tensors = [t.requires_grad_() for t in inputs((2, 6, 3, 3))]
    assert torch.autograd.gradcheck(fused(3), tensors)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    x, weight, bias, addend = (t.float().requires_grad_() for t in inputs((2, 8, 4, 6)))
    with cnkernels.backend(backend):
        for tensor in (x, harness.channels_last(x.detach()).requires_grad_()):
            torch.library.opcheck(
                torch.ops.cnkernels.group_norm_silu.default, (tensor, 4, weight, bias, 1e-5, "silu", addend)
            )
        torch.library.opcheck(torch.ops.cnkernels.group_norm_silu.default, (x, 4, None, None, 1e-5, None, None))


def test_compiles_once_for_every_size():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    weight = torch.randn(12, device=DEVICE, requires_grad=True)
    compiled = torch.compile(
        lambda x, a: cnkernels.group_norm_silu(x, 4, weight, None, addend=a), backend=counter, fullgraph=True
    )
    for shape in ((2, 12, 8, 6), (3, 12, 10, 14), (5, 12, 6, 16), (4, 12, 12, 10)):
        x, addend = torch.randn(shape, device=DEVICE, requires_grad=True), torch.randn(shape[:2], device=DEVICE)
        y = compiled(x, addend)
        torch.testing.assert_close(y, cnkernels.group_norm_silu(x, 4, weight, None, addend=addend))
        y.sum().backward()
    assert counter.frame_count <= 2


def test_module_is_a_group_norm():
    module, twin = GroupNormSiLU(4, 8, eps=1e-6).to(DEVICE), torch.nn.GroupNorm(4, 8, eps=1e-6).to(DEVICE)
    twin.load_state_dict(module.state_dict())
    x = torch.randn(2, 8, 5, 5, device=DEVICE)
    torch.testing.assert_close(module(x), F.silu(twin(x)))
    module.activation = None
    torch.testing.assert_close(module(x), twin(x))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(2, 8)}, r"`x` must be \[N, C, \*spatial\].*got shape \[2, 8\]"),
        ({"x": torch.zeros(2, 8, 4, 4, dtype=torch.int32)}, "`x` must be float32.*got torch.int32"),
        ({"groups": 3}, "`groups` must be a divisor of the 8 channels of `x`, got 3"),
        ({"groups": 0}, "`groups` must be a divisor"),
        ({"weight": torch.zeros(7)}, r"`weight` must be of shape \[8\], got shape \[7\]"),
        ({"bias": torch.zeros(8, dtype=torch.float16)}, "`bias` must be of dtype torch.float32, got torch.float16"),
        ({"bias": torch.zeros(8, device="meta")}, "`bias` must be on the device of `x`, cpu, got meta"),
        ({"addend": torch.zeros(1, 8)}, r"`addend` must be of shape \[2, 8\], got shape \[1, 8\]"),
        ({"activation": "relu"}, "`activation` must be \"silu\" or None, got 'relu'"),
        ({"eps": float("nan")}, "`eps` must be finite"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_one_clear_error(change, message):
    arguments = {"x": torch.zeros(2, 8, 4, 4), "groups": 4} | change
    with pytest.raises(ValueError, match="group_norm_silu: " + message):
        cnkernels.group_norm_silu(**arguments)
