"""Zero convolution + residual add in every backend against PyTorch: results, gradients, layouts, bad input."""

import pytest
import torch
import torch._dynamo.testing
from torch.nn import functional as F

import cnkernels
from cnkernels.nn import ZeroConv2d
from cnkernels.zero_conv_add import registration
from tests.cnkernels import harness
from tests.cnkernels.guards import guarded_empty
from tests.cnkernels.harness import DEVICE, DTYPES, randn

BACKENDS = harness.backends("zero_conv_add")


def channel_slice(t):
    """The same values as some of the channels of a larger channels_last tensor; NaN in the others."""
    if t.dim() != 4:
        return t
    beside = torch.full_like(t[:, :3], torch.nan)
    return harness.channels_last(torch.cat((beside, t, beside), 1))[:, beside.shape[1] : -beside.shape[1]]


LAYOUTS = {
    "contiguous": harness.as_is,
    "channels_last": harness.channels_last,
    "misaligned": harness.misaligned,
    "strided": harness.strided,
    "channel_slice": channel_slice,
}
SHAPES = [  # N, Cin, Cout, H, W
    pytest.param((2, 64, 64, 8, 8), id="whole-tiles"),
    pytest.param((1, 160, 160, 5, 7), id="160-channels"),
    pytest.param((3, 37, 41, 5, 3), id="primes"),
    pytest.param((2, 8, 12, 17, 19), id="a-weight-gradient-in-splits"),
    pytest.param((1, 1, 1, 1, 1), id="one-element"),
]
KINDS = {"float": lambda n: None, "0-d": lambda n: randn(), "per-sample": lambda n: randn(n)}


def eager(factor=1.0):
    def function(x, weight, bias=None, residual=None, scale=None):
        scale = factor if scale is None else scale.reshape(-1, 1, 1, 1) if scale.dim() else scale
        y = F.conv2d(x, weight, bias) * scale
        return y if residual is None else residual + y

    return function


def fused(factor=1.0):
    def function(x, weight, bias=None, residual=None, scale=None):
        return cnkernels.zero_conv_add(x, weight, bias, residual, factor if scale is None else scale)

    return function


def inputs(n, cin, cout, height, width, scale=None):
    return [
        randn(n, cin, height, width),
        randn(cout, cin, 1, 1, scale=cin**-0.5),
        randn(cout),
        randn(n, cout, height, width),
        scale,
    ]


