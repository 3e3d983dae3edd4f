"""GEGLU in every backend against PyTorch: results, gradients, layouts, compilation, bad input."""

import pytest
import torch
import torch._dynamo.testing
from torch.nn import functional as F

import cnkernels
from cnkernels.nn import GEGLU
from tests.cnkernels import harness
from tests.cnkernels.guards import guarded_empty
from tests.cnkernels.harness import DEVICE, DTYPES, randn

BACKENDS = harness.backends("geglu")
SHAPES = [
    pytest.param((1, 9, 2 * 1280), id="SD1.5-with-a-short-tile-of-rows"),
    pytest.param((2, 77, 2 * 40), id="77-tokens"),
    pytest.param((3, 5, 2 * 37), id="primes"),
    pytest.param((9, 2 * 257), id="one-past-a-tile"),
    pytest.param((7, 2), id="one-column"),
    pytest.param((10,), id="1-d"),
]


def eager(projected):
    value, gate = projected.chunk(2, dim=-1)
    return value * F.gelu(gate)


def rows_of_a_wider_buffer(t):
    """The same values in rows with NaN between them; their last dimension is contiguous."""
    return torch.cat((t, torch.full((*t.shape[:-1], 6), torch.nan, dtype=t.dtype, device=t.device)), -1)[
        ..., : t.shape[-1]
    ]


def transposed(t):
    """The same values with the leading dimensions in another order in memory."""
    return t.transpose(0, 1).contiguous().transpose(0, 1)


def expanded(t):
    """What a sum's gradient looks like: one element, every stride zero."""
    return t.flatten()[0].expand(t.shape)


LAYOUTS = {
    "contiguous": harness.as_is,
    "misaligned": harness.misaligned,
    "wider": rows_of_a_wider_buffer,
    "transposed": transposed,
    "strided": harness.strided,
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_pytorch(shape, dtype, backend):
    out, dprojected = harness.compare(cnkernels.geglu, eager, [randn(*shape, scale=2.0)], dtype, backend)
    assert out.is_contiguous() and dprojected.is_contiguous()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_and_upstream_layout(layout, dtype, backend):
    for upstream in LAYOUTS.values():
        harness.compare(
            cnkernels.geglu,
            eager,
            [randn(3, 5, 2 * 24)],
            dtype,
            backend,
            arrange=LAYOUTS[layout],
            arrange_upstream=upstream,
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offset", range(1, 9))
def test_views_at_every_offset(offset, backend):
    """Two to sixteen bytes past a 16-byte boundary, forward and backward."""
    harness.compare(
        cnkernels.geglu,
        eager,
        [randn(3, 2 * 16)],
        torch.float16,
        backend,
        arrange=lambda t: harness.misaligned(t, offset),
        arrange_upstream=lambda t: harness.misaligned(t, offset),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_upstream_gradient(backend):
    projected = randn(4, 6, 2 * 10).float().requires_grad_()
    with cnkernels.backend(backend):
        out = cnkernels.geglu(projected)
        (total,) = torch.autograd.grad(out.sum(), projected, retain_graph=True)
        (ones,) = torch.autograd.grad(out, projected, torch.ones_like(out))
    assert torch.equal(total, ones)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_gates(backend):
    """Far out the gelu is the identity or zero; squaring a gate must not turn its gradient into NaN."""
    gate = torch.tensor([-1e4, -300.0, -20.0, -6.0, -3.0, -0.0, 0.0, 3.0, 6.0, 20.0, 300.0, 1e4], device=DEVICE)
    projected = torch.cat((torch.full_like(gate, 1.5), gate)).double()
    for dtype in (torch.float32, torch.float16):
        harness.compare(cnkernels.geglu, eager, [projected], dtype, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("half", ["value", "gate"])
def test_non_finite_stays_in_its_place(half, value, backend):
    """A gate's by the formula: PyTorch's vectorised CPU gelu alone makes NaN of +inf, its GPU gelu does not."""

    def formula(projected):
        value, gate = projected.chunk(2, dim=-1)
        return value * (gate * (0.5 * (1 + torch.erf(gate * 0.5**0.5))))

    projected = randn(3, 2 * 5)
    projected[1, 2 if half == "value" else 7] = value
    twin = eager if half == "value" else formula
    out, dprojected = harness.compare(cnkernels.geglu, twin, [projected], torch.float32, backend)
    assert (~torch.isfinite(out)).sum() == 1
    assert (~torch.isfinite(dprojected)).nonzero()[:, 0].unique().tolist() == [1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 0, 8)], ids=str)
def test_empty(shape, backend):
    projected = torch.randn(shape, device=DEVICE, requires_grad=True)
    with cnkernels.backend(backend):
        out = cnkernels.geglu(projected)
        out.sum().backward()
    assert out.shape == (*shape[:-1], shape[-1] // 2) and projected.grad.shape == shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_writes_nothing_outside_its_outputs(backend):
    projected, upstream = randn(9, 2 * 37).half().requires_grad_(), randn(9, 37).half()
    with cnkernels.backend(backend), guarded_empty():
        torch.autograd.grad(cnkernels.geglu(projected), projected, upstream)


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeatable_bit_for_bit(backend):
    projected, upstream = randn(3, 11, 2 * 70).bfloat16(), randn(3, 11, 70).bfloat16()
    with cnkernels.backend(backend):
        harness.assert_repeatable(lambda: harness.run(cnkernels.geglu, [projected], upstream))


def test_gradcheck():
    assert torch.autograd.gradcheck(cnkernels.geglu, randn(2, 3, 2 * 4).requires_grad_())


def test_saves_only_the_projection():
    projected, saved = randn(2, 3, 8).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        cnkernels.geglu(projected)
    assert [t.data_ptr() for t in saved] == [projected.data_ptr()]


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    with cnkernels.backend(backend):
        for projected in (randn(2, 3, 8).float(), rows_of_a_wider_buffer(randn(3, 8).float())):
            torch.library.opcheck(torch.ops.cnkernels.geglu.default, (projected.requires_grad_(),))


def test_compiles_once_for_every_size():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(cnkernels.geglu, backend=counter, fullgraph=True)
    for n, tokens in ((2, 8), (3, 77), (5, 16), (4, 256)):
        projected = torch.randn(n, tokens, 12, device=DEVICE, requires_grad=True)
        out = compiled(projected)
        torch.testing.assert_close(out, eager(projected))
        out.sum().backward()
    assert counter.frame_count <= 2


def test_module_is_a_geglu():
    projected = torch.randn(2, 3, 8, device=DEVICE)
    torch.testing.assert_close(GEGLU()(projected), eager(projected))
    assert not GEGLU().state_dict()


@pytest.mark.parametrize(
    "projected, message",
    [
        (torch.zeros(2, 7), r"`projected` must be \[..., 2C\], its last dimension even, got shape \[2, 7\]"),
        (torch.zeros(()), r"`projected` must be \[..., 2C\], its last dimension even, got shape \[\]"),
        (torch.zeros(2, 8, dtype=torch.int64), "`projected` must be float32.*got torch.int64"),
    ],
    ids=["odd", "0-d", "int64"],
)
def test_bad_input_is_one_clear_error(projected, message):
    with pytest.raises(ValueError, match="geglu: " + message):
        cnkernels.geglu(projected)


def test_forced_triton_refuses_float64_and_says_why():
    with cnkernels.backend("triton"), pytest.raises(ValueError, match="triton backend of geglu does not serve"):
        cnkernels.geglu(randn(2, 4))
