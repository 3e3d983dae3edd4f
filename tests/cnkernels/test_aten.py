"""The aten backend (PyTorch's own kernels) on paths that the shared tests' small shapes do not take."""

import pytest
import torch
from torch.nn import functional as F

import cnkernels
from cnkernels import dispatch, onednn
from cnkernels.attention import aten_kernels as attention
from tests.cnkernels import harness
from tests.cnkernels.harness import DEVICE, randn
from tests.cnkernels.test_attention import LAYOUTS, SHAPES, eager, fused, inputs

on_cpu = pytest.mark.skipif(DEVICE.type != "cpu", reason="a path of the CPU")


@pytest.fixture(params=[True, False], ids=["bfloat16-products", "no-bfloat16-products"])
def fused_path(request, monkeypatch):
    """The way of a head that can be fused: its own on a CPU with products of bfloat16, flash attention on any other.

    What the latter's users get is tested on every CPU.
    """
    if not request.param:
        monkeypatch.setattr(onednn, "_dtypes", lambda: frozenset({torch.float32}))
    elif not onednn.serves(torch.empty(0, dtype=torch.bfloat16)):
        pytest.skip("this CPU has no products of bfloat16")
    return "_fused_head" if request.param else "_fwd_flash"


@pytest.fixture
def paths(monkeypatch):
    """Which ways were taken, forward: of each head that is fused, and of the call otherwise."""
    taken = []
    for name in ("_fused_head", "_fwd_flash"):
        original = getattr(attention, name)
        monkeypatch.setattr(attention, name, lambda *a, f=original, n=name: taken.append(n) or f(*a))
    return taken


@on_cpu
@pytest.mark.parametrize("scale", [None, 0.05, -0.2])
@pytest.mark.parametrize("queries, keys, dim", [(513, 1031, 40), (600, 512, 80), (530, 530, 160)])
def test_fused_attention(queries, keys, dim, scale, fused_path, paths):
    harness.compare(fused(scale), eager(scale), inputs(1, 2, queries, keys, dim), torch.bfloat16, "aten")
    assert set(paths) == {fused_path}


@on_cpu
@pytest.mark.parametrize("arrange", LAYOUTS)
def test_fused_attention_reads_every_layout(arrange, fused_path, paths):
    tensors = inputs(2, 2, 520, 530, 40)
    harness.compare(fused(), eager(), tensors, torch.bfloat16, "aten", arrange=arrange, backward=False)
    assert set(paths) == {fused_path}


@on_cpu
def test_fused_attention_of_keys_far_from_zero(fused_path, paths):
    """Their mean moves all scores of a row alike: c follows it."""
    q, k, v = inputs(1, 1, 520, 600, 40)
    harness.compare(fused(), eager(), [q, k + 3.0, v], torch.bfloat16, "aten", backward=False)
    assert set(paths) == {fused_path}


@on_cpu
def test_fused_attention_of_one_key_that_outweighs_the_rest(fused_path, paths):
    """The widest reach that is served: a row's largest exponential lies as low as it can, the others below."""
    q, k, v = inputs(1, 1, 520, 600, 16)
    k = k * 0.1
    k[0, 77] = 0.0
    k[0, 77, 0, 3] = 12.0
    q = q * 0.3
    q[..., 3] = torch.linspace(-15.0, 15.0, 520, dtype=q.dtype, device=q.device)[None, :, None]
    harness.compare(fused(0.3), eager(0.3), [q, k, v], torch.bfloat16, "aten", backward=False)
    assert set(paths) == {fused_path}


@on_cpu
@pytest.mark.parametrize("what", ["large q", "large mean", "inf in v", "nan in k"])
def test_attention_that_cannot_be_fused_is_not(what, paths):
    q, k, v = inputs(1, 1, 520, 600, 40)
    if what == "large q":
        q = q * 10
    elif what == "large mean":
        k = k + 200.0
    elif what == "inf in v":
        v[0, 500, 0, 3] = torch.inf
    else:
        k[0, 500, 0, 3] = torch.nan
    harness.compare(fused(), eager(), [q, k, v], torch.bfloat16, "aten", backward=False)
    assert set(paths) == {"_fwd_flash"}