def reductions(n, channels, height, width):
    """Terms in each gradient that is one sum: the weight's and bias's over all pixels, a scale's over all outputs."""
    pixels = height * width
    return {1: n * pixels, 2: n * pixels, 4: channels * pixels}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_pytorch(shape, layout, dtype, backend):
    n, _, cout, height, width = shape
    harness.compare(
        fused(0.7),
        eager(0.7),
        inputs(*shape),
        dtype,
        backend,
        arrange=LAYOUTS[layout],
        reductions=reductions(n, cout, height, width),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_weight_gradient_in_the_largest_tiles(dtype, backend):
    """As SDXL's exits of 128x128 have it: so many pixels that tiles of 128x128 fill a GPU in splits."""
    tensors = inputs(1, 8, 8, 65, 64)
    sums = reductions(1, 8, 65, 64)
    harness.compare(fused(), eager(), tensors, dtype, backend, arrange=harness.channels_last, reductions=sums)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kind", KINDS)
def test_scale_on_the_device(kind, layout, backend):
    tensors = inputs(3, 12, 40, 4, 5, KINDS[kind](3))  # 40 channels: more than one tile of them
    terms = {4: tensors[3].numel() // (3 if kind == "per-sample" else 1)}
    harness.compare(fused(), eager(), tensors, torch.float32, backend, arrange=LAYOUTS[layout], reductions=terms)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_and_upstream_layout(layout, backend):
    tensors = inputs(2, 16, 24, 5, 7, randn(2))
    for upstream in LAYOUTS.values():
        y, dx, *_ = harness.compare(
            fused(),
            eager(),
            tensors,
            torch.float32,
            backend,
            arrange=LAYOUTS[layout],
            arrange_upstream=upstream,
            reductions=reductions(2, 24, 5, 7),
        )
        kept = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        assert y.is_contiguous(memory_format=kept) and dx.is_contiguous(memory_format=kept)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("without", ["bias", "residual", "both"])
def test_optional_arguments(without, backend):
    x, weight, bias, residual, scale = inputs(2, 12, 8, 3, 5, randn(2))
    bias = None if without in ("bias", "both") else bias
    residual = None if without in ("residual", "both") else residual
    tensors = [x, weight, bias, residual, scale]
    harness.compare(fused(), eager(), tensors, torch.float32, backend, reductions=reductions(2, 8, 3, 5))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("first", [0, 3, 24])
def test_out_writes_its_slice_and_nothing_else(first, layout, backend):
    """`out` as channels [first, first + 20) of a concatenation of 44: the rest must keep its sentinel."""
    x, weight, bias, residual, scale = (t.float() for t in inputs(2, 12, 20, 3, 5, randn(2)))
    x, residual = LAYOUTS[layout](x), LAYOUTS[layout](residual)
    whole = LAYOUTS[layout](torch.full((2, 44, 3, 5), 42.0, device=DEVICE))
    out = whole[:, first : first + 20]
    with torch.no_grad(), cnkernels.backend(backend):
        returned = cnkernels.zero_conv_add(x, weight, bias, residual, scale, out=out)
        expected = cnkernels.zero_conv_add(x, weight, bias, residual, scale)
    assert returned is out
    assert torch.equal(out, expected)
    rest = torch.cat((whole[:, :first], whole[:, first + 20 :]), dim=1)
    assert torch.equal(rest, torch.full_like(rest, 42.0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_writes_nothing_outside_its_outputs(layout, backend):
    tensors = [LAYOUTS[layout](t.half()) if t.dim() == 4 else t.half() for t in inputs(2, 37, 41, 5, 3, randn(2))]
    with cnkernels.backend(backend), guarded_empty():
        harness.run(fused(), tensors, randn(2, 41, 5, 3).half())


@pytest.mark.parametrize("backend", BACKENDS)
def test_residual_of_another_layout(backend):
    x, weight, bias, residual, _ = (t if t is None else t.float() for t in inputs(2, 8, 12, 3, 5))
    with cnkernels.backend(backend):
        expected = cnkernels.zero_conv_add(x, weight, bias, residual)
        assert torch.equal(cnkernels.zero_conv_add(x, weight, bias, harness.channels_last(residual)), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_the_residual_is_the_upstream_gradient_itself(backend):
    x, weight, bias, residual, _ = (t if t is None else t.float() for t in inputs(1, 8, 8, 3, 3))
    upstream = torch.randn_like(residual)
    residual.requires_grad_()
    with cnkernels.backend(backend):
        (dresidual,) = torch.autograd.grad(cnkernels.zero_conv_add(x, weight, bias, residual), residual, upstream)
    assert dresidual.data_ptr() == upstream.data_ptr()


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_gradients_asked_for(backend, monkeypatch):
    asked = []
    kernels = registration.backward
    monkeypatch.setattr(registration, "backward", lambda *a: asked.append(list(a[-1])) or kernels(*a))
    x, weight, bias, residual, scale = (t.float() for t in inputs(2, 8, 8, 3, 3, randn(2)))
    for index, tensor in enumerate((x, weight, bias, scale)):
        tensor.requires_grad_()
        with cnkernels.backend(backend):
            fused()(x, weight, bias, residual, scale).square().sum().backward()
        assert asked.pop() == [i == index for i in range(4)]
        assert tensor.grad.shape == tensor.shape and torch.isfinite(tensor.grad).all()
        tensor.requires_grad_(False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_non_finite_input(value, backend):
    x, weight, bias, residual, _ = inputs(2, 8, 12, 3, 3)
    x[1, 2, 0, 1] = value
    harness.compare(fused(), eager(), [x, weight, bias, residual], torch.float32, backend, backward=False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    x, weight = torch.randn(0, 8, 4, 4, device=DEVICE, requires_grad=True), torch.randn(6, 8, 1, 1, device=DEVICE)
    weight.requires_grad_()
    with cnkernels.backend(backend):
        y = cnkernels.zero_conv_add(x, weight)
        y.sum().backward()
    assert y.shape == (0, 6, 4, 4) and x.grad.shape == x.shape
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_repeatable_bit_for_bit(layout, backend):
    tensors = [LAYOUTS[layout](t.half()) if t.dim() == 4 else t.half() for t in inputs(2, 40, 48, 9, 7, randn(2))]
    upstream = randn(2, 48, 9, 7).half()
    with cnkernels.backend(backend):
        harness.assert_repeatable(lambda: harness.run(fused(), tensors, upstream))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradient_of_the_weight_has_its_strides(layout):
    x, weight, bias, residual, _ = (t if t is None else t.float() for t in inputs(1, 8, 8, 3, 3))
    weight = weight.as_strided(
        weight.shape, (8, 1, 8, 8) if layout == "channels_last" else (8, 1, 1, 1)
    ).requires_grad_()
    (dweight,) = torch.autograd.grad(cnkernels.zero_conv_add(x, weight, bias, residual).square().sum(), weight)
    assert dweight.stride() == weight.stride()


def test_gradcheck():
    tensors = [t.requires_grad_() for t in inputs(2, 3, 4, 2, 2, randn(2))]
    assert torch.autograd.gradcheck(fused(), tensors)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    x, weight, bias, residual, scale = (t.float().requires_grad_() for t in inputs(2, 8, 4, 3, 5, randn(2)))
    op = torch.ops.cnkernels.zero_conv_add.default
    with cnkernels.backend(backend):
        torch.library.opcheck(op, (x, weight, bias, residual, scale, 1.0))
        torch.library.opcheck(op, (harness.channels_last(x.detach()).requires_grad_(), weight, None, None, None, 0.5))
        out = torch.zeros(2, 9, 3, 5, device=DEVICE)[:, :4]
        frozen = [t.detach() for t in (x, weight, bias, residual, scale)]
        torch.library.opcheck(torch.ops.cnkernels.zero_conv_add_out.default, (*frozen, 1.0, out))


def test_compiles_once_for_every_size_and_scale():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    weight = torch.randn(12, 8, 1, 1, device=DEVICE, requires_grad=True)
    compiled = torch.compile(cnkernels.zero_conv_add, backend=counter, fullgraph=True)
    for n, height, width, scale in ((2, 8, 6, 1.0), (3, 10, 14, 0.5), (5, 6, 16, 0.25), (4, 12, 10, 0.75)):
        x = torch.randn(n, 8, height, width, device=DEVICE, requires_grad=True)
        residual = torch.randn(n, 12, height, width, device=DEVICE)
        y = compiled(x, weight, None, residual, scale)
        torch.testing.assert_close(y, cnkernels.zero_conv_add(x, weight, None, residual, scale))
        y.sum().backward()
    assert counter.frame_count <= 2


def test_autocast():
    x, weight, bias, residual, _ = (t if t is None else t.float() for t in inputs(1, 8, 8, 3, 3))
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert cnkernels.zero_conv_add(x, weight, bias, residual).dtype == torch.bfloat16


def test_module_is_a_zero_convolution():
    module, twin = ZeroConv2d(8, 12).to(DEVICE), torch.nn.Conv2d(8, 12, 1).to(DEVICE)
    x, residual = torch.randn(2, 8, 3, 3, device=DEVICE), torch.randn(2, 12, 3, 3, device=DEVICE)
    assert torch.equal(module(x, residual, scale=0.5), residual)
    module.load_state_dict(twin.state_dict())
    torch.testing.assert_close(module(x, residual, scale=0.5), residual + 0.5 * twin(x))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(2, 8, 4)}, r"`x` must be \[N, Cin, H, W\], got shape \[2, 8, 4\]"),
        ({"weight": torch.zeros(6, 7, 1, 1)}, r"`weight` must be \[Cout, 8, 1, 1\], got shape \[6, 7, 1, 1\]"),
        ({"weight": torch.zeros(6, 8, 3, 3)}, r"`weight` must be \[Cout, 8, 1, 1\]"),
        (
            {"weight": torch.zeros(6, 8, 1, 1).half()},
            "`weight` must be of the dtype of `x`, torch.float32, got torch.float16",
        ),
        ({"bias": torch.zeros(8)}, r"`bias` must be of shape \[6\], got shape \[8\]"),
        ({"residual": torch.zeros(2, 8, 4, 4)}, r"`residual` must be of shape \[2, 6, 4, 4\]"),
        (
            {"residual": torch.zeros(2, 6, 4, 4, device="meta")},
            "`residual` must be on the device of `x`, cpu, got meta",
        ),
        (
            {"scale": torch.zeros(3)},
            r"`scale` must be a float or of shape \[\], \[2\] or \[2, 1, 1, 1\], got shape \[3\]",
        ),
        ({"scale": torch.zeros((), dtype=torch.int64)}, "`scale` must be a floating point tensor, got torch.int64"),
        ({"out": torch.zeros(2, 6, 4, 5)}, r"`out` must be of shape \[2, 6, 4, 4\]"),
        ({"out": torch.zeros(2, 6, 4, 8)[..., :4]}, "`out` must be without overlap and with evenly strided pixels"),
        ({"out": torch.zeros(1, 6, 4, 4).expand(2, 6, 4, 4)}, "`out` must be without overlap"),
    ],
    ids=str,
)
def test_bad_input_is_one_clear_error(change, message):
    arguments = {"x": torch.zeros(2, 8, 4, 4), "weight": torch.zeros(6, 8, 1, 1)} | change
    with pytest.raises(ValueError, match="zero_conv_add: " + message):
        cnkernels.zero_conv_add(**arguments)


def test_out_that_overlaps_an_input_is_refused():
    whole = torch.zeros(2, 20, 4, 4).contiguous(memory_format=torch.channels_last)
    weight = torch.zeros(8, 12, 1, 1)
    cnkernels.zero_conv_add(whole[:, :12], weight, out=whole[:, 12:])  # beside it
    with pytest.raises(ValueError, match="`out` must be apart from `x` in memory"):
        cnkernels.zero_conv_add(whole[:, :12], weight, out=whole[:, 11:19])
    with pytest.raises(ValueError, match="`out` must be None where a gradient is recorded"):
        cnkernels.zero_conv_add(whole[:, :12], weight.requires_grad_(), out=whole[:, 12:])
