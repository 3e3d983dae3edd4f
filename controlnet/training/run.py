"""A training run from a configuration to its end: builds what it names, checks it, trains, and says how it ended.

The loop is in `trainer.py`, one step of it in `model/diffusion.py`.
"""

from __future__ import annotations

import hashlib
import logging
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from controlnet import build, config
from controlnet.common import command
from controlnet.common.extras import require
from controlnet.config import ConfigError
from controlnet.config.rules import seconds
from controlnet.data import DataError, SyntheticLoader, build_loader, cached
from controlnet.training.distributed import Interrupted, RankError, StopRequest, World, start
from controlnet.training.lock import RunLock
from controlnet.training.loggers import import_wandb
from controlnet.training.trainer import Trainer
from controlnet.training.validation import Validation

if TYPE_CHECKING:
    from omegaconf import DictConfig

logger = logging.getLogger("controlnet")


def check_resume(cfg: DictConfig) -> None:
    """Raises ConfigError for a file where the folder of a checkpoint is expected."""
    for section in ("exp_manager", "model", "trainer"):
        path = cfg[section].resume_from_checkpoint
        if path is not None and Path(path).is_file():
            raise ConfigError(
                f"{section}.resume_from_checkpoint is {path}, a file; a run goes on from a checkpoint's folder, as"
                " runs/NAME/checkpoints/step-00005000. To start from the weights of a file, set"
                " model.control_stage_config.from_pretrained (a ControlNet) or model.ckpt_path (all parts)"
            )


def check_ranks(world: World, cfg: DictConfig, model: nn.Module) -> None:
    """Raises RankError on every rank unless all of them run the same thing, from the same weights."""
    from omegaconf import OmegaConf  # an optional package, which `config.load` has asked for

    text = OmegaConf.to_yaml(cfg, sort_keys=True)
    weights = torch.stack([parameter.detach().double().sum() for parameter in model.parameters()])
    world.require_equal(
        {
            "the configuration (sha256)": hashlib.sha256(text.encode()).hexdigest()[:16],
            "the PyTorch version": torch.__version__,
            "the world size": world.size,
            "the sum of the initial weights": weights.sum().item(),
        }
    )


def prepare(cfg: DictConfig, world: World, stop: StopRequest) -> Trainer:
    """Builds everything that a configuration names and checks it, before the first step."""
    torch.backends.cudnn.benchmark = cfg.trainer.benchmark
    if torch.are_deterministic_algorithms_enabled() != cfg.trainer.deterministic:  # the call imports all of Inductor
        torch.use_deterministic_algorithms(cfg.trainer.deterministic)
    torch.manual_seed(cfg.model.seed)  # equal initial weights on all ranks
    model = build.build_model(cfg.model, weights=False)
    conditioning = build.build_conditioning(cfg.model, precision=cfg.trainer.precision)
    build.load_weights(model.unet, model.control, cfg.model)  # last: what does not fit is said before
    check_ranks(world, cfg, model)
    torch.manual_seed(cfg.model.seed + world.rank)  # from here on ranks differ, in dropout too
    limit = cfg.exp_manager.max_time_per_run
    stop.limit(None if limit is None else seconds(limit, "exp_manager.max_time_per_run"))
    data = Data(cfg, world, conditioning, model.control.arch.hint_channels)
    return Trainer(cfg, world, model, conditioning, data.training, stop, validation=data.validation())


