"""Checkpoints of a training run: saved whole or not at all, and resumed to the bit.

A checkpoint is a folder step-XXXXXXXX of

    control.safetensors   `control_model.*`, the original's keys
    unet.safetensors      `model.diffusion_model.*`, only when the decoder is trained
    ema.safetensors       the averaged trainable weights under the same keys, only with an average
    state.pt              step, images seen, epoch, optimizer, scaler, schedule (loadable with weights_only=True)
    rng-rankN.pt          random streams and data position of rank N
    config.yaml           the configuration
    manifest.json         size and sha256 of each of the others, and of itself

`checkpoints.runs` writes it as files, whole or not at all; here is what is in them. Nothing here knows a trainer.
"""

import contextlib
import functools
import logging
import pickle
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from controlnet import config
from controlnet.checkpoints import CheckpointError
from controlnet.checkpoints.runs import (
    AVERAGE,
    CHECKPOINTS,
    CONFIG,
    MANIFEST,
    checkpoints,
    fault,
    folder_name,
    manifest,
    newest_complete,
    prune,
    write,
)
from controlnet.checkpoints.trained import (
    load_average,
    load_model,
    model_files,
    prefixed,
    read_average,
    save_tensors,
)
from controlnet.config import ConfigError
from controlnet.model.controlled import ControlledUNet

if TYPE_CHECKING:
    from omegaconf import DictConfig

__all__ = ["AVERAGE", "CHECKPOINTS", "MANIFEST", "CheckpointError", "checkpoints", "fault", "folder_name"]
__all__ += ["load_average", "load_model", "read_average"]  # of checkpoints.trained
__all__ += ["manifest", "newest_complete", "prune", "write"]  # of checkpoints.runs, for those who save and take up runs

logger = logging.getLogger(__name__)


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
    """Restores what `random_state` returned."""
    random.setstate(state["python"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def save(
    folder: Path,
    model: ControlledUNet,
    averages: Mapping[str, Tensor] | None,
    state: Mapping[str, Any],
    ranks: Sequence[Mapping[str, Any]],
    cfg: "DictConfig",
) -> Path:
    """Saves a checkpoint; called on rank 0.

    Args:
        folder: of the run's checkpoints.
        model: whose trained weights are saved.
        averages: the averaged weights, by the names of `trainable_tensors`; None for none.
        state: what all ranks share, with its `step`; tensors and plain values.
        ranks: the state of every rank, by rank.
        cfg: the configuration.

    Returns:
        The checkpoint's path.

    Raises:
        OSError: see `runs.write`.
    """
    files = model_files(model)
    if averages is not None:
        files[AVERAGE] = functools.partial(save_tensors, {prefixed(name): each for name, each in averages.items()})
    files["state.pt"] = functools.partial(torch.save, state)
    for rank, of_rank in enumerate(ranks):
        files[f"rng-rank{rank}.pt"] = functools.partial(torch.save, of_rank)
    files[CONFIG] = lambda path: config.save(cfg, path)
    parts = [model.control] if model.sd_locked else [model.control, model.unet]
    weights = [tensor for part in parts for tensor in part.state_dict().values()]
    size = _bytes(weights) + _bytes(averages or {}) + _bytes(state)
    return write(folder, state["step"], files, {"world_size": len(ranks), "torch": torch.__version__}, size)


def _bytes(tree: Any) -> int:
    """Bytes of all tensors in a tree of dicts, lists and tuples."""
    if isinstance(tree, Tensor):
        return tree.numel() * tree.element_size()
    children = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, (list, tuple)) else ()
    return sum(_bytes(child) for child in children)


def choose(folder: Path, cfg: "DictConfig") -> Path | None:
    """The checkpoint to resume from, or None to start from the beginning.

    With exp_manager.resume_if_exists it is the newest complete one of the run's own folder, before an explicit
    resume_from_checkpoint, so that the same command can be given again after a crash.

    Raises:
        CheckpointError: the explicit one is not complete, or an old run would be overwritten.
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
    explicit = Path(explicit)
    if explicit.is_file():
        raise CheckpointError(
            f"resume_from_checkpoint: {explicit} is a file; expected a folder step-XXXXXXXX that a run of this package"
            " saved. Weights to start from are given by model.ckpt_path or model.control_stage_config.from_pretrained"
        )
    problem = fault(explicit)
    if problem is not None:
        raise CheckpointError(f"resume_from_checkpoint: {problem}")
    return explicit


def ranks(path: Path) -> int:
    """How many ranks saved a checkpoint. Raises CheckpointError for a damaged manifest."""
    try:
        return int(manifest(path)["world_size"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / MANIFEST} does not say how many ranks saved it: {error}") from error


def read(path: Path, device: torch.device) -> dict[str, Any]:
    """A pickle of a checkpoint, read with weights_only=True."""
    return torch.load(path, map_location=device, weights_only=True)


# What reading a state raises that another program wrote, or another version of this one.
_FOREIGN = (
    KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError, EOFError, pickle.UnpicklingError,
    SafetensorError,
)  # fmt: skip


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Puts the path before what a CheckpointError raised within it says, and makes one of what foreign files raise."""
    try:
        yield
    except CheckpointError as error:
        if str(path) in str(error):
            raise
        raise CheckpointError(f"{path}: {error}") from error
    except _FOREIGN as error:
        reason = (str(error).splitlines() or [""])[0]
        raise CheckpointError(
            f"{path} is complete, but not what this version of the package saves ({type(error).__name__}: {reason})"
        ) from error
