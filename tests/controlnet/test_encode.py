"""Encoded shards: training on them equals training on the images; unfit data is refused or counted."""

import json
import warnings

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from controlnet import build, encode, train
from controlnet.conditioning import AutoencoderKL
from controlnet.data import DataError, build_loader, cached
from controlnet.training.distributed import World
from controlnet.training.run import Data
from tests.controlnet import tiny, tiny_run
from tests.controlnet.shard_files import jpeg, png, write_tar

PIXELS = 16


def configuration(folder, shards, *overrides):
    data = [
        f"data.train.dataset_path={json.dumps([str(shard) for shard in shards])}",
        f"data.train.augmentations.center_crop_h_w={PIXELS}",
        "data.webdataset.shuffle_buffer=0",
    ]
    return tiny_run.configuration(folder / "run", *data, *overrides)


def encoded(folder, cfg, *options):
    """Encodes by the command; returns the shards."""
    path = folder / "config.yaml"
    tree = OmegaConf.to_container(cfg)
    OmegaConf.save(tree, path)
    encode.main(["--config", str(path), "--output", str(folder / "encoded"), *options])
    return sorted((folder / "encoded").glob("*.tar"))


def loader(cfg, batch=2):
    conditioning = build.build_conditioning(cfg.model)
    settings = cached.settings(cfg.model, cfg.data.train, conditioning)
    options = {"tokenize": conditioning.tokenize, "encoded": lambda: settings}
    return conditioning, build_loader(cfg.data, factor=2, batch_size=batch, seed=0, **options)


@pytest.fixture
def shards(tmp_path):
    rng = np.random.default_rng(0)
    files = []
    for number in range(8):
        pixels = rng.integers(0, 256, (2, PIXELS, PIXELS, 3), dtype=np.uint8)
        members = {"jpg": jpeg(pixels[0]), "txt": b"red green blue"[: 4 + number].rstrip(), "png": png(pixels[1])}
        files.append([(f"{number:05d}.{extension}", content) for extension, content in members.items()])
    return [write_tar(tmp_path / f"{i}.tar", sum(files[4 * i : 4 * i + 4], [])) for i in range(2)]


@pytest.mark.parametrize("text", ["tokens", "states"])
def test_a_batch_of_a_cache_is_that_of_the_images(tmp_path, shards, text):
    cfg = configuration(tmp_path, shards)
    conditioning, images = loader(cfg)
    _, cache = loader(configuration(tmp_path, encoded(tmp_path, cfg, "--text", text)))
    for whole, stored in zip(images, cache, strict=True):
        assert whole["keys"] == stored["keys"] and whole["captions"] == stored["captions"]
        assert torch.equal(whole["hint"], stored["hint"])
        expected = conditioning.batch_latents(whole)
        assert (conditioning.batch_latents(stored) - expected).abs().max() <= 2**-11  # float16, of values up to 1
        for dropped in (torch.tensor([False, False]), torch.tensor([False, True])):
            contexts = [conditioning.batch_context(batch, dropped) for batch in (whole, stored)]
            torch.testing.assert_close(*contexts, rtol=1e-3, atol=1e-3)


def test_mirrored_latents_are_stored_and_read(tmp_path, shards):
    cfg = configuration(tmp_path, shards, "data.train.augmentations.horizontal_flip=1.0")
    conditioning, images = loader(cfg)
    _, cache = loader(configuration(tmp_path, encoded(tmp_path, cfg), "data.train.augmentations.horizontal_flip=1.0"))
    for whole, stored in zip(images, cache, strict=True):
        assert torch.equal(whole["hint"], stored["hint"])
        assert (conditioning.batch_latents(stored) - conditioning.batch_latents(whole)).abs().max() <= 2**-11
    plain = configuration(tmp_path, sorted((tmp_path / "encoded").glob("*.tar")))
    assert not torch.equal(next(iter(loader(plain)[1]))["hint"], next(iter(cache))["hint"])


def test_the_posterior_is_stored(tmp_path):
    """With a VAE: mean and standard deviation, from which each epoch draws anew."""
    tiny.vae().save_pretrained(tmp_path / "vae")
    conditioning = AutoencoderKL(str(tmp_path / "vae"))
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    moments = conditioning.moments(images)
    drawn = conditioning.encode(images, torch.Generator().manual_seed(3))
    noise = torch.randn(moments[:, 0].shape, generator=torch.Generator().manual_seed(3))
    assert torch.equal(drawn, moments[:, 0] + moments[:, 1] * noise)
    assert moments.shape == (2, 2, 4, 4, 4) and (moments[:, 1] > 0).all()