class Data:
    """The batches of this rank: of training, from any position on, and of the validation set."""

    def __init__(self, cfg: DictConfig, world: World, conditioning: Any, hint_channels: int):
        self.cfg, self.world, self.conditioning, self.hint_channels = cfg, world, conditioning, hint_channels

    def _loader(self, data: Mapping[str, Any], position: Any) -> Any:
        return build_loader(
            data,
            factor=self.conditioning.factor,
            batch_size=self.cfg.model.micro_batch_size,
            seed=self.cfg.model.seed,
            rank=self.world.rank,
            world_size=self.world.size,
            start=position,
            hint_channels=self.hint_channels,
            tokenize=self.conditioning.tokenize,
            encoded=lambda: cached.settings(self.cfg.model, data["train"], self.conditioning),
        )

    def training(self, position: Any) -> Any:
        """The loader that goes on at a position; None is the start."""
        if self.cfg.data.synthetic_data:
            return SyntheticLoader(
                self.cfg.data,
                factor=self.conditioning.factor,
                batch_size=self.cfg.model.micro_batch_size,
                rank=self.world.rank,
                world_size=self.world.size,
                start=position,
                hint_channels=self.hint_channels,
            )
        return self._loader(self.cfg.data, position)

    def validation(self) -> Validation | None:
        """The validation set of data.validation, or None where it names no shards."""
        data, every = self.cfg.data, self.cfg.trainer.val_check_interval
        if not data.validation.dataset_path:
            return None
        if every is None or every < 1 or every != int(every):
            raise ConfigError(f"trainer.val_check_interval is {every}; expected the steps between two validations")
        limit = self.cfg.trainer.limit_val_batches or None
        same_order = {**data.webdataset, "shuffle_buffer": 0, "infinite_sampler": False}
        section = {"num_workers": 0, "train": data.validation, "webdataset": same_order}

        def batches() -> Any:
            try:
                return self._loader(section, None)
            except DataError as error:
                raise DataError(str(error).replace("data.train", "data.validation")) from error

        batches()  # an empty set is an error before the first step
        return Validation(batches, limit, self.cfg.model.seed)


def _announce(trainer: Trainer) -> None:
    model, cfg = trainer.model, trainer.cfg
    trained = sum(parameter.numel() for parameter in trainer.trainable)
    everything = sum(parameter.numel() for parameter in model.parameters())
    micro, ranks = cfg.model.micro_batch_size, trainer.world.size
    logger.info("training %s of %s parameters in %s", f"{trained:,}", f"{everything:,}", cfg.trainer.precision)
    logger.info(
        "effective batch %d = %d images x %d micro-batches x %d ranks; a step is one update of the weights",
        micro * trainer.accumulate * ranks,
        micro,
        trainer.accumulate,
        ranks,
    )
    logger.info("the run is kept in %s", trainer.folder)


def run(config_file: str | Path, overrides: Sequence[str] = ()) -> None:
    """Trains as a configuration says, on this rank, and exits the process with a message when it cannot.

    Args:
        config_file: YAML.
        overrides: settings that replace the file's, `key=value`.

    Raises:
        SystemExit: bad input, a rank that fell silent, a full disk: with the message; a signal: with 128 + its number.
    """
    with StopRequest() as stop:
        try:
            require("omegaconf", "tqdm", extra="train", wanted_by="training reads YAML and shows its progress")
            cfg = config.load(config_file, overrides)
            check_resume(cfg)
            if cfg.exp_manager.create_tensorboard_logger:
                why = "or set exp_manager.create_tensorboard_logger=False"
                require("tensorboard", extra="train", wanted_by=f"it draws the curves of a run; {why}")
            if cfg.exp_manager.create_wandb_logger:
                import_wandb()
            world = start(cfg.trainer.devices, cfg.trainer.num_nodes, cfg.trainer.accelerator, cfg.trainer.rank_timeout)
            trainer = prepare(cfg, world, stop)
            lock = RunLock(trainer.folder)
            world.on_first(lock.acquire)
            trainer.resume()
        except (ValueError, OSError, ImportError, RankError) as error:
            # Bad input, found before training: its message says all, a traceback would hide it.
            command.fail(f"error: {error}")
        if world.is_first:
            _announce(trainer)
        try:
            stopped = trainer.fit()
        except Interrupted:
            saved = f"step {trainer.saved_step} is saved" if trainer.saved_step else "nothing was trained yet"
            message = f"stopped by {stop.reason} while the training step was compiled; {saved}"
            command.fail(message, 128 + stop.signal)
        except RankError as error:
            saved = f"step {trainer.saved_step} is saved" if trainer.saved_step else "no checkpoint was saved"
            command.fail(f"error: rank {world.rank} ends at step {trainer.step}: {error}; {saved} in {trainer.folder}")
        except OSError as error:  # the disk; see Trainer.save
            command.fail(f"error: {error}")
        finally:
            lock.release()
        world.close()
    if stopped:
        message = f"stopped by {stop.reason}; step {trainer.step} is saved in {trainer.folder}"
        if stop.signal is not None or not stop.requested:
            command.fail(message, 128 + (stop.signal or signal.SIGTERM))
        logger.warning(message)
    logger.info("finished: step %d, %d images seen, in %s", trainer.step, trainer.images_seen, trainer.folder)
