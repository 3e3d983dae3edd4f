"""Trains a ControlNet.

    python -m controlnet.train --config FILE key=value ...
    torchrun --nproc_per_node N -m controlnet.train --config FILE key=value ...

The loop is in `trainer.py`, one step of it in `diffusion.py`.
"""

import argparse
import hashlib
import logging
import os
import sys
from collections.abc import Sequence

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record

from controlnet import build, config
from controlnet.data import build_loader
from controlnet.training.distributed import RankError, StopRequest, World, start
from controlnet.training.trainer import Trainer

logger = logging.getLogger("controlnet")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m controlnet.train",
        description="Trains a ControlNet. For N processes: torchrun --nproc_per_node N -m controlnet.train ...",
    )
    parser.add_argument("--config", required=True, help="YAML file; see controlnet/configs/")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings that replace the file's, e.g. trainer.precision=bf16 model.micro_batch_size=4",
    )
    return parser.parse_args(argv)


def check_ranks(world: World, cfg: DictConfig, model: nn.Module) -> None:
    """Raises RankError on every rank unless all of them run the same thing, from the same weights."""
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
    first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if first else logging.WARNING, format="%(message)s")
    with StopRequest() as stop:
        try:
            cfg = config.load(arguments.config, arguments.overrides)
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
