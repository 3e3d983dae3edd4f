"""Attention in every backend against PyTorch: results, gradients, layouts, extreme values, compilation, bad input."""

import pytest
import torch
import torch._dynamo.testing
from torch.nn import functional as F

import cnkernels
from cnkernels.attention import registration
from tests.cnkernels import harness
from tests.cnkernels.harness import DEVICE, DTYPES, randn

BACKENDS = harness.backends("attention")
SHAPES = [  # B, H, Sq, Sk, D
    pytest.param(1, 2, 130, 130, 40, id="d40-self-ragged-tiles"),
    pytest.param(2, 1, 65, 77, 40, id="d40-text"),
    pytest.param(1, 1, 63, 65, 80, id="d80"),
    pytest.param(1, 1, 64, 64, 160, id="d160-one-tile"),
    pytest.param(1, 1, 65, 270, 64, id="d64-self-several-tiles"),
    pytest.param(1, 2, 33, 77, 64, id="d64-text"),
    pytest.param(1, 2, 1, 77, 64, id="one-query"),
    pytest.param(2, 1, 77, 1, 8, id="one-key"),
]


def eager(scale=None):
    def function(q, k, v):  # [B, S, H, D]; the plain softmax path of the original
        logits = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * (q.shape[-1] ** -0.5 if scale is None else scale)
        return (logits.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2)

    return function


def fused(scale=None):
    return lambda q, k, v: cnkernels.attention(q, k, v, scale)


def one_dtype(backend):
    return harness.dtype_of("attention", backend)


def inputs(batch, heads, queries, keys, dim, scale=1.0):
    return [randn(batch, length, heads, dim, scale=scale) for length in (queries, keys, keys)]


def heads_first(t):
    """[B, S, H, D] stored as [B, H, S, D]: the transposed view that projections often give."""
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def packed(t):
    """One of three in a packed projection [B, S, 3, H, D]."""
    return torch.stack((torch.full_like(t, torch.nan), t, torch.full_like(t, torch.nan)), dim=2)[:, :, 1]


LAYOUTS = [heads_first, packed, harness.misaligned, harness.strided]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch, heads, queries, keys, dim", SHAPES)
def test_equals_pytorch(batch, heads, queries, keys, dim, dtype, backend):
    harness.skip_unless_served("attention", backend, dtype, dim)
    harness.compare(fused(), eager(), inputs(batch, heads, queries, keys, dim), dtype, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("arrange", LAYOUTS)
def test_inputs_are_read_where_they_are(arrange, backend):
    out, *_ = harness.compare(
        fused(),
        eager(),
        inputs(2, 2, 33, 40, 40),
        one_dtype(backend),
        backend,
        arrange=arrange,
        arrange_upstream=arrange,
    )
    assert out.is_contiguous()


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_upstream_gradient(backend):
    expand = lambda t: t[:, :1, :1].expand_as(t)  # noqa: E731
    dtype = one_dtype(backend)
    tensors = [t.to(dtype) for t in inputs(1, 2, 17, 19, 40)]
    upstream = expand(randn(1, 17, 2, 40).to(dtype))
    peer = harness.Eager(eager(), tensors, upstream)
    with cnkernels.backend(backend):
        actual = harness.run(fused(), tensors, upstream)
    for index, (name, ours) in enumerate(zip(["out", "q", "k", "v"], actual, strict=True)):
        peer.assert_by_rule(index, name, ours)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, -0.3])
