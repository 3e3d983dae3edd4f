"""Reports of a run: Weights & Biases, a validation set, synthetic data, the time of its steps."""

import json
import sys
import types

import pytest
import torch
from omegaconf import OmegaConf

from controlnet import train
from tests.controlnet import tiny_run
from tests.controlnet.shard_files import write_shard


def command(folder, *overrides, shards=()):
    """Runs `python -m controlnet.train` on a tiny model in this process; returns the rows of its metrics."""
    path = folder / "config.yaml"
    data = {"train": {"dataset_path": [str(shard) for shard in shards], "augmentations": {"center_crop_h_w": 16}}}
    OmegaConf.save(OmegaConf.merge(tiny_run.BASE, {"data": data}), path)
    train.main(["--config", str(path), f"exp_manager.explicit_log_dir={folder}/run", *overrides])
    return tiny_run.rows(folder / "run")


SYNTHETIC = ["data.synthetic_data=True", "data.synthetic_data_length=8"]


class TestSyntheticData:
    def test_a_run_without_shards(self, tmp_path):
        rows = command(tmp_path, *SYNTHETIC, "trainer.max_steps=5")
        assert [row["epoch"] for row in rows] == [0, 0, 0, 1, 1]
        assert all(row["step_seconds"] > 0 and row["data_seconds"] > 0 for row in rows)
        saved = tmp_path / "run" / "checkpoints" / "step-00000005" / "rng-rank0.pt"
        assert torch.load(saved, weights_only=True)["position"] == {"next": 5}

    def test_too_few(self, tmp_path):
        with pytest.raises(SystemExit, match="synthetic_data_length is 1; expected at least 2, a batch of each rank"):
            command(tmp_path, "data.synthetic_data=True", "data.synthetic_data_length=1")


class TestValidation:
    @pytest.fixture
    def shards(self, tmp_path):
        return [write_shard(tmp_path / f"{i}.tar", range(40 * i, 40 * i + 6), size=16) for i in range(2)]

    def options(self, shards, *overrides):
        path = json.dumps([str(shards[1])])
        set_ = [f"data.validation.dataset_path={path}", "data.validation.augmentations.center_crop_h_w=16"]
        return [*set_, "trainer.val_check_interval=2", *overrides]

    def test_the_loss_is_that_of_the_same_noise_every_time(self, tmp_path, shards):
        rows = command(tmp_path, *self.options(shards, "optim.lr=0", "trainer.max_steps=4"), shards=shards[:1])
        found = [(row["step"], row["validation_loss"]) for row in rows if "validation_loss" in row]
        assert [step for step, _ in found] == [2, 4]
        assert found[0][1] == found[1][1] > 0  # nothing is learnt: nothing may change

    def test_an_empty_set_is_an_error_before_the_first_step(self, tmp_path, shards):
        empty = write_shard(tmp_path / "empty.tar", [])
        with pytest.raises(SystemExit, match="data.validation.dataset_path holds 0 usable samples"):
            command(tmp_path, *self.options([None, empty]), shards=shards[:1])
        assert not (tmp_path / "run" / "checkpoints").exists()

    def test_without_an_interval(self, tmp_path, shards):
        with pytest.raises(SystemExit, match="trainer.val_check_interval is None; expected the steps between"):
            command(tmp_path, *self.options(shards, "trainer.val_check_interval=null"), shards=shards[:1])


class TestWandb:
    @pytest.fixture
    def wandb(self, monkeypatch):
        """Stands for the package: keeps what it is given."""
        module = types.ModuleType("wandb")
        module.logged, module.options, module.finished = [], {}, []
        module.api = types.SimpleNamespace(api_key=None)
        module.Image = lambda picture: picture.size

        def init(**options):
            module.options = options
            return types.SimpleNamespace(
                log=lambda row, step: module.logged.append((step, row)), finish=lambda: module.finished.append(True)
            )

        module.init = init
        monkeypatch.setitem(sys.modules, "wandb", module)
        monkeypatch.delenv("WANDB_MODE", raising=False)
        return module

    def test_offline_without_a_login(self, tmp_path, wandb, caplog):
        kwargs = "exp_manager.wandb_logger_kwargs={project: nets, name: first}"
        drawing = ["model.image_logger.max_images=1", "model.image_logger.batch_frequency=3"]
        command(tmp_path, *SYNTHETIC, "exp_manager.create_wandb_logger=True", kwargs, *drawing)
        assert wandb.options["mode"] == "offline" and wandb.finished
        assert (wandb.options["project"], wandb.options["name"]) == ("nets", "first")
        assert wandb.options["config"]["optim"]["lr"] == 1e-3
        assert [step for step, row in wandb.logged if "loss" in row] == [1, 2, 3]
        assert [step for step, row in wandb.logged if "samples" in row] == [3]
        assert caplog.text.count("no login to Weights & Biases: the run is kept offline") == 1

    def test_with_a_login(self, tmp_path, wandb):
        wandb.api.api_key = "k"
        command(tmp_path, *SYNTHETIC, "exp_manager.create_wandb_logger=True")
        assert "mode" not in wandb.options

    def test_not_installed(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "wandb", None)
        with pytest.raises(SystemExit, match="wandb is not installed"):
            command(tmp_path, *SYNTHETIC, "exp_manager.create_wandb_logger=True")