def test_training_on_a_cache(tmp_path, shards):
    paths = encoded(tmp_path, configuration(tmp_path, shards))
    path = tmp_path / "cached.yaml"
    OmegaConf.save(OmegaConf.to_container(configuration(tmp_path, paths, "trainer.max_steps=2")), path)
    train.main(["--config", str(path)])
    rows = tiny_run.rows(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2] and all(np.isfinite(row["loss"]) for row in rows)


def test_a_validation_set_has_a_crop_of_its_own(tmp_path, shards):
    small = "augmentations.center_crop_h_w=8"
    paths = encoded(tmp_path, configuration(tmp_path, shards, f"data.train.{small}"))
    where = f"data.validation.dataset_path={json.dumps([str(path) for path in paths])}"
    cfg = configuration(tmp_path, shards, where, f"data.validation.{small}", "trainer.val_check_interval=1")
    data = Data(cfg, World(0, 1, 0, torch.device("cpu")), build.build_conditioning(cfg.model), 3)
    (batch, *_) = data.validation().make_batches()
    assert "moments" in batch and batch["hint"].shape[2:] == (8, 8)
    with pytest.raises(DataError, match="'8 x 8, in the centre', is '16 x 16, in the centre'"):
        Data(configuration(tmp_path, paths), *(getattr(data, name) for name in ("world", "conditioning")), 3).training(
            None
        )


class TestRefused:
    def test_another_configuration(self, tmp_path, shards):
        paths = encoded(tmp_path, configuration(tmp_path, shards))
        for override, message in (
            ("model.scale_factor=0.5", "scale_factor was 1.0, is 0.5"),
            (
                "data.train.augmentations.center_crop_h_w=8",
                "crop was '16 x 16, in the centre', is '8 x 8, in the centre'",
            ),
            ("model.cond_stage_config.vocabulary=[red,blue]", "weights of the text encoder: other weights"),
            ("model.cond_stage_config.max_length=3", "length of the text was 4, is 3"),
        ):
            with pytest.raises(DataError, match=f"encoded for another configuration: {message}"):
                loader(configuration(tmp_path, paths, override))
        with pytest.raises(DataError, match="horizontal_flip is set, but the shards were encoded without"):
            loader(configuration(tmp_path, paths, "data.train.augmentations.horizontal_flip=True"))

    def test_half_written(self, tmp_path, shards):
        cfg = configuration(tmp_path, shards)
        paths = encoded(tmp_path, cfg)
        manifest = tmp_path / "encoded" / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"complete": true', '"complete": false'))
        with pytest.raises(DataError, match="is half written: start the same python -m controlnet.encode again"):
            loader(configuration(tmp_path, paths))
        paths[1].unlink()
        kept = paths[0].stat().st_mtime_ns
        assert encoded(tmp_path, cfg) == paths
        assert paths[0].stat().st_mtime_ns == kept  # what was there is not made again
        assert len(loader(configuration(tmp_path, paths))[1]) == 4

    def test_a_folder_of_another_configuration_is_not_gone_on_with(self, tmp_path, shards):
        encoded(tmp_path, configuration(tmp_path, shards))
        with pytest.raises(SystemExit, match="was begun with another configuration: scale_factor was 1.0, is 0.5"):
            encoded(tmp_path, configuration(tmp_path, shards, "model.scale_factor=0.5"))

    def test_a_random_crop(self, tmp_path, shards):
        random = ["data.train.augmentations.center_crop_h_w=null", "data.train.augmentations.random_crop_h_w=16"]
        with pytest.raises(SystemExit, match="random_crop_h_w is 16; expected center_crop_h_w"):
            encoded(tmp_path, configuration(tmp_path, shards, *random))

    def test_members_that_are_not_what_the_manifest_says_are_counted(self, tmp_path, shards):
        paths = encoded(tmp_path, configuration(tmp_path, shards))
        content = bytearray(paths[0].read_bytes())
        place = content.index(b"\x93NUMPY")
        content[place : place + 6] = b"\x93NUMPX"
        paths[0].write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _, batches = loader(configuration(tmp_path, paths))
            assert sum(len(batch["keys"]) for batch in batches) == 8
        assert batches.drops == {"latents not readable": {str(paths[0]): 1}}