def test_scale(scale, backend):
    harness.compare(fused(scale), eager(scale), inputs(1, 1, 20, 36, 40), one_dtype(backend), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_logits(dtype, backend):
    """Rows whose maximum grows from key to key, and logits of some hundreds: exp must never overflow."""
    harness.skip_unless_served("attention", backend, dtype, 40)
    q, k, v = inputs(1, 1, 70, 150, 40, scale=8.0)
    k = k * torch.linspace(0.1, 2.0, 150, dtype=k.dtype, device=k.device)[None, :, None, None]
    harness.compare(fused(), eager(), [q, k, v], dtype, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mean", [24.0, 100.0])
def test_keys_far_from_zero(mean, dtype, backend):
    """A column of the keys has a mean that q hardly sees: in dq it multiplies what rowsum(P * dP) is off by."""
    q, k, v = inputs(1, 1, 16, 150, 40)
    q[..., 3] *= 0.05
    k[..., 3] += mean
    harness.compare(fused(), eager(), [q, k, v], dtype, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("poisoned", ["q", "k", "v"])
def test_nan_goes_where_pytorch_has_it(poisoned, backend):
    tensors = dict(zip("qkv", inputs(1, 2, 40, 70, 40), strict=True))
    tensors[poisoned][0, 3, 1, 5] = torch.nan
    harness.compare(fused(), eager(), list(tensors.values()), one_dtype(backend), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinite_values(backend):
    q, k, v = inputs(1, 1, 20, 70, 40)
    v[0, 66, 0, 2] = torch.inf
    harness.compare(fused(), eager(), [q, k, v], one_dtype(backend), backend, backward=False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_log_sum_exp(backend):
    q, k, v = (t.to(one_dtype(backend)) for t in inputs(2, 3, 33, 77, 40))
    with cnkernels.backend(backend):
        _, lse = torch.ops.cnkernels.attention(q, k, v, 0.2)
    exact = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()).mul(0.2).logsumexp(-1)
    assert lse.dtype == torch.float32 and lse.shape == (2, 3, 33)
    torch.testing.assert_close(lse.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_gradients_asked_for(backend, monkeypatch):
    """A frozen cross-attention asks for dq alone."""
    asked = []
    kernels = registration.backward
    monkeypatch.setattr(registration, "backward", lambda *a: asked.append(list(a[-1])) or kernels(*a))
    tensors = [t.to(one_dtype(backend)) for t in inputs(1, 2, 20, 30, 40)]
    upstream = torch.randn_like(tensors[0])
    with cnkernels.backend(backend):
        _, *together = harness.run(fused(), tensors, upstream)
        assert asked.pop() == [True] * 3
        for index, tensor in enumerate(tensors):
            leaves = [t.detach().requires_grad_(i == index) for i, t in enumerate(tensors)]
            (alone,) = torch.autograd.grad(fused()(*leaves), leaves[index], upstream)
            assert asked.pop() == [i == index for i in range(3)]
            assert torch.equal(alone, together[index]) and alone.shape == tensor.shape


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch, queries", [(0, 5), (2, 0)])
def test_empty(batch, queries, backend):
    dtype = one_dtype(backend)
    q, k, v = (torch.randn(batch, n, 2, 40, device=DEVICE, dtype=dtype, requires_grad=True) for n in (queries, 6, 6))
    with cnkernels.backend(backend):
        out = cnkernels.attention(q, k, v)
        out.sum().backward()
    assert out.shape == q.shape == q.grad.shape
    assert torch.equal(k.grad, torch.zeros_like(k)) and torch.equal(v.grad, torch.zeros_like(v))


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeatable_bit_for_bit(backend):
    tensors = [t.half() for t in inputs(1, 2, 70, 90, 40)]
    upstream = randn(1, 70, 2, 40).half()
    with cnkernels.backend(backend):
        harness.assert_repeatable(lambda: harness.run(fused(), tensors, upstream))


def test_gradcheck():
    assert torch.autograd.gradcheck(fused(), [t.requires_grad_() for t in inputs(1, 2, 3, 4, 5)])


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    tensors = [t.to(one_dtype(backend)).requires_grad_() for t in inputs(1, 2, 9, 12, 40)]
    with cnkernels.backend(backend):
        torch.library.opcheck(torch.ops.cnkernels.attention.default, (*tensors, 0.25))
        torch.library.opcheck(
            torch.ops.cnkernels.attention.default, (*map(packed, (t.detach() for t in tensors)), 0.25)
        )


def test_compiles_once_for_every_size():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(cnkernels.attention, backend=counter, fullgraph=True)
    for batch, queries, keys in ((2, 9, 12), (3, 16, 20), (5, 8, 31), (4, 25, 18)):
        tensors = [t.float().requires_grad_() for t in inputs(batch, 2, queries, keys, 16)]
        out = compiled(*tensors)
        torch.testing.assert_close(out, cnkernels.attention(*tensors))
        out.sum().backward()
    assert counter.frame_count <= 2


def test_autocast():
    tensors = [t.float() for t in inputs(1, 2, 5, 7, 8)]
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert cnkernels.attention(*tensors).dtype == torch.bfloat16


def test_equals_scaled_dot_product_attention():
    q, k, v = (t.float() for t in inputs(2, 3, 40, 50, 16))
    expected = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
    torch.testing.assert_close(cnkernels.attention(q, k, v), expected)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": torch.zeros(2, 4, 8)}, r"`q` must be \[B, Sq, H, D\], got shape \[2, 4, 8\]"),
        ({"q": torch.zeros(1, 4, 2, 8, dtype=torch.int32)}, "`q` must be float32.*got torch.int32"),
        ({"k": torch.zeros(1, 6, 2, 9)}, r"`k` must be \[1, Sk, 2, 8\] with Sk >= 1, got shape \[1, 6, 2, 9\]"),
        ({"k": torch.zeros(1, 0, 2, 8)}, "`k` must be.*Sk >= 1"),
        ({"v": torch.zeros(1, 6, 3, 8)}, r"`v` must be \[1, Sk, 2, 8\]"),
        ({"v": torch.zeros(1, 5, 2, 8)}, "`v` must be of k's length 6, got 5"),
        (
            {"k": torch.zeros(1, 6, 2, 8, dtype=torch.float16)},
            "`k` must be of q's dtype torch.float32, got torch.float16",
        ),
        ({"v": torch.zeros(1, 6, 2, 8, device="meta")}, "`v` must be on q's device cpu, got meta"),
    ],
    ids=str,
)
def test_bad_input_is_one_clear_error(change, message):
    arguments = {name: torch.zeros(1, length, 2, 8) for name, length in zip("qkv", (4, 6, 6), strict=True)} | change
    with pytest.raises(ValueError, match="attention: " + message):
        cnkernels.attention(**arguments)