@on_cpu
def test_each_head_goes_its_own_way(fused_path, paths):
    q, k, v = inputs(1, 2, 520, 600, 40)
    q[:, :, 1] *= 10
    harness.compare(fused(), eager(), [q, k, v], torch.bfloat16, "aten", backward=False)
    assert paths == (["_fused_head", "_fwd_flash"] if fused_path == "_fused_head" else ["_fwd_flash"])


@on_cpu
def test_log_sum_exp_of_fused_attention(fused_path, paths):
    q, k, v = (t.bfloat16() for t in inputs(2, 3, 520, 530, 40))
    with cnkernels.backend("aten"):
        _, lse = torch.ops.cnkernels.attention(q, k, v, 0.2)
    assert set(paths) == {fused_path}
    exact = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()).mul(0.2).logsumexp(-1)
    # The exponentials that are summed are rounded to bfloat16.
    torch.testing.assert_close(lse.double(), exact, rtol=0, atol=2**-9)


@on_cpu
@pytest.mark.parametrize("dtype", harness.DTYPES, ids=str)
@pytest.mark.parametrize("batch, heads, queries, keys, dim", SHAPES)
def test_attention_head_by_head(batch, heads, queries, keys, dim, dtype, monkeypatch, paths):
    """The shared tests' shapes, on the path of larger ones."""
    monkeypatch.setattr(attention, "_FEW", 0)
    harness.compare(fused(), eager(), inputs(batch, heads, queries, keys, dim), dtype, "aten")
    assert paths == ["_fwd_flash"]


@on_cpu
@pytest.mark.parametrize("arrange", LAYOUTS)
def test_attention_head_by_head_reads_every_layout(arrange, monkeypatch):
    monkeypatch.setattr(attention, "_FEW", 0)
    for dtype in (torch.float32, torch.bfloat16):
        tensors = inputs(2, 2, 33, 40, 40)
        harness.compare(fused(), eager(), tensors, dtype, "aten", arrange=arrange, arrange_upstream=arrange)


@on_cpu
def test_attention_in_several_blocks(monkeypatch):
    monkeypatch.setattr(attention, "_FEW", 0)
    monkeypatch.setattr(attention, "_BLOCK", 64)
    for dtype in (torch.float32, torch.bfloat16):
        harness.compare(fused(), eager(), inputs(1, 2, 150, 90, 40), dtype, "aten")


def test_attention_in_several_parts_of_the_queries(monkeypatch):
    """All heads together, as on other devices: dk and dv of the parts are added in float32."""
    monkeypatch.setattr(attention, "_SCORES", 2 * 2 * 90 * 40)
    for dtype in harness.DTYPES:
        harness.compare(fused(), eager(), inputs(2, 2, 150, 90, 40), dtype, "aten")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [harness.as_is, harness.channels_last])
