"""Trains a ControlNet.

    python -m controlnet.train --config FILE key=value ...
    torchrun --nproc_per_node N -m controlnet.train --config FILE key=value ...

The loop is in `trainer.py`, one step of it in `diffusion.py`.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record

from controlnet import build, command, config
from controlnet.config import ConfigError
from controlnet.data import build_loader
from controlnet.extras import quiet_libraries, require
from controlnet.training.distributed import RankError, StopRequest, World, start
from controlnet.training.trainer import Trainer

if TYPE_CHECKING:
    from omegaconf import DictConfig

logger = logging.getLogger("controlnet")


EXAMPLES = """
one process:    python -m controlnet.train --config controlnet/configs/sd15_seg.yaml trainer.devices=auto \\
                    model.unet_config.from_pretrained=v1-5-pruned.ckpt data.train.dataset_path=[shards/wdinfo.pkl]
two processes:  torchrun --nproc_per_node 2 -m controlnet.train --config controlnet/configs/sd15_seg.yaml
on a CPU, now:  python -m controlnet.quickstart
"""


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command.parser("controlnet.train", "Trains a ControlNet.", EXAMPLES)
    parser.add_argument("--config", required=True, help=f"YAML file; shipped are {', '.join(command.shipped())}")
    command.add_overrides(parser)
    return command.parse(parser, argv)


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
    torch.use_deterministic_algorithms(cfg.trainer.deterministic)
    torch.manual_seed(cfg.model.seed)  # equal initial weights on all ranks
    model = build.build_model(cfg.model)
    conditioning = build.build_conditioning(cfg.model)
    check_ranks(world, cfg, model)
    torch.manual_seed(cfg.model.seed + world.rank)  # from here on ranks differ, in dropout too

    def make_loader(position):
        return build_loader(
            cfg.data,
            factor=conditioning.factor,
            batch_size=cfg.model.micro_batch_size,
            seed=cfg.model.seed,
            rank=world.rank,
            world_size=world.size,
            start=position,
            hint_channels=model.control.arch.hint_channels,
        )

    return Trainer(cfg, world, model, conditioning, make_loader, stop)


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


@record
def main(argv: Sequence[str] | None = None) -> None:
    arguments = _arguments(argv)
    quiet_libraries()
    first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if first else logging.WARNING, format="%(message)s")
    with StopRequest() as stop:
        try:
            require("tqdm", extra="train", wanted_by="it shows the progress")
            cfg = config.load(arguments.config, arguments.overrides)
            check_resume(cfg)
            if cfg.exp_manager.create_tensorboard_logger:
                why = "or set exp_manager.create_tensorboard_logger=False"
                require("tensorboard", extra="train", wanted_by=f"it draws the curves of a run; {why}")
            world = start(cfg.trainer.devices, cfg.trainer.num_nodes, cfg.trainer.accelerator)
            trainer = prepare(cfg, world, stop)
            trainer.resume()
        except (ValueError, OSError, ImportError, RankError) as error:
            # Bad input, found before training: its message says all, a traceback would hide it.
            sys.exit(f"error: {error}")
        if world.is_first:
            _announce(trainer)
        stopped = trainer.fit()
        world.close()
    if stopped:
        reason = stop.signal.name if stop.signal else "a signal to another rank"
        logger.warning("stopped by %s; step %d is saved in %s", reason, trainer.step, trainer.folder)
        sys.exit(128 + (stop.signal or 15))
    logger.info("finished: step %d, %d images seen, in %s", trainer.step, trainer.images_seen, trainer.folder)


if __name__ == "__main__":
    main()
