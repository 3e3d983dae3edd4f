"""Real photographs through the same training: JPEG shards with a computed segmentation as hint."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from controlnet import config, train
from controlnet.checkpoints import read
from controlnet.data import build_loader
from tests.controlnet import tiny_run
from tests.controlnet.shard_files import jpeg, png, write_tar

skimage = pytest.importorskip("skimage")

PHOTOGRAPHS = ["coffee", "astronaut", "chelsea", "rocket", "hubble_deep_field", "immunohistochemistry"]


def segmented(photograph):
    """Each of about 60 superpixels in its mean colour, uint8 [H, W, 3]."""
    from skimage.color import label2rgb
    from skimage.segmentation import slic

    segments = slic(photograph, n_segments=60, start_label=1)
    return label2rgb(segments, photograph, kind="avg", bg_label=-1).astype(np.uint8)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Two shards of three photographs each, at about a quarter of their size."""
    folder = tmp_path_factory.mktemp("photographs")
    for number in (0, 1):
        files = []
        for name in PHOTOGRAPHS[number::2]:
            photograph = np.ascontiguousarray(getattr(skimage.data, name)()[::4, ::4, :3])
            caption = f"a photograph of {name}".encode()
            parts = {"jpg": jpeg(photograph), "txt": caption, "png": png(segmented(photograph))}
            files += [(f"{name}.{extension}", content) for extension, content in parts.items()]
        write_tar(folder / f"{number}.tar", files)
    return folder


CROPS = ["data.train.augmentations={resize_smallest_side: 72, random_crop_h_w: 64, horizontal_flip: 0.5}"]
BUCKETS = [
    "data.train.augmentations={horizontal_flip: 0.5}",
    "data.train.buckets={sizes: ['64, 64', '56, 80'], random_crop: true}",
]


def data_overrides(shards, crops=CROPS):
    return [f"data.train.dataset_path=['{shards}/{{0..1}}.tar']", *crops]


def test_photographs_and_their_segmentations_stay_together(shards, tmp_path):
    cfg = tiny_run.configuration(tmp_path, *data_overrides(shards))
    loader = build_loader(cfg.data, factor=2, batch_size=6, seed=0)
    (batch,) = list(loader)
    assert sorted(batch["keys"]) == sorted(PHOTOGRAPHS)
    assert loader.drops == {}
    images, hints = (batch["images"] + 1) / 2, batch["hint"]
    together = (images - hints).square().mean((1, 2, 3))
    for apart in (hints.flip(3), hints.roll(12, 3), hints.roll(12, 2)):
        assert (together < (images - apart).square().mean((1, 2, 3))).all()


def write_base(path, cfg):
    """A U-Net without zero layers, as a trained one is, so that the control can be seen in what it predicts."""
    unet = tiny_run.trainer(cfg).model.unet.state_dict()
    save_file({f"model.diffusion_model.{name}": tensor for name, tensor in unet.items()}, path)


def test_they_run_through_training(shards, tmp_path):
    base = tmp_path / "base.safetensors"
    write_base(base, tiny_run.configuration(tmp_path))
    (tmp_path / "photographs.yaml").write_text(json.dumps(tiny_run.BASE))  # JSON is YAML
    folder = tmp_path / "run"
    overrides = [*data_overrides(shards), f"exp_manager.explicit_log_dir={folder}", "trainer.max_steps=4"]
    overrides += [f"model.unet_config.from_pretrained={base}"]
    train.main(["--config", str(tmp_path / "photographs.yaml"), *overrides])
    rows = tiny_run.rows(folder)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(np.isfinite(row["loss"]) and row["dropped_samples"] == 0 for row in rows)
    assert 0 < rows[0]["control_sensitivity"] < rows[-1]["control_sensitivity"]  # it began to listen
    control = read(folder / "checkpoints" / "step-00000004" / "control.safetensors")
    assert control["control_model.input_hint_block.0.weight"].shape[1] == 3
    assert control["control_model.zero_convs.0.0.weight"].abs().max() > 0
    assert all(torch.isfinite(tensor).all() for tensor in control.values())
    assert config.load(folder / "checkpoints" / "step-00000004" / "config.yaml").trainer.max_steps == 4


@pytest.mark.parametrize(("num_workers", "crops"), [(0, CROPS), (2, CROPS), (0, BUCKETS)])
def test_a_run_over_shards_resumed_twice_is_the_run_in_one_go(shards, tmp_path, num_workers, crops):
    base = tmp_path / "base.safetensors"
    write_base(base, tiny_run.configuration(tmp_path))
    (tmp_path / "photographs.yaml").write_text(json.dumps(tiny_run.BASE))

    def run(folder, steps):
        settings = [f"exp_manager.explicit_log_dir={folder}", f"trainer.max_steps={steps}"]
        settings += [f"model.unet_config.from_pretrained={base}", f"data.num_workers={num_workers}"]
        settings += ["exp_manager.resume_if_exists=True"]
        train.main(["--config", str(tmp_path / "photographs.yaml"), *data_overrides(shards, crops), *settings])
        return read(folder / "checkpoints" / f"step-{steps:08d}" / "control.safetensors")

    whole = run(tmp_path / "whole", 7)  # more than two epochs of three batches
    for steps in (2, 5):
        run(tmp_path / "parts", steps)
    parts = run(tmp_path / "parts", 7)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())


def test_a_portrait_with_the_turn_of_a_phone_stays_with_its_hint(tmp_path):
    """The camera stores the sensor's rows; the hint is made of what a person sees."""
    from PIL import Image

    photograph = np.ascontiguousarray(skimage.data.astronaut()[::4, 16:-16:4, :3])
    seen = Image.fromarray(photograph)
    exif = Image.Exif()
    exif[0x0112] = 8
    seen.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "stored.jpg", exif=exif, quality=95)
    parts = {"jpg": (tmp_path / "stored.jpg").read_bytes(), "txt": b"an astronaut", "png": png(segmented(photograph))}
    write_tar(tmp_path / "0.tar", [(f"a.{extension}", content) for extension, content in parts.items()])
    cfg = tiny_run.configuration(tmp_path, f"data.train.dataset_path=[{tmp_path}/0.tar]", *CROPS)
    loader = build_loader(cfg.data, factor=2, batch_size=1, seed=0)
    (batch,) = list(loader)
    image, hint = (batch["images"] + 1) / 2, batch["hint"]
    together = (image - hint).square().mean()
    for turned in (hint.flip(2), hint.flip(3), hint.rot90(1, (2, 3)), hint.rot90(2, (2, 3)), hint.rot90(3, (2, 3))):
        assert together < (image - turned).square().mean()
    assert loader.drops == {}