def test_group_norm_of_many_pixels(layout, dtype):
    """Several runs of pixels, the last one short, are combined."""

    def norm(x, weight, bias, addend):
        return cnkernels.group_norm_silu(x, 4, weight, bias, addend=addend)

    def twin(x, weight, bias, addend):
        return F.silu(F.group_norm(x + addend[:, :, None, None], 4, weight, bias))

    pixels = 37 * 41
    tensors = [randn(2, 8, 37, 41, offset=0.5), randn(8), randn(8), randn(2, 8)]
    terms = {1: 2 * pixels, 2: 2 * pixels, 3: pixels}
    harness.compare(norm, twin, tensors, dtype, "aten", arrange=layout, reductions=terms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_geglu_in_several_slabs(dtype, monkeypatch):
    from cnkernels.geglu import aten_kernels as geglu

    monkeypatch.setattr(geglu, "_SLAB", 100)

    def twin(projected):
        value, gate = projected.chunk(2, -1)
        return value * F.gelu(gate)

    for arrange in (harness.as_is, harness.strided, lambda t: t.transpose(0, 1).contiguous().transpose(0, 1)):
        harness.compare(cnkernels.geglu, twin, [randn(5, 7, 2 * 30)], dtype, "aten", arrange=arrange)


@pytest.mark.parametrize("served", [(), (torch.float32,)], ids=["no-onednn", "no-bfloat16-products"])
def test_a_cpu_without_products_of_a_dtype_is_served(served, monkeypatch):
    monkeypatch.setattr(onednn, "_dtypes", lambda: frozenset(served))

    def twin(x, weight, bias, residual):
        return F.conv2d(x, weight, bias) + residual

    tensors = [randn(2, 16, 5, 7), randn(24, 16, 1, 1), randn(24), randn(2, 24, 5, 7)]
    for dtype in harness.DTYPES:
        for layout in (harness.as_is, harness.channels_last):
            terms = {1: 70, 2: 70}
            harness.compare(cnkernels.zero_conv_add, twin, tensors, dtype, "aten", arrange=layout, reductions=terms)
        harness.compare(fused(), eager(), inputs(1, 1, 30, 40, 16), dtype, "aten")


@pytest.mark.parametrize("op", dispatch.OPS)
def test_float64_is_left_to_the_reference(op):
    with cnkernels.backend("auto"):
        assert dispatch.select(op, torch.device("cpu"), torch.float64) == "reference"
    assert "float64" in dispatch.why_not(op, "aten", torch.device("cpu"), torch.float64)


PRODUCTS = {
    "linear": (onednn.linear, F.linear, 3),
    "linear_add": (onednn.linear_add, lambda x, w, b, r: r + F.linear(x, w, b), 4),
    "conv1x1": (
        lambda x, w, b: onednn.conv1x1(x.t()[None, :, :, None].contiguous(), w[:, :, None, None], b),
        lambda x, w, b: F.conv2d(x.t()[None, :, :, None].contiguous(), w[:, :, None, None], b),
        3,
    ),
    "conv1x1 without bias": (
        lambda x, w: onednn.conv1x1(x.t()[None, :, :, None].contiguous(), w[:, :, None, None]),
        lambda x, w: F.conv2d(x.t()[None, :, :, None].contiguous(), w[:, :, None, None]),
        2,
    ),
}


@on_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("depth", [320, onednn.CHAIN, 640, 1280, 5120])
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_s_error_does_not_grow_with_its_depth(name, depth, dtype):
    """oneDNN adds all products of an element in one chain; PyTorch's, by MKL, has half its error from 1000 on."""
    ours, peer, count = PRODUCTS[name]
    tensors = [t.to(dtype) for t in (randn(1000, depth), randn(24, depth), randn(24), randn(1000, 24))[:count]]
    judge = harness.Eager(peer, tensors, None)
    judge.assert_by_rule(0, name, ours(*tensors))


@on_cpu
@pytest.mark.parametrize("layout", [harness.as_is, harness.channels_last])
def test_zero_convolutions_of_many_channels(layout):
    tensors = [randn(2, 1280, 8, 8), randn(1280, 1280, 1, 1, scale=1280**-0.5), randn(1280), randn(2, 1280, 8, 8)]

    def twin(x, weight, bias, residual):
        return residual + F.conv2d(x, weight, bias)

    terms = {1: 128, 2: 128}
    harness.compare(cnkernels.zero_conv_add, twin, tensors, torch.float32, "aten", arrange=layout, reductions=terms)


@on_cpu
def test_gradients_of_attention_over_many_keys():
    harness.compare(fused(), eager(), inputs(1, 1, 80, 3000, 40), torch.float32, "aten")
