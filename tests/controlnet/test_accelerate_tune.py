"""`accelerate(pipe, tune=True)`: the first image checks and measures the calls of its models, and does not change."""

import functools

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

import controlnet  # noqa: E402
from cnkernels import cache, findings, machine  # noqa: E402
from cnkernels.tune import tune  # noqa: E402
from tests.controlnet.diffusers_models import SMALL, draw, image, pipeline, prompt  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts what is measured on a CPU")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CNKERNELS_CACHE", str(tmp_path))
    findings.forget()
    yield
    monkeypatch.undo()
    findings.forget()


def test_the_first_image_measures_and_the_second_does_not(monkeypatch):
    monkeypatch.setattr("cnkernels.check.ensure", lambda ops, dtypes, device: [])  # tested beside it
    monkeypatch.setattr("cnkernels.tune.first_call.tune", functools.partial(tune, rounds=1, most=0))
    pipe = pipeline(**SMALL)
    arguments = prompt(image=image(), num_inference_steps=2)
    expected = draw(controlnet.accelerate(pipe), **arguments)
    controlnet.accelerate(pipe, tune=True)
    assert all(hooks for hooks in (pipe.unet._forward_pre_hooks, pipe.controlnet._forward_pre_hooks))
    torch.testing.assert_close(draw(pipe, **arguments), expected)
    first = cache.read(machine.identity(torch.device("cpu")))["choices"]
    assert set(first) == {"attention", "geglu", "group_norm_silu", "zero_conv_add"}
    assert all(entry["direction"] == "forward" for entries in first.values() for entry in entries)
    controlnet.accelerate(pipe, tune=True)
    torch.testing.assert_close(draw(pipe, **arguments), expected)
    assert cache.read(machine.identity(torch.device("cpu")))["choices"] == first


def test_restore_leaves_nothing_of_it():
    pipe = pipeline()
    controlnet.restore(controlnet.accelerate(pipe, tune=True))
    assert not pipe.unet._forward_pre_hooks and not pipe.controlnet._forward_pre_hooks
