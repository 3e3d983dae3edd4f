"""Rules over several keys: moves settings that other systems keep under another key, and refuses contradictions."""

import logging
import re
from collections.abc import Mapping
from typing import Any

from controlnet.config.checks import precision
from controlnet.config.schema import ConfigError, shown

logger = logging.getLogger(__name__)

FUSED_ADAM = ("megatron_fused_adam", "distributed_fused_adam")  # NeMo's names; one optimizer here
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "ppm", "pgm", "pbm", "pnm", "npy")
DATA_PARALLEL = re.compile(r"auto|(nlp_?)?ddp\w*|single_device|nemo\w*ddp\w*|megatron\w*")


def apply(cfg: Any, given: Mapping[str, Any]) -> None:
    """Moves settings to the key that is read, and raises ConfigError for values that ask for a missing feature.

    Args:
        cfg: the configuration with its defaults, values checked one by one; changed in place.
        given: dotted path -> value of what the user set, in the file or as an override.
    Raises ConfigError naming both keys of a contradiction, or the key to use instead.
    """
    _precision(cfg, given)
    _learning_rate(cfg, given)
    _average(cfg, given)
    _optimizer(cfg)
    _time_limit(cfg, given)
    _batch_entries(cfg, given)
    _strategy(cfg)
    _checkpoints(cfg)
    _parts(cfg, given)
    if cfg.model.tune and cfg.model.inductor:
        raise ConfigError(
            "model.tune and model.inductor are both true; tune in a short run of its own (trainer.max_steps=1): what it"
            " measures is kept for this machine"
        )
    if (cfg.model.nsys_profile or {}).get("enabled"):
        raise ConfigError(
            "model.nsys_profile.enabled is true; start the profiler from outside: nsys profile python -m"
            " controlnet.train ..., and set it to false"
        )


def _one_of(given: Mapping[str, Any], *paths: str) -> Any:
    """Returns the value that any of several keys has, None if none is set. Raises ConfigError if they differ."""
    values = {path: given[path] for path in paths if given.get(path) is not None}
    (first, value), *others = values.items() or [("", None)]
    for path, other in others:
        if other != value:
            raise ConfigError(f"{first} is {shown(value)} and {path} {shown(other)}, which mean the same; keep {first}")
    return value


def _precision(cfg: Any, given: Mapping[str, Any]) -> None:
    ours = precision(cfg.trainer.precision)
    if cfg.model.precision is not None:
        theirs = precision(cfg.model.precision, "model.precision")
        if "trainer.precision" not in given:
            ours = theirs
        elif theirs != ours:
            raise ConfigError(f"model.precision is {theirs} and trainer.precision {ours}; set trainer.precision alone")
    cfg.trainer.precision = ours


def _learning_rate(cfg: Any, given: Mapping[str, Any]) -> None:
    rate = _one_of(given, "model.learning_rate", "model.base_learning_rate")
    if rate is None:
        return
    if "optim.lr" not in given:
        cfg.optim.lr = rate
    elif cfg.optim.lr != rate:
        logger.info("model.learning_rate %g is not used: optim.lr %g decides, as in NeMo", rate, cfg.optim.lr)


def _average(cfg: Any, given: Mapping[str, Any]) -> None:
    if not cfg.model.use_ema:
        return
    if given.get("exp_manager.ema.enable") is False and "exp_manager.ema.decay" not in given:
        raise ConfigError("model.use_ema is true and exp_manager.ema.enable false; keep exp_manager.ema.enable")
    cfg.exp_manager.ema.enable = True


def _optimizer(cfg: Any) -> None:
    if cfg.optim.name in FUSED_ADAM:
        logger.info("optim.name %s: the fused AdamW of PyTorch", cfg.optim.name)
        cfg.optim.name = "fused_adam"
    schedule = cfg.optim.sched
    decays = not str(schedule.name).lower().startswith(("warmup", "constant"))
    if schedule.hold_steps and decays:
        raise ConfigError(
            f"optim.sched.hold_steps is {schedule.hold_steps} with the decay of {schedule.name}; the rate is held only"
            " by WarmupHoldPolicy, to the end"
        )


def seconds(text: str, path: str) -> int:
    """Converts "DAYS:HOURS:MINUTES:SECONDS" to seconds; leading parts may be left out."""
    parts = text.split(":")
    if len(parts) > 4 or not all(part.isascii() and part.isdigit() and len(part) < 7 for part in parts):
        raise ConfigError(f"{path} is {text!r}; expected DAYS:HOURS:MINUTES:SECONDS, such as 00:03:55:00")
    units = (1, 60, 3600, 86400)
    return sum(int(part) * unit for part, unit in zip(reversed(parts), units, strict=False))


def _time_limit(cfg: Any, given: Mapping[str, Any]) -> None:
    limit = _one_of(given, "exp_manager.max_time_per_run", "trainer.max_time")
    if limit is not None:
        seconds(limit, "exp_manager.max_time_per_run")
    cfg.exp_manager.max_time_per_run = limit


def _batch_entries(cfg: Any, given: Mapping[str, Any]) -> None:
    """Takes names of batch entries that look like a file extension as the extensions in the shards."""
    names = {"image": "first_stage_key", "caption": "cond_stage_key", "hint": "control_key"}
    if len({cfg.model[key] for key in names.values()}) < 3 or "keys" in {cfg.model[key] for key in names.values()}:
        raise ConfigError(
            f"model.{', model.'.join(names.values())} are {', '.join(cfg.model[key] for key in names.values())};"
            ' expected three different names other than "keys"'
        )
    for role, key in names.items():
        name, path = cfg.model[key], f"data.train.extensions.{role}"
        last = name.lower().rpartition(".")[2]
        if path not in given and (last == "txt" if role == "caption" else last in IMAGE_EXTENSIONS):
            cfg.data.train.extensions[role] = name


def _strategy(cfg: Any) -> None:
    strategy = cfg.trainer.strategy
    name = strategy.get("_target_", "").rpartition(".")[2] if isinstance(strategy, Mapping) else strategy
    if name is not None and not DATA_PARALLEL.fullmatch(str(name).lower()):
        raise ConfigError(
            f"trainer.strategy is {shown(strategy)}; ranks are data-parallel here: leave it out, or set it to ddp"
        )


def _checkpoints(cfg: Any) -> None:
    callback = cfg.exp_manager.checkpoint_callback_params
    newest = callback.monitor in (None, "step", "global_step", "epoch", "consumed_samples")
    if callback.save_top_k > 0 and not newest:
        raise ConfigError(
            f"exp_manager.checkpoint_callback_params.monitor is {callback.monitor!r} with save_top_k"
            f" {callback.save_top_k}; the newest checkpoints are kept here, not the best: set monitor to null"
        )


def _parts(cfg: Any, given: Mapping[str, Any]) -> None:
    for stage in ("unet_config", "control_stage_config"):
        node = cfg.model[stage]
        if node is None:
            continue
        channels = node.get("in_channels")
        if cfg.model.channels is not None and channels is not None and cfg.model.channels != channels:
            raise ConfigError(
                f"model.channels is {cfg.model.channels} and model.{stage}.in_channels {channels}; leave out the former"
            )
        if node.get("unet_precision") is not None:
            path = f"model.{stage}.unet_precision"
            theirs = precision(node["unet_precision"], path)
            if theirs not in ("fp32", cfg.trainer.precision):
                raise ConfigError(f"{path} is {theirs} and trainer.precision {cfg.trainer.precision}; set the latter")
