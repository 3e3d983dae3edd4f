"""Checkpoints of a training run: saved whole or not at all, and resumed to the bit.

A checkpoint is a folder step-XXXXXXXX of

    control.safetensors   `control_model.*`, the original's keys
    unet.safetensors      `model.diffusion_model.*`, only when the decoder is trained
    ema.safetensors       the averaged trainable weights under the same keys, only with an average
    state.pt              step, images seen, epoch, optimizer, scaler, schedule (loadable with weights_only=True)
    rng-rankN.pt          random streams and data position of rank N
    config.yaml           the configuration
    manifest.json         size and sha256 of each of the others

It is written under a temporary name, synced to disk, the manifest last, and moved into place in one step: a folder with
the final name is complete, however the run ended.
"""

import functools
import json
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from controlnet import config
from controlnet.checkpoints import CheckpointError
from controlnet.checkpoints.runs import (
    AVERAGE,
    CHECKPOINTS,
    MANIFEST,
    checkpoints,
    fault,
    newest_complete,
    prune,
    write,
)
from controlnet.checkpoints.write import heads_metadata
from controlnet.config import ConfigError
from controlnet.model.controlled import ControlledUNet
from controlnet.training.optim import trainable_tensors

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from controlnet.training.trainer import Trainer

logger = logging.getLogger(__name__)

CONTROL_PREFIX, UNET_PREFIX = "control_model.", "model.diffusion_model."


def prefixed(name: str) -> str:
    """The name of a ControlledUNet's parameter in the original's checkpoints."""
    part, _, rest = name.partition(".")
    return {"control": CONTROL_PREFIX, "unet": UNET_PREFIX}[part] + rest


def save_tensors(tensors: Mapping[str, Tensor], path: Path, stated: Mapping[str, str] = MappingProxyType({})) -> None:
    """Writes a safetensors file; `stated` is metadata beside the tensors."""
    cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(cpu, path, metadata={"format": "pt", **stated})


def model_files(model: ControlledUNet) -> dict[str, Callable[[Path], None]]:
    """Writers of the files that hold the trained weights."""

    def part(name: str) -> Callable[[Path], None]:
        module = getattr(model, name)
        stated = heads_metadata({name: module.arch})
        return lambda path: save_tensors(
            {prefixed(f"{name}.{k}"): v for k, v in module.state_dict().items()}, path, stated
        )

    files = {"control.safetensors": part("control")}
    if not model.sd_locked:
        files["unet.safetensors"] = part("unet")
    return files


def load_model(model: ControlledUNet, path: Path) -> None:
    """Loads the weights that `model_files` wrote, every one of them, in place.

    Raises CheckpointError when names or shapes differ from the model's.
    """
    for name in model_files(model):
        part = name.removesuffix(".safetensors")
        module, file = getattr(model, part), path / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; the checkpoint was made with another model.sd_locked")
        saved = load_file(file)
        own = {prefixed(f"{part}.{key}"): tensor for key, tensor in module.state_dict().items()}
        for key in sorted(own.keys() ^ saved.keys()):
            where = "the model has, the file lacks" if key in own else "the file has, the model lacks"
            raise CheckpointError(f"{file} does not fit the model: {where} {key}")
        for key, tensor in own.items():
            if saved[key].shape != tensor.shape:
                shapes = f"{list(saved[key].shape)}; expected {list(tensor.shape)}"
                raise CheckpointError(f"{file} does not fit the model: {key} is {shapes}")
            tensor.copy_(saved[key])


def _read_average(model: ControlledUNet, path: Path) -> dict[str, Tensor]:
    """The averaged weights of a checkpoint under the model's names."""
    saved = load_file(path / AVERAGE)
    own = {prefixed(name): name for name in trainable_tensors(model)}
    for key in sorted(own.keys() ^ saved.keys()):
        raise CheckpointError(f"{path / AVERAGE} does not fit the model, which trains other weights: {key}")
    return {own[key]: tensor for key, tensor in saved.items()}


@torch.no_grad()
def load_average(model: ControlledUNet, path: Path) -> None:
    """Puts the averaged weights of a checkpoint into the model, after `load_model`."""
    weights = trainable_tensors(model)
    for name, tensor in _read_average(model, path).items():
        weights[name].copy_(tensor)


