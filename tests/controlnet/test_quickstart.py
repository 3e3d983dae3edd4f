"""The quickstart: its scenes and scores, its shards, its base, and the whole of it in a few steps."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from controlnet import build, checkpoints, config
from controlnet.data import build_loader
from controlnet.quickstart import __main__ as quickstart
from controlnet.quickstart import make_base
from controlnet.quickstart.make_base import BASE, CONFIG
from controlnet.quickstart.plot import LEFT, loss_curve
from controlnet.quickstart.scenes import (
    CLASSES,
    FOREGROUND,
    HINT_COLOURS,
    LOOKS,
    caption_score,
    control_score,
    recognise,
    scene,
    vocabulary,
)
from controlnet.quickstart.shards import held_out, write_shards
from tests.controlnet import tiny_run


@pytest.fixture(scope="module")
def cfg():
    weights = [f"model.{part}.from_pretrained={BASE}" for part in ("unet_config", "cond_stage_config")]
    return config.load(CONFIG, weights)


@pytest.fixture(scope="module")
def scenes():
    return held_out(40)


class TestScenes:
    def test_are_a_function_of_the_seed(self):
        one, other = (scene(np.random.default_rng(seed)) for seed in (3, 3))
        assert (one[0] == other[0]).all() and one[1] == other[1] and (one[2] == other[2]).all()
        assert (one[0] != scene(np.random.default_rng(4))[0]).any()

    def test_captions_name_the_look_of_what_is_there(self, scenes):
        for labels, caption in zip(scenes.labels, scenes.captions, strict=True):
            words = caption.replace(",", "").split()
            assert set(words) <= set(vocabulary()) and len(words) <= 16
            for label, name in enumerate(CLASSES):
                looks = [word for word in LOOKS[name] if word in words]
                assert len(looks) == (labels == label).any()
                assert (name in words) == (name != "ground" and len(looks) == 1)

    def test_every_word_occurs_and_the_configuration_knows_them(self, cfg):
        captions = [scene(np.random.default_rng(seed))[1] for seed in range(200)]
        assert {word for caption in captions for word in caption.replace(",", "").split()} == set(vocabulary())
        assert list(cfg.model.cond_stage_config.vocabulary) == vocabulary()

    def test_the_hint_tells_no_look(self):
        colours = {tuple(colour) for colour in HINT_COLOURS.tolist()}
        looks = {colour for of_class in LOOKS.values() for pair in of_class.values() for colour in pair}
        assert len(colours) == len(CLASSES) and not colours & looks


class TestScores:
    def test_the_scenes_themselves_are_perfect(self, scenes):
        pixels = scenes.images.permute(0, 2, 3, 1).numpy()
        labels, _ = recognise(pixels)
        assert (labels == scenes.labels).mean() > 0.999
        assert control_score(scenes.labels, pixels) > 0.999
        assert caption_score(scenes.labels, scenes.captions, pixels) == 1.0

    def test_other_scenes_are_not(self, scenes):
        pixels = scenes.images.permute(0, 2, 3, 1).numpy()
        others = np.roll(pixels, 1, axis=0)
        assert control_score(scenes.labels, others) < 0.2
        assert caption_score(scenes.labels, scenes.captions, others) < 0.4
        assert control_score(scenes.labels, np.zeros_like(pixels)) == 0

    def test_the_control_score_by_hand(self):
        labels = np.zeros((2, 4, 4), dtype=np.uint8)
        images = np.zeros((2, 4, 4, 3))
        images[:] = LOOKS["sky"]["night"][0]
        labels[0, :2] = CLASSES.index("house")  # 8 pixels, of which 4 are drawn, and 4 more elsewhere: 4 / 12
        images[0, 1:3] = LOOKS["house"]["stone"][0]
        labels[1, 0] = CLASSES.index("tree")  # all of 4: 1
        images[1, 0] = LOOKS["tree"]["autumn"][1]
        labels[1, 3] = CLASSES.index("balloon")  # drawn as a tree instead: 0 / 4, and for the tree 4 / 8
        images[1, 3] = LOOKS["tree"]["green"][0]
        assert control_score(labels, images) == pytest.approx((4 / 12 + 4 / 8 + 0) / 3)

    def test_another_look_costs_the_caption_and_not_the_control(self):
        labels = np.full((1, 4, 4), CLASSES.index("house"), dtype=np.uint8)
        images = np.broadcast_to(np.array(LOOKS["house"]["stone"][0]), (1, 4, 4, 3))
        for look, right in (("stone", 1.0), ("brick", 0.0)):
            assert caption_score(labels, [f"day sky over sand with a {look} house"], images) == right
        assert len(FOREGROUND) * control_score(labels, images) == 1.0

    @pytest.mark.parametrize(
        ("before", "after", "problem"),
        [
            (0.1, 0.8, None),
            (0.2, 0.5, None),
            (0.1, 0.49, "is 0.490; expected at least 0.50"),
            (0.21, 0.52, "from 0.210 to 0.520; expected 2.5 times"),
            (0.0, float("nan"), "is nan; expected at least 0.50"),
        ],
    )
    def test_the_verdict(self, before, after, problem):
        found = quickstart.verdict(before, after)
        assert found is None if problem is None else problem in found


class TestShards:
    def test_are_what_training_reads(self, tmp_path, cfg):
        paths = write_shards(tmp_path / "once", (6, 6))
        again = write_shards(tmp_path / "again", (6, 6))
        assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in again]
        cfg = config.load(CONFIG, [f"data.train.dataset_path=[{tmp_path}/once/*.tar]", "data.num_workers=0"])
        cfg.data.train.augmentations.horizontal_flip = False
        loader = build_loader(cfg.data, factor=4, batch_size=12, seed=0)
        (batch,) = list(loader)
        assert loader.drops == {}
        assert sorted(batch["keys"]) == [f"{shard:05d}-{i:05d}" for shard in range(2) for i in range(6)]
        colours = torch.from_numpy(HINT_COLOURS).float() / 255  # [5, 3]
        labels = torch.cdist(batch["hint"].permute(0, 2, 3, 1).reshape(-1, 3), colours)
        assert labels.amin(1).max() == 0
        labels = labels.argmin(1).view(12, 64, 64).numpy()
        pixels = (batch["images"].permute(0, 2, 3, 1).numpy() + 1) * 127.5
        assert control_score(labels, pixels) > 0.95  # JPEG blurs the outlines
        assert caption_score(labels, batch["captions"], pixels) == 1.0

    def test_are_webdataset_shards(self, tmp_path):
        wds = pytest.importorskip("webdataset")
        (path,) = write_shards(tmp_path, (3,))
        samples = list(wds.WebDataset(str(path), shardshuffle=False))
        assert [sample["__key__"] for sample in samples] == ["00000-00000", "00000-00001", "00000-00002"]
        assert all({"jpg", "txt", "png"} <= set(sample) for sample in samples)


class TestBase:
    def test_is_small_and_fits_the_configuration(self, cfg):
        assert BASE.stat().st_size <= 5_000_000
        model, conditioning = build.build_model(cfg.model), build.build_conditioning(cfg.model)
        tensors = checkpoints.read(BASE)
        names = {f"model.diffusion_model.{name}" for name in model.unet.state_dict()}
        names |= {f"cond_stage_model.{name}" for name in conditioning.cond_stage.state_dict()}
        assert set(tensors) == names
        first = "input_blocks.0.0.weight"
        assert torch.equal(model.unet.state_dict()[first], tensors[f"model.diffusion_model.{first}"].float())

    def test_draws_what_captions_say_without_a_hint(self, cfg, scenes):
        few = scenes._replace(images=scenes.images[:12], hints=scenes.hints[:12], captions=scenes.captions[:12])
        few = few._replace(labels=scenes.labels[:12])
        drawn = quickstart.draw(cfg, few, None)
        found, looks = recognise(drawn.permute(0, 2, 3, 1).numpy())
        right = [
            np.bincount(looks[i][found[i] == 0], minlength=3).argmax() == list(LOOKS["sky"]).index(caption.split()[0])
            for i, caption in enumerate(few.captions)
        ]
        assert np.mean(right) >= 0.75  # a third by chance
        assert control_score(few.labels, drawn.permute(0, 2, 3, 1).numpy()) < 0.3

    def test_is_made_by_its_script(self, cfg, tmp_path):
        path = tmp_path / "base.safetensors"
        unet = make_base.train(cfg, 3, path, scenes=8)
        again = make_base.train(cfg, 3, tmp_path / "again.safetensors", scenes=8)
        weights, tensors = unet.state_dict(), checkpoints.read(path)
        assert set(tensors) == set(checkpoints.read(BASE))
        for name, tensor in again.state_dict().items():
            assert torch.equal(weights[name], tensor)
            assert torch.equal(tensors[f"model.diffusion_model.{name}"], tensor.half())


def test_the_loss_curve_falls_with_the_loss():
    steps = list(range(10, 110, 10))
    pixels = np.asarray(loss_curve(steps, [1 / step for step in steps]))
    red = (pixels == (255, 0, 0)).all(-1)
    heights = [np.nonzero(column)[0].mean() for column in red.T if column.any()]
    assert len(heights) > 300 and (np.diff(heights) >= -1).all() and heights[-1] - heights[0] > 100
    assert not red[:, :LEFT].any()
    assert loss_curve([1], [0.5]).size == loss_curve(steps, [2.0] * 10).size  # one value, a flat curve


def test_the_whole_of_it_in_a_few_steps_says_that_it_has_not_learnt(tmp_path, capfd):
    options = ["trainer.max_steps=2", "model.image_logger.max_images=0", "exp_manager.create_tensorboard_logger=False"]
    options += ["model.micro_batch_size=2", "data.num_workers=0", "trainer.log_every_n_steps=1"]
    status = quickstart.run(tmp_path, options, scene_count=3, shard_sizes=(4, 4))
    captured = capfd.readouterr()
    assert status == 1
    assert "error: the control score after training is" in captured.err
    result = json.loads((tmp_path / "scores.json").read_text())
    assert 0 <= result["before"]["control"] < 0.5 and 0 <= result["after"]["control"] < 0.5
    assert f"trained {result['after']['control']:.3f}" in captured.out
    assert [row["step"] for row in tiny_run.rows(tmp_path / "run-1")] == [1, 2]
    with Image.open(tmp_path / "samples.png") as grid, Image.open(tmp_path / "loss.png") as curve:
        assert grid.width > 3 * 128 and grid.height > 4 * 128
        assert len(curve.getcolors(100_000)) > 3
