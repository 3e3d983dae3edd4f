"""Encoded shards of Stable Diffusion XL: training on them is training on the images."""

import json
import warnings

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch.testing import assert_close

from controlnet import encode
from controlnet.data import DataError
from tests.controlnet import tiny_run, tiny_sdxl


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return tiny_sdxl.pipeline(tmp_path_factory.mktemp("sdxl") / "pipeline")


@pytest.fixture(scope="module", params=["tokens", "states"])
def encoded(request, pipeline, tmp_path_factory):
    """Shards of both sizes of the buckets, by the command; and how the captions are stored."""
    folder = tmp_path_factory.mktemp(request.param)
    OmegaConf.save(tiny_sdxl.configuration(pipeline, folder), folder / "config.yaml")
    encode.main(["--config", str(folder / "config.yaml"), "--output", str(folder / "encoded"), "--text", request.param])
    return folder / "encoded", request.param


def on_shards(pipeline, folder, encoded, *overrides):
    where = f"data.train.dataset_path=['{encoded}/*.tar']"
    return tiny_sdxl.configuration(pipeline, folder, where, *overrides)


def test_a_batch_is_that_of_the_images(pipeline, encoded, tmp_path):
    """Both sizes, mirrored and not, with and without captions: latents, hint, context, pooled vector and time ids."""
    shards, kind = encoded
    runs = [
        tiny_sdxl.trainer(cfg)
        for cfg in (tiny_sdxl.configuration(pipeline, tmp_path), on_shards(pipeline, tmp_path, shards))
    ]
    batches = [list(run.make_loader(None)) for run in runs]
    assert {tuple(batch["hint"].shape[2:]) for batch in batches[0]} == {(16, 16), (16, 24)}
    assert len({tuple(ids) for batch in batches[0] for ids in batch["time_ids"].tolist()}) > 2  # mirrored ones, too
    for whole, stored in zip(*batches, strict=True):
        assert whole["keys"] == stored["keys"] and kind in stored and "images" not in stored
        assert torch.equal(whole["hint"], stored["hint"])
        assert torch.equal(whole["time_ids"], stored["time_ids"])
        latents, conditions = [], []
        for run, batch in zip(runs, (whole, stored), strict=True):
            latents.append(run.conditioning.batch_latents(batch, torch.Generator().manual_seed(0)))
            conditions.append(run.conditioning.batch_condition(batch, torch.tensor([False, True])))
        assert_close(*latents, rtol=2e-3, atol=2e-3)  # float16 of moments up to 4
        assert conditions[0][1].any() and not conditions[1][0][1].any()
        for ours, theirs in zip(*conditions, strict=True):
            assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_training_has_the_losses_of_training_on_images_and_goes_on_to_the_bit(pipeline, encoded, tmp_path):
    shards, kind = encoded
    plain = ["trainer.control_sensitivity_every_n_steps=0", "model.image_logger.max_images=0"]

    def trained(name, make, steps, *more):
        run = tiny_sdxl.trainer(make(pipeline, tmp_path / name, *plain, *more, f"trainer.max_steps={steps}"))
        run.resume()
        run.fit()
        return run, [row["loss"] for row in tiny_run.rows(tmp_path / name / "run")]

    def on_encoded(pipeline, folder, *overrides):
        return on_shards(pipeline, folder, shards, *overrides)

    _, expected = trained("images", tiny_sdxl.configuration, 3)
    whole, losses = trained("encoded", on_encoded, 3, "model.image_logger.max_images=2")
    assert len(expected) == 3
    assert_close(torch.tensor(losses), torch.tensor(expected), rtol=2e-3, atol=0)
    assert list((tmp_path / "encoded" / "run").rglob("*.png"))
    if kind == "states":
        trained("parts", on_encoded, 2)
        ends = tiny_run.weights(trained("parts", on_encoded, 3)[0])
        assert all(torch.equal(tensor, ends[name]) for name, tensor in tiny_run.weights(whole).items())


@pytest.mark.parametrize(
    "override, message",
    [
        ("model.cond_stage_config.zeros_for_empty=False", "zeros for the empty caption was True, is False"),
        ("data.train.buckets.sizes=['16, 16']", "crop was '16 x 16, 16 x 24, in the centre', is '16 x 16, in the"),
        ("data.train.buckets.random_crop=True", "is '16 x 16, 16 x 24, anywhere'"),
    ],
)
def test_another_configuration_is_refused(pipeline, encoded, tmp_path, override, message):
    with pytest.raises(DataError, match=message):
        tiny_sdxl.trainer(on_shards(pipeline, tmp_path, encoded[0], override)).resume()


def test_a_random_crop_cannot_be_encoded(pipeline, tmp_path):
    OmegaConf.save(tiny_sdxl.configuration(pipeline, tmp_path, "data.train.buckets.random_crop=True"), tmp_path / "c")
    with pytest.raises(SystemExit, match="buckets.random_crop is True; expected false: a crop that differs from epoch"):
        encode.main(["--config", str(tmp_path / "c"), "--output", str(tmp_path / "encoded")])


def test_damage_is_counted_or_named(pipeline, encoded, tmp_path):
    """A member that is not what the manifest says is a counted drop, a manifest without a setting one error."""
    folder = tmp_path / "copy"
    folder.mkdir()
    manifest = json.loads((encoded[0] / "manifest.json").read_text())
    for path in encoded[0].glob("*.tar"):
        content = path.read_bytes()
        shape = f"'shape': ({2 if manifest['settings']['flips'] else 1}, 6)".encode()
        assert content.count(shape) == 8
        (folder / path.name).write_bytes(content.replace(shape, shape.replace(b", 6)", b", 3)"), 1))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    loader = tiny_sdxl.trainer(on_shards(pipeline, tmp_path, folder)).make_loader(None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert sum(len(batch["keys"]) for batch in loader) == 8
    (reason,) = loader.drops
    assert reason.startswith("time ids not")
    del manifest["settings"]["factor"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"manifest.json is damaged \(KeyError\('factor'\)\); encode the shards again"):
        tiny_sdxl.trainer(on_shards(pipeline, tmp_path, folder)).make_loader(None)


def test_bytes_of_a_sample(encoded):
    """Latents twice with flips; tokens of both encoders, or states and pooled vector; hint and time ids."""
    folder, kind = encoded
    manifest = json.loads((folder / "manifest.json").read_text())
    widths = sum(tiny_sdxl.WIDTHS)
    assert manifest["settings"]["text"] == {"kind": kind, "shape": [2, 77] if kind == "tokens" else [77, widths]}
    assert manifest["settings"]["pooled vector"] == tiny_sdxl.POOLED
    empty = {name: np.array(values) for name, values in manifest["empty"].items()}
    assert set(empty) == (set() if kind == "tokens" else {"no_caption", "no_pooled"})
    assert not any(values.any() for values in empty.values())  # zeros_for_empty
