"""An ordinary training step never waits for the device."""

import pytest
import torch
from omegaconf import OmegaConf

from controlnet.training.distributed import World
from controlnet.training.encoding import encode
from tests.controlnet import tiny_run, tiny_sdxl
from tests.controlnet.waiting import begun, waits


def started(folder, *overrides, world=None):
    """A run in the middle of `fit`, one step done."""
    return begun(tiny_run.trainer(tiny_run.configuration(folder, "trainer.max_steps=100", *overrides), world))


OPTIONS = {
    "float32": [],
    "bf16, average, clipping": ["trainer.precision=bf16", "exp_manager.ema.enable=True", "trainer.gradient_clip_val=1"],
    "fp16, micro-batches, channels_last": [
        "trainer.precision=16",
        "trainer.accumulate_grad_batches=2",
        "model.channels_last=True",
        "model.sd_locked=False",
    ],
}


@pytest.mark.parametrize("overrides", OPTIONS.values(), ids=OPTIONS)
def test_no_wait_in_an_ordinary_step(tmp_path, overrides):
    run = started(tmp_path, "trainer.log_every_n_steps=100", *overrides)
    assert waits(run, 3) == []
    assert run._settle() and run.step == 4


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return tiny_sdxl.pipeline(tmp_path_factory.mktemp("sdxl") / "pipeline")


@pytest.mark.parametrize("captions", ["images", "tokens", "states"])
def test_no_wait_in_a_step_of_stable_diffusion_xl(pipeline, tmp_path, captions):
    """On images and on encoded shards, in bf16, with two text encoders, pooled vectors and time ids."""
    ordinary = [f"trainer.{name}=100" for name in ("log_every_n_steps", "max_steps")]
    ordinary += ["model.image_logger.max_images=0", "trainer.precision=bf16"]
    ordinary += ["model.offset_noise=0.1", "model.min_snr_gamma=5", "trainer.accumulate_grad_batches=2"]
    cfg = tiny_sdxl.configuration(pipeline, tmp_path, *ordinary, "model.global_batch_size=4")
    if captions != "images":
        OmegaConf.save(cfg, tmp_path / "config.yaml")
        encode(tmp_path / "config.yaml", tmp_path / "encoded", states=captions == "states")
        cfg.data.train.dataset_path = [str(path) for path in (tmp_path / "encoded").glob("*.tar")]
    run = begun(tiny_sdxl.trainer(cfg))
    assert waits(run, 3) == []
    assert run._settle() and run.step == 4 and ("images" in run._latest[0]) == (captions == "images")


def test_a_logged_step_does_wait(tmp_path):
    run = started(tmp_path, "trainer.log_every_n_steps=1")
    assert {"tolist", "item"} <= set(waits(run, 1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("overrides", OPTIONS.values(), ids=OPTIONS)
def test_no_synchronisation_on_a_gpu(tmp_path, overrides):
    world = World(0, 1, 0, torch.device("cuda"))
    run = started(tmp_path, "trainer.log_every_n_steps=100", *overrides, world=world)
    run._advance()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            run._advance()
    finally:
        torch.cuda.set_sync_debug_mode("default")