def random_state(device: torch.device) -> dict[str, Any]:
    """The global random generators of this process: Python, NumPy, PyTorch and its GPU."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Takes up what `random_state` returned."""
    random.setstate(state["python"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def rank_state(trainer: "Trainer") -> dict[str, Any]:
    """What differs from rank to rank: random generators and the position in the data."""
    return {
        "global": random_state(trainer.world.device),
        "streams": trainer.streams.state_dict(),
        "position": trainer.loader.position,
    }


def save(trainer: "Trainer", ranks: Sequence[Mapping[str, Any]]) -> Path:
    """Saves a checkpoint of the trainer at its step; called on rank 0, with the `rank_state` of every rank."""
    cfg, manager = trainer.cfg, trainer.cfg.exp_manager
    shared = {
        "step": trainer.step,
        "images_seen": trainer.images_seen,
        "skipped": trainer.skipped,
        "trainable": _trainable_names(trainer.model),
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "average_updates": trainer.average.updates if trainer.average is not None else None,
    }
    files = model_files(trainer.model)
    if trainer.average is not None:
        averages = {prefixed(name): tensor for name, tensor in trainer.average.averages.items()}
        files[AVERAGE] = functools.partial(save_tensors, averages)
    files["state.pt"] = functools.partial(torch.save, shared)
    for rank, of_rank in enumerate(ranks):
        files[f"rng-rank{rank}.pt"] = functools.partial(torch.save, of_rank)
    files["config.yaml"] = lambda path: config.save(cfg, path)
    folder = trainer.folder / CHECKPOINTS
    path = write(folder, trainer.step, files, {"world_size": len(ranks), "torch": torch.__version__})
    prune(folder, manager.checkpoint_callback_params.save_top_k)
    return path


def _trainable_names(model: ControlledUNet) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def choose(folder: Path, cfg: "DictConfig") -> Path | None:
    """The checkpoint to take up, or None to start.

    With exp_manager.resume_if_exists it is the newest complete one of the run's own folder, before an explicit
    resume_from_checkpoint, so that the same command can be given again after a crash.

    Raises CheckpointError when the explicit one is not complete, or an old run would be overwritten.
    """
    manager = cfg.exp_manager
    explicit = manager.resume_from_checkpoint or cfg.model.resume_from_checkpoint or cfg.trainer.resume_from_checkpoint
    if manager.resume_if_exists:
        newest = newest_complete(folder, logger.warning)
        if newest is not None:
            return newest
        if explicit is None and not manager.resume_ignore_no_checkpoint:
            raise CheckpointError(f"{folder} holds no complete checkpoint and resume_ignore_no_checkpoint is false")
    elif checkpoints(folder):
        last = checkpoints(folder)[-1][1]
        raise ConfigError(
            f"{folder} already holds {last.name} of an earlier run; set exp_manager.resume_if_exists=True to go on with"
            " it, or another exp_manager.explicit_log_dir"
        )
    if explicit is None:
        return None
    problem = fault(Path(explicit))
    if problem is not None:
        raise CheckpointError(f"resume_from_checkpoint: {problem}")
    return Path(explicit)


def load(trainer: "Trainer", path: Path) -> Any:
    """Puts the trainer where it was when the checkpoint was saved; returns the position in the data.

    The learning rate and the optimizer's other settings are those of the present configuration. With another number of
    ranks than the checkpoint's, allowed by exp_manager.resume_with_other_world_size, the random streams start afresh.
    Raises CheckpointError for a checkpoint of another model or number of ranks.
    """
    load_model(trainer.model, path)
    device, world = trainer.world.device, trainer.world
    shared = torch.load(path / "state.pt", map_location=device, weights_only=True)
    own = _trainable_names(trainer.model)
    if shared["trainable"] != own:
        raise CheckpointError(
            f"{path} was made while training {len(shared['trainable'])} weights; expected the same {len(own)} as now"
            " (model.sd_locked, model.only_mid_control)"
        )
    groups = trainer.optimizer.state_dict()["param_groups"]
    trainer.optimizer.load_state_dict({"state": shared["optimizer"]["state"], "param_groups": groups})
    if trainer.scaler.is_enabled() and shared["scaler"]:
        trainer.scaler.load_state_dict(shared["scaler"])
    if trainer.average is not None:
        if shared["average_updates"] is None:
            raise CheckpointError(f"{path} holds no average; set exp_manager.ema.enable=False, or start anew")
        averages = _read_average(trainer.model, path)
        trainer.average.load(averages, shared["average_updates"])
    trainer.step, trainer.images_seen, trainer.skipped = (shared[key] for key in ("step", "images_seen", "skipped"))
    saved_ranks = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["world_size"]
    if saved_ranks != world.size:
        if not trainer.cfg.exp_manager.resume_with_other_world_size:
            raise CheckpointError(
                f"{path} was saved by {saved_ranks} ranks and {world.size} run now, which cannot go on with the same"
                " noise and data; start as many, or set exp_manager.resume_with_other_world_size=True"
            )
        return None
    of_rank = torch.load(path / f"rng-rank{world.rank}.pt", map_location="cpu", weights_only=True)
    set_random_state(of_rank["global"], device)
    trainer.streams.load_state_dict(of_rank["streams"])
    return of_rank["position"]
