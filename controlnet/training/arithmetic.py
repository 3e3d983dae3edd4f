"""Computed from the settings of a run: micro-batches per step, the run's folder, and what is due after a step."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from controlnet.config import ConfigError


def accumulation(micro: int, global_batch: int | None, accumulate: int, ranks: int) -> int:
    """Micro-batches in a step: global_batch / (micro * ranks), or `accumulate` when there is no global batch.

    Raises:
        ConfigError: they do not divide, or both are given and differ.
    """
    for name, value in (("model.micro_batch_size", micro), ("trainer.accumulate_grad_batches", accumulate)):
        if value < 1:
            raise ConfigError(f"{name} is {value}; expected 1 or more")
    if global_batch is None:
        return accumulate
    if global_batch < 1 or global_batch % (micro * ranks):
        raise ConfigError(
            f"model.global_batch_size is {global_batch}; expected a multiple of {micro * ranks} ="
            f" model.micro_batch_size {micro} x {ranks} ranks"
        )
    count = global_batch // (micro * ranks)
    if accumulate not in (1, count):
        raise ConfigError(
            f"trainer.accumulate_grad_batches is {accumulate} but model.global_batch_size {global_batch} ="
            f" {micro} x {ranks} ranks x {count}; leave one of them out"
        )
    return count


def run_folder(exp_manager: Mapping[str, Any]) -> Path:
    """Where a run keeps its metrics, samples and checkpoints."""
    if exp_manager["explicit_log_dir"]:
        return Path(exp_manager["explicit_log_dir"])
    return Path(exp_manager["exp_dir"] or "runs") / (exp_manager["name"] or "controlnet")


def due(cfg: Any, step: int, epoch: int, next_epoch: int) -> dict[str, bool]:
    """What is due after step number `step`, by the intervals of a configuration.

    Args:
        cfg: from `config.load`.
        epoch, next_epoch: of the step's first batch, and of the batch after it.

    Returns:
        "report", "validate", "draw" and "save".
    """
    options, every = cfg.model.image_logger, cfg.exp_manager.checkpoint_callback_params
    drawing = options.max_images > 0 and not options.disabled
    of_epochs = every.every_n_epochs
    return {
        "report": _divides(cfg.trainer.log_every_n_steps, step),
        "validate": _divides(int(cfg.trainer.val_check_interval or 0), step),
        "draw": drawing and ((options.log_first_step and step == 1) or _divides(options.batch_frequency, step)),
        "save": _divides(every.every_n_train_steps, step)
        or (of_epochs > 0 and next_epoch // of_epochs > epoch // of_epochs),
    }


def _divides(every: int, step: int) -> bool:
    return every > 0 and step % every == 0
