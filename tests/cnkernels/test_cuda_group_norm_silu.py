"""The forms of the CUDA group norm that the shared tests do not choose: every cut into blocks gives the same answer."""

from types import SimpleNamespace

import pytest
import torch

from cnkernels import extension
from cnkernels.group_norm_silu import cuda_kernels
from tests.cnkernels import harness
from tests.cnkernels.harness import DEVICE, randn
from tests.cnkernels.test_group_norm_silu import eager, fused

pytestmark = pytest.mark.skipif(
    extension.module_for(DEVICE) is None, reason=extension.why_host_absent() or "no CUDA extension"
)

SHAPES = [
    pytest.param((2, 40, 8, 16), 4, id="sector-wide-spans"),
    pytest.param((1, 24, 5, 40), 3, id="span-of-all-channels"),
    pytest.param((1, 16, 1, 8), 2, id="fewer-positions-than-blocks"),
]


def force(monkeypatch, form: str, blocks: int) -> None:
    """Makes the plan take one form, with as many blocks per slab as it may."""
    monkeypatch.setattr(cuda_kernels, "_has_clusters", lambda library, device: form == "cluster")
    monkeypatch.setattr(extension, "multiprocessors", lambda device: blocks)


@pytest.mark.parametrize("form, blocks", [("portable", 1), ("portable", 100), ("cluster", 1), ("cluster", 100)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", harness.DTYPES, ids=str)
@pytest.mark.parametrize("shape, groups", SHAPES)
def test_every_form_keeps_the_rule(monkeypatch, shape, groups, dtype, layout, form, blocks):
    force(monkeypatch, form, blocks)
    channels = shape[1]
    inputs = [randn(*shape), randn(channels), randn(channels), randn(*shape[:2])]
    arrange = harness.channels_last if layout == "channels_last" else harness.as_is
    pixels = shape[2] * shape[3]
    reductions = {1: shape[0] * pixels, 2: shape[0] * pixels, 3: pixels}
    harness.compare(fused(groups), eager(groups), inputs, dtype, "cuda", arrange=arrange, reductions=reductions)


@pytest.mark.parametrize("form", ["portable", "cluster"])
def test_the_plan_takes_the_form(monkeypatch, form):
    force(monkeypatch, form, 100)
    x = harness.channels_last(torch.randn(1, 320, 64, 64, dtype=torch.float16, device=DEVICE))
    library = extension.module_for(DEVICE)
    cut = cuda_kernels.plan(library, x, 32, library.group_norm_silu_fwd_shared, (x,))
    assert cut.cluster == (form == "cluster")
    assert cut.span == 80  # whole groups of 10 and whole 32-byte sectors
    if form == "cluster":
        assert cut.splits == 8
        assert library.group_norm_silu_fwd_shared(library.Dtype.float16, cut) <= 227 * 1024


def test_a_slab_over_the_shared_memory_takes_the_portable_form(monkeypatch):
    force(monkeypatch, "cluster", 100)
    x = torch.empty(1, 128, 512, 512, dtype=torch.float16, device="meta")  # the VAE's
    library = extension.module_for(DEVICE)
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda tensor: 0)
    cut = cuda_kernels.plan(library, x, 32, library.group_norm_silu_fwd_shared, (x,))
    assert not cut.cluster
    assert cut.splits > 1


@pytest.mark.parametrize("trained", [True, False])
def test_gradients_nobody_asked_for_are_not_computed(trained):
    x, dy = (randn(1, 16, 4, 8).float() for _ in range(2))
    weight, bias = randn(16).float(), randn(16).float()
    _, mean, rstd = cuda_kernels.group_norm_silu_fwd(x, 2, weight, bias, 1e-5, "silu", None)
    need = (not trained, trained, False, False)
    gradients = cuda_kernels.group_norm_silu_bwd(dy, x, 2, weight, bias, mean, rstd, "silu", None, need)
    assert tuple(g is not None for g in gradients) == need


@pytest.mark.parametrize(
    "architectures, capability, expected",
    [("80;90a", (9, 0), True), ("80;90a", (10, 0), True), ("80", (9, 0), False), ("80;90a", (8, 0), False)],
)
def test_clusters_need_a_gpu_and_a_build_that_have_them(monkeypatch, architectures, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    library = SimpleNamespace(architectures=architectures)
    assert cuda_kernels._has_clusters(library, torch.device("cuda", 0)) == expected
