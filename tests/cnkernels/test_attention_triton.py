"""The Triton kernels of attention: column blocks, tiles of keys, launch settings of each GPU, edges of tensors."""

import os
import subprocess
import sys

import pytest
import torch

import cnkernels
from cnkernels import dispatch
from tests.cnkernels import harness
from tests.cnkernels.guards import guarded_empty
from tests.cnkernels.harness import DEVICE, DTYPES, randn
from tests.cnkernels.test_attention import eager, fused, heads_first, inputs, packed

REASON = dispatch.why_not("attention", "triton", DEVICE, torch.float32)
if REASON is not None:
    pytest.skip(REASON, allow_module_level=True)

from cnkernels.attention import triton_backward, triton_common, triton_forward, triton_kernels  # noqa: E402

CAPABILITIES = (8, 9, 10, 12)


def compare(tensors, dtype=torch.float16, scale=None, **options):
    return harness.compare(fused(scale), eager(scale), tensors, dtype, "triton", **options)


@pytest.fixture
def capability(request, monkeypatch):
    """Launches as on a GPU of this major compute capability; without a GPU alone, whose limits they respect."""
    if DEVICE.type == "cuda":
        pytest.skip("a GPU launches what its own capability says")
    monkeypatch.setattr(triton_kernels, "compute_capability", lambda tensor: request.param)
    return request.param


@pytest.mark.parametrize("widest", [16, 32, 256])
def test_column_blocks_cover_with_less_than_double(widest):
    for size in range(1, 257):
        blocks = triton_common.column_blocks(size, widest)
        assert all(block in (16, 32, 64, 128, 256) and block <= widest for block in blocks)
        assert list(blocks) == sorted(blocks, reverse=True)
        assert sum(blocks[:-1]) < size <= sum(blocks)
    assert [sum(triton_common.column_blocks(d, widest)) for d in (40, 80, 160)] == [48, 80, 160]


@pytest.mark.parametrize("dim", [8, 16, 24, 48, 56, 64, 72, 96, 104, 120, 128, 192, 256])
def test_every_head_dimension(dim):
    compare(inputs(1, 2, 17, 19, dim))


@pytest.mark.parametrize("dim", [5, 20])
def test_head_dimension_that_fills_no_16_bytes(dim):
    compare(inputs(1, 2, 17, 19, dim))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keys", [257, 320])  # a last tile of one key, and none
def test_keys_that_stream(keys, dtype):
    compare(inputs(1, 1, 65, keys, 40), dtype)


@pytest.mark.parametrize("capability", CAPABILITIES, indirect=True)
@pytest.mark.parametrize("dim", [40, 64, 80, 160, 256])
def test_tiles_of_each_gpu(dim, capability):
    compare(inputs(1, 1, 33, 300, dim))


@pytest.mark.parametrize("dim", [40, 64, 72, 168])
def test_long_tiles_once_there_are_many(dim, monkeypatch):
    """The tiles of many programs, on two of them: the interpreter runs one after the other."""
    config = triton_forward.forward_config
    monkeypatch.setattr(triton_forward, "forward_config", lambda shape, *rest: config((32, 150, 8, dim), *rest))
    assert triton_forward.forward_config((1, 150, 1, dim), 300, 2, 9).block_m == 128
    compare(inputs(1, 1, 150, 300, dim), backward=False)


@pytest.mark.parametrize("capability", [8, 9], indirect=True)
def test_wide_heads_with_256_keys(capability):
    """One tile where matrix units read shared memory, several where they read registers."""
    compare(inputs(1, 1, 20, 256, 160))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("growth", [0.5, 4.0, 60.0], ids=["never-rescaled", "rescaled-at-times", "at-every-tile"])
