"""The CUDA group norm in configurations that the shared tests do not reach: every split into blocks agrees."""

import math
from types import SimpleNamespace

import pytest
import torch

from cnkernels import extension
from cnkernels.group_norm_silu import cuda_kernels
from tests.cnkernels import harness, host_build
from tests.cnkernels.harness import DEVICE, randn
from tests.cnkernels.test_group_norm_silu import eager, fused

pytestmark = pytest.mark.cuda

CPU = torch.device("cpu")
needs_host = pytest.mark.skipif(DEVICE.type != "cpu", reason="the build for the CPU stands for other GPUs")

SHAPES = [
    pytest.param((2, 40, 8, 16), 4, id="sector-wide-spans"),
    pytest.param((1, 24, 5, 40), 3, id="span-of-all-channels"),
    pytest.param((1, 16, 1, 8), 2, id="fewer-positions-than-blocks"),
]


@pytest.fixture
def force(monkeypatch):
    """Makes the plan take one form, with as many blocks per slab as it may."""

    def take(form: str, blocks: int) -> None:
        limits = SimpleNamespace(multiprocessors=blocks, max_cluster=8 if form == "cluster" else 1, capability=90)
        monkeypatch.setattr(extension, "limits", lambda device: limits)

    return take


@pytest.mark.parametrize("form, blocks", [("portable", 1), ("portable", 100), ("cluster", 1), ("cluster", 100)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", harness.DTYPES, ids=str)
@pytest.mark.parametrize("shape, groups", SHAPES)
def test_every_form_keeps_the_rule(force, shape, groups, dtype, layout, form, blocks):
    force(form, blocks)
    channels = shape[1]
    inputs = [randn(*shape), randn(channels), randn(channels), randn(*shape[:2])]
    arrange = harness.channels_last if layout == "channels_last" else harness.as_is
    pixels = shape[2] * shape[3]
    reductions = {1: shape[0] * pixels, 2: shape[0] * pixels, 3: pixels}
    harness.compare(fused(groups), eager(groups), inputs, dtype, "cuda", arrange=arrange, reductions=reductions)


# Every group norm of SD 1.5, 2.1 and SDXL, and two of the VAE: channels, side.
SHAPES_OF_SD = [
    *((c, 128) for c in (320, 640, 960)), *((c, 64) for c in (320, 640, 960, 1280, 1920)),
    *((c, 32) for c in (320, 640, 960, 1280, 1920, 2560)), *((c, 16) for c in (640, 1280, 1920, 2560)),
    *((c, 8) for c in (1280, 2560)), (128, 512), (512, 64),
]  # fmt: skip
CAPABILITIES = (80, 86, 89, 90, 100, 120)


@pytest.fixture
def meta_addresses(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda tensor: 0)


@pytest.fixture
def plan_on(meta_addresses, monkeypatch):
    """The plan of channels_last float16 [N, C, H, W], on a GPU with so many multiprocessors."""
    library = extension.module_for(CPU)
    monkeypatch.setattr(extension, "limits", lambda device: library.limits_of(library.Place()))

    def plan(shape, capability, multiprocessors=0, direction="fwd", memory_format=torch.channels_last):
        x = torch.empty(shape, dtype=torch.float16, device="meta", memory_format=memory_format)
        with host_build.execute_as(capability, multiprocessors):
            return cuda_kernels.plan(library, x, 32, direction, (x,))

    return plan


def plans(dtype=torch.float16):
    library = extension.module_for(CPU)
    for channels, side in SHAPES_OF_SD:
        for samples in (1, 2, 16):
            for memory_format in (torch.contiguous_format, torch.channels_last):
                x = torch.empty(samples, channels, side, side, dtype=dtype, device="meta", memory_format=memory_format)
                for direction in ("fwd", "bwd"):
                    cut = cuda_kernels.plan(library, x, 32, direction, (x,))
                    place = library.Place()
                    fit = getattr(library, f"group_norm_silu_{direction}_fit")(place, library.Dtype.float16, cut)
                    yield (samples, channels, side, memory_format, direction), cut, fit


@needs_host
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_plan_is_within_the_limits_of_its_architecture(plan_on, capability):
    clusters = 0
    with host_build.execute_as(capability):
        limits = extension.limits(CPU)
        for shape, cut, fit in plans():
            if cut.cluster:
                clusters += 1
                assert fit.clusters > 0 and fit.shared_bytes <= limits.shared_per_block, shape
                assert cut.splits <= limits.max_cluster, shape
            slabs = cut.samples * math.ceil(cut.channels / cut.span)
            assert cut.span % (cut.channels // cut.groups) == 0, shape
            assert slabs * cut.splits <= 2**31 - 1
    assert (clusters > 0) == (limits.max_cluster > 1)


@needs_host
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_largest_plans_of_a_step_run(capability, layout):
    """At its own limits, on a quarter of the shape that was over those of sm_120: 320 channels at 64 x 64."""
    x = torch.randn(1, 80, 64, 64, dtype=torch.float16)
    x = harness.channels_last(x) if layout == "channels_last" else x
    with host_build.execute_as(capability):
        y, mean, rstd = cuda_kernels.group_norm_silu_fwd(x, 8, None, None, 1e-5, "silu", None)
        dx, *_ = cuda_kernels.group_norm_silu_bwd(
            y, x, 8, None, None, mean, rstd, "silu", None, (True, False, False, False)
        )
    expected = torch.nn.functional.silu(torch.nn.functional.group_norm(x.double(), 8))
    torch.testing.assert_close(y.double(), expected, rtol=2e-3, atol=2e-3)
    assert dx.isfinite().all()


@needs_host
@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_batch_two_fills_the_gpu(plan_on, direction):
    """320 channels at 64 x 64: spans of 80 channels would be 64 blocks on 132 multiprocessors."""
    cut = plan_on((2, 320, 64, 64), 90, direction=direction)
    assert (cut.cluster, cut.span, cut.splits) == (True, 40, 8)  # 128 blocks
    cut = plan_on((16, 320, 64, 64), 90, direction=direction)
    assert (cut.cluster, cut.span) == (True, 80)  # whole sectors, where that is enough
    assert cut.splits * 64 >= 132


@needs_host
@pytest.mark.parametrize("capability", [80, 90])
def test_the_plan_takes_the_form(plan_on, capability):
    cut = plan_on((1, 320, 64, 64), capability, multiprocessors=30)
    assert cut.cluster == (capability == 90)
    assert cut.span == 80  # whole groups of 10 and whole 32-byte sectors


@needs_host
def test_a_slab_over_the_shared_memory_takes_the_portable_form(plan_on):
    cut = plan_on((1, 128, 512, 512), 90, memory_format=torch.contiguous_format)  # the VAE's
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
    [("80;90a", 90, True), ("80;90a", 100, True), ("80", 90, False), ("80;90a", 80, False)],
)
def test_clusters_need_a_gpu_and_a_build_that_have_them(architectures, capability, expected):
    library = SimpleNamespace(architectures=architectures)
    limits = SimpleNamespace(capability=capability, max_cluster=8 if capability >= 90 else 1)
    assert cuda_kernels._has_clusters(library, limits) == expected
