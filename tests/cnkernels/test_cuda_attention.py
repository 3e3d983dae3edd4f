"""The CUDA attention, within its two dtypes and five head dimensions."""

import math

import pytest
import torch

import cnkernels
from cnkernels import extension
from cnkernels.attention import cuda_kernels
from tests.cnkernels import harness, host_build
from tests.cnkernels.harness import DEVICE
from tests.cnkernels.test_attention import LAYOUTS, eager, fused, inputs

pytestmark = pytest.mark.cuda

HALVES = (torch.float16, torch.bfloat16)
LENGTHS = [  # Sq, Sk
    pytest.param(130, 130, id="self-ragged-tiles"),
    pytest.param(65, 77, id="text"),
    pytest.param(64, 64, id="one-tile"),
    pytest.param(1, 77, id="one-query"),
    pytest.param(77, 1, id="one-key"),
]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("queries, keys", LENGTHS)
@pytest.mark.parametrize("dim", cuda_kernels.HEAD_DIMS)
def test_equals_pytorch(dim, queries, keys, dtype):
    harness.compare(fused(), eager(), inputs(1, 2, queries, keys, dim), dtype, "cuda")


@pytest.fixture(params=[1, 1000], ids=["128-rows", "64-rows"])
def form(request):
    """Either size of the forward's blocks, whatever the number of multiprocessors would have chosen."""
    if DEVICE.type != "cpu":
        pytest.skip("a GPU has as many multiprocessors as it has")
    with host_build.execute_as(90, multiprocessors=request.param):
        yield 128 if request.param == 1 else 64


@pytest.mark.parametrize("queries, keys", [(200, 320), (257, 77)])
@pytest.mark.parametrize("dim", cuda_kernels.HEAD_DIMS)
def test_both_sizes_of_blocks(form, dim, queries, keys):
    """Keys that take the inner loop several times, and keys that end within a tile."""
    harness.compare(fused(), eager(), inputs(1, 2, queries, keys, dim), torch.float16, "cuda", backward=False)
    (launched,) = extension.module_for(DEVICE).launches()
    assert launched[1] == 2 * math.ceil(queries / form)


@pytest.mark.parametrize("scale", [0.0, -0.3, -1e-20, 1e-38])
def test_scale_of_either_sign_in_both_sizes(form, scale):
    harness.compare(fused(scale), eager(scale), inputs(1, 2, 150, 300, 40), torch.float16, "cuda", backward=False)


@pytest.mark.parametrize("arrange", LAYOUTS)
@pytest.mark.parametrize("dim", [40, 160])
def test_inputs_are_read_where_they_are(dim, arrange):
    out, *_ = harness.compare(
        fused(), eager(), inputs(2, 2, 33, 40, dim), torch.float16, "cuda", arrange=arrange, arrange_upstream=arrange
    )
    assert out.is_contiguous()


@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, -0.3])
def test_scale(scale):
    harness.compare(fused(scale), eager(scale), inputs(1, 1, 20, 36, 40), torch.bfloat16, "cuda")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_large_logits(dtype):
    """Rows whose maximum grows from key to key, and logits of some hundreds: exp must never overflow."""
    q, k, v = inputs(1, 1, 70, 150, 40, scale=8.0)
    k = k * torch.linspace(0.1, 2.0, 150, dtype=k.dtype, device=k.device)[None, :, None, None]
    harness.compare(fused(), eager(), [q, k, v], dtype, "cuda")


@pytest.mark.parametrize("poisoned", ["q", "k", "v"])
def test_nan_goes_where_pytorch_has_it(poisoned):
    tensors = dict(zip("qkv", inputs(1, 2, 40, 70, 40), strict=True))
    tensors[poisoned][0, 3, 1, 5] = torch.nan
    harness.compare(fused(), eager(), list(tensors.values()), torch.float16, "cuda")


def test_log_sum_exp():
    q, k, v = (t.half() for t in inputs(2, 3, 33, 77, 40))
    with cnkernels.backend("cuda"):
        _, lse = torch.ops.cnkernels.attention(q, k, v, 0.2)
    exact = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()).mul(0.2).logsumexp(-1)
    assert lse.dtype == torch.float32 and lse.shape == (2, 3, 33)
    torch.testing.assert_close(lse.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dim", [40, 160])
def test_each_gradient_alone_is_the_same(dim):
    """A frozen cross-attention asks for dq alone; at 160 dk and dv are never computed together."""
    q, k, v = (t.half() for t in inputs(1, 2, 70, 77, dim))
    out, lse = cuda_kernels.attention_fwd(q, k, v, 0.1)
    dout = torch.randn_like(out)
    together = cuda_kernels.attention_bwd(dout, q, k, v, out, lse, 0.1, (True, True, True))
    for index in range(3):
        need = tuple(i == index for i in range(3))
        alone = cuda_kernels.attention_bwd(dout, q, k, v, out, lse, 0.1, need)
        assert [g is not None for g in alone] == list(need)
        assert torch.equal(alone[index], together[index])


def test_repeatable_bit_for_bit():
    tensors = [t.half() for t in inputs(1, 2, 100, 90, 80)]
    upstream = torch.randn_like(tensors[0])
    with cnkernels.backend("cuda"):
        harness.assert_repeatable(lambda: harness.run(fused(), tensors, upstream))


@pytest.mark.parametrize("dtype, dim", [(torch.float32, 40), (torch.float16, 48)])
def test_what_it_does_not_serve_is_refused(dtype, dim):
    q, k, v = (t.to(dtype) for t in inputs(1, 1, 8, 8, dim))
    with cnkernels.backend("cuda"), pytest.raises(ValueError, match="backend 'cuda' is forced, but"):
        cnkernels.attention(q, k, v)