def test_row_maximum_that_moves_between_tiles(growth, dtype):
    """Scores grow with every tile: under 2^8 an old maximum stays, far beyond it P would overflow float16."""
    q, k, v = inputs(1, 1, 40, 400, 80, scale=0.3)
    q[..., 0] = 80**0.5
    k[..., 0] = growth * (torch.arange(400, device=DEVICE) // 64)[None, :, None]
    compare([q, k, v], dtype, backward=False)


@pytest.mark.parametrize("keys", [70, 300])
def test_scores_of_minus_infinity(keys):
    """A first tile of keys that nothing attends to, and rows that attend to nothing."""
    q, k, v = inputs(1, 1, 40, keys, 40)
    q[..., 0] = 1.0
    k[:, :65, :, 0] = -torch.inf
    compare([q, k, v], backward=False)
    k[..., 0] = -torch.inf
    out = compare([q, k, v], backward=False)[0]
    assert out.isnan().all()


def test_more_scores_than_scale_leaves():
    """A scale of 0 with absent keys in the last tile: 0 * -inf must not appear."""
    compare(inputs(1, 1, 20, 300, 40), torch.float16, 0.0)
    compare(inputs(1, 1, 20, 70, 40), torch.float16, 0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_keys_share_out_the_queries(dtype):
    block = triton_backward.key_config(16, dtype.itemsize, 9).block_m
    assert triton_backward.split_queries(600, 1, block)[1] > 1
    tensors = inputs(1, 1, 600, 7, 16)
    compare(tensors, dtype, reductions={1: 600, 2: 600})
    upstream = randn(1, 600, 1, 16).to(dtype)
    with cnkernels.backend("triton"):
        harness.assert_repeatable(lambda: harness.run(fused(), [t.to(dtype) for t in tensors], upstream))


def test_split_covers_every_query():
    for queries in (1, 64, 255, 256, 4096, 4097):
        for programs in (1, 16, 127, 128, 5000):
            split, parts = triton_backward.split_queries(queries, programs, 64)
            assert split % 64 == 0 and split * (parts - 1) < queries <= split * parts
            assert parts == 1 or (split >= 256 and programs < 128)


@pytest.mark.parametrize("arrange", [packed, heads_first, harness.misaligned])
def test_strided_inputs_that_stream(arrange):
    compare(inputs(2, 2, 33, 290, 40), arrange=arrange, arrange_upstream=arrange)


def test_strides_count_16_bytes_where_they_can():
    """Without this, rows of 40 columns would be loaded two bytes at a time."""
    projection = torch.zeros(2, 5, 3, 8, 40, dtype=torch.float16)
    assert triton_common.alignment(*projection.unbind(2)) == 8
    assert triton_common.strides(projection[:, :, 0], 8) == (600, 120, 5)
    assert triton_common.alignment(projection.float()[:, :, 0]) == 4
    assert triton_common.alignment(torch.zeros(2, 5, 8, 20, dtype=torch.float16)) == 1
    assert triton_common.strides(torch.zeros(1, 5, 1, 20)) == (0, 20, 0)


@pytest.mark.parametrize("shape", [(1, 2, 65, 77, 40), (1, 1, 33, 290, 40), (1, 1, 300, 9, 24)])
def test_nothing_is_written_outside(shape):
    tensors = [t.half() for t in inputs(*shape)]
    upstream = randn(shape[0], shape[2], shape[1], shape[4]).half()
    with cnkernels.backend("triton"), guarded_empty():
        results = harness.run(fused(), tensors, upstream)
    assert all(result.isfinite().all() for result in results)


def test_one_binary_serves_every_size_scale_and_layout():
    """In a process of its own: interpreted kernels are never compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.cnkernels.attention_binaries"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    first, *others, text, more_text = (line.split() for line in done.stdout.splitlines())
    assert first == ["_attention_fwd_kernel", "_attention_bwd_query_kernel", "_attention_bwd_key_kernel"]
    assert others == [[], []]
    assert text == ["_attention_fwd_single_kernel", "_attention_bwd_key_kernel", "_attention_bwd_sum_kernel"]
    assert more_text == []
