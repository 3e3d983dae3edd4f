"""Builds the model and its conditioning from the `model` section of a configuration, and loads their weights."""

import logging
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from controlnet import checkpoints
from controlnet.conditioning import (
    AutoencoderKL,
    CLIPTextEncoder,
    Conditioning,
    SpaceToDepth,
    TextEncoders,
    WordEmbedder,
)
from controlnet.config import ConfigError, canonical_node, canonical_target, check_stage, stage_of, stages
from controlnet.model.architecture import Architecture
from controlnet.model.controlled import ControlledUNet
from controlnet.model.controlnet import ControlNet
from controlnet.model.diffusion import NoiseSchedule
from controlnet.model.unet import UNet

logger = logging.getLogger(__name__)

# What a `_target_` builds, under this package's name for it.
CLASSES: dict[str, type] = {
    stages.UNET: UNet,
    stages.CONTROLNET: ControlNet,
    stages.AUTOENCODER: AutoencoderKL,
    stages.SPACE_TO_DEPTH: SpaceToDepth,
    stages.CLIP: CLIPTextEncoder,
    stages.TWO_CLIPS: TextEncoders,
    stages.WORDS: WordEmbedder,
}

_MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container

# Fields in which a ControlNet may differ from the U-Net that it is the copy of: they change how, not what, it computes.
_FREE = {"use_checkpoint", "use_flash_attention", "dropout", "legacy", "num_heads_upsample"}


def build_model(config: Mapping[str, Any], *, weights: bool = True) -> ControlledUNet:
    """Builds the locked U-Net with its ControlNet, and loads their weights.

    Args:
        config: the `model` section that `config.load` returns.
        weights: False builds without reading any file (on the meta device, or before a resume).
    The U-Net's weights are those of unet_config.from_pretrained, the ControlNet's those of
    control_stage_config.from_pretrained (a trained one) or .from_pretrained_unet (encoder and middle block of a U-Net);
    without either it is a copy of the U-Net built here. What `ckpt_path` holds replaces them.
    Returns the model in float32, in channels_last if the configuration says so; `requires_grad` follows sd_locked.
    Raises ConfigError when U-Net and ControlNet do not fit together; CheckpointError, FileNotFoundError.
    """
    unet = instantiate(_without_weights(config, "unet_config"))
    control = instantiate(_without_weights(config, "control_stage_config"))
    check_copy(unet.arch, control.arch)
    if weights:
        load_weights(unet, control, config)
    model = ControlledUNet(unet, control, sd_locked=config["sd_locked"], only_mid_control=config["only_mid_control"])
    return model.to(memory_format=torch.channels_last) if config["channels_last"] else model


def build_conditioning(config: Mapping[str, Any], *, weights: bool = True, precision: str = "fp32") -> Conditioning:
    """Builds the frozen first stage and condition stage, each in the precision of its `precision` key.

    Args: as `build_model`; `precision` is that of a stage without the key, but a first stage, which overflows in
    fp16, then has bf16, or fp32 on a GPU without bf16. A VAE runs on our fused blocks (`controlnet.accelerate`).
    `first_stage_model.*` and `cond_stage_model.*` of `ckpt_path` replace what the stages' own `from_pretrained` give,
    unless load_vae or load_encoder is false.
    Raises ConfigError when a stage does not fit the U-Net or has no weights; CheckpointError, FileNotFoundError.
    """
    built = {}
    path = config["ckpt_path"] if weights and not config["load_only_unet"] else None
    parts = checkpoints.parts(path) if path else ()
    for key, flag in (("first_stage_config", "load_vae"), ("cond_stage_config", "load_encoder")):
        part = key.removesuffix("_config")
        node = dict(require_part(config, key))
        if not weights:
            node.pop("from_pretrained", None)
        if node.get("precision") is None and "precision" in stages.ARGUMENTS[canonical_target(node["_target_"])]:
            node["precision"] = _without_overflow(precision) if part == "first_stage" else precision
        stage = built[part] = instantiate(node)
        held = [name for name in getattr(stage, "parts", (part,)) if name in parts]
        if held and config[flag] and hasattr(stage, "load"):
            for name in held:
                stage.load(checkpoints.part_tensors(path, name), path)
        elif weights and node["_target_"].endswith("AutoencoderKL") and not node.get("from_pretrained"):
            raise ConfigError(f"model.{key}.from_pretrained is not given; expected the file or folder of its weights")
    if isinstance(built["first_stage"], AutoencoderKL):
        _accelerate(built["first_stage"].vae)
    conditioning = Conditioning(built["first_stage"], built["cond_stage"], config["scale_factor"])
    _check_stages(conditioning, config)
    return conditioning


def build_schedule(config: Mapping[str, Any]) -> NoiseSchedule:
    """The noise schedule of the `model` section of a configuration."""
    return NoiseSchedule.from_config(config)


def _accelerate(vae: nn.Module) -> None:
    """Replaces the VAE's blocks by fused ones, in place, or warns about a release of diffusers that was not tested."""
    from controlnet.diffusers import accelerate  # diffusers is an optional package

    try:
        accelerate(vae)
    except ImportError as error:
        logger.warning("the first stage runs diffusers' own blocks: %s", error)


def _without_overflow(precision: str) -> str:
    if precision != "fp16":
        return precision
    return "bf16" if not torch.cuda.is_available() or torch.cuda.is_bf16_supported(False) else "fp32"


def instantiate(node: Mapping[str, Any]) -> Any:
    """Builds one part: calls the class that `_target_` names with the other keys as arguments.

    Args:
        node: mapping with `_target_` (this package's name, NeMo's, the original's) and the arguments.
    Raises ConfigError for an unknown target or argument, a value that does not fit, an argument that is missing, or
        more weights than this machine has memory; CheckpointError and FileNotFoundError for files of weights.
    """
    tree = canonical_node(node)
    if "_target_" not in tree:
        raise ConfigError(f"no _target_ among the keys {', '.join(map(str, tree)) or '(none)'}")
    target = canonical_target(tree["_target_"])
    if target not in CLASSES:
        raise ConfigError(f"_target_ {target} is not a part; expected one of {', '.join(CLASSES)}")
    stage = stage_of(target)
    arguments = check_stage(tree, stage)
    del arguments["_target_"]
    wanted = [key for key, entry in stages.ARGUMENTS[target].items() if entry.default is ...]
    missing = [key for key in wanted if key not in arguments]
    if missing:
        raise ConfigError(f"model.{stage}: {target} wants a value for {', '.join(missing)}")
    try:
        _check_memory(target, arguments)
        return CLASSES[target](**arguments)
    except ValueError as error:
        if type(error) is not ValueError:  # a subclass, whose message already names key or file
            raise
        raise ConfigError(f"model.{stage}: {error}") from error


def _check_memory(target: str, arguments: Mapping[str, Any]) -> None:
    """Raises ValueError when the weights, in float32, do not fit into the memory of this machine."""
    sized = {key: value for key, value in arguments.items() if key != "from_pretrained"}
    folder = target == stages.AUTOENCODER and os.path.isdir(arguments.get("from_pretrained") or "")
    if target not in (stages.UNET, stages.CONTROLNET, stages.AUTOENCODER) or folder:  # a folder has its own sizes
        return
    with torch.device("meta"):
        numbers = sum(parameter.numel() for parameter in CLASSES[target](**sized).parameters())
    there_is = physical_memory()
    if 4 * numbers > there_is:
        raise ValueError(
            f"these sizes make {numbers:,} weights, {4 * numbers / 2**30:,.0f} GiB in float32; this machine has"
            f" {there_is / 2**30:.0f} GiB of memory"
        )


def physical_memory() -> int:
    """Returns the bytes of memory of this machine, or of the container that the process runs in."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _MEMORY_LIMIT.read_text().strip() if _MEMORY_LIMIT.is_file() else ""
    return min(total, int(limit)) if limit.isdigit() else total


def require_part(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Returns the node of a part; raises ConfigError where it is None."""
    if config[key] is None:
        raise ConfigError(f"model.{key} is not given; expected a mapping with a _target_")
    return config[key]


def _without_weights(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    node = require_part(config, key)
    ours = stages.WEIGHT_KEYS[canonical_target(node["_target_"])]
    return {name: value for name, value in node.items() if name not in ours}


def load_weights(unet: UNet, control: ControlNet, config: Mapping[str, Any]) -> None:
    """Loads the weights that a configuration names into models from `build_model(..., weights=False)`.

    Callers build the conditioning first: stages that do not fit are then reported before gigabytes are read.
    Raises as `build_model`.
    """
    ours, theirs = config["unet_config"], config["control_stage_config"]
    path = config["ckpt_path"]
    parts = checkpoints.parts(path) if path else ()
    if path and not {"unet", "control"} & set(parts):
        raise ConfigError(f"model.ckpt_path {path} holds {', '.join(parts)}; expected a U-Net or a ControlNet")

    ready = []  # check all files before loading any
    if ours.get("from_pretrained"):
        ready.append(checkpoints.ready_unet(unet, ours["from_pretrained"], ours.get("from_NeMo")))
    if "unet" in parts and config["load_unet"]:
        ready.append(checkpoints.ready_unet(unet, path))
    elif not ours.get("from_pretrained"):
        logger.warning("neither model.unet_config.from_pretrained nor model.ckpt_path gives the U-Net weights: random")

    if "control" in parts and not config["load_only_unet"]:
        ready.append(checkpoints.ready_control(control, path, source="control"))
    elif theirs.get("from_pretrained"):
        ready.append(checkpoints.ready_control(control, theirs["from_pretrained"], theirs.get("from_NeMo")))
    elif theirs.get("from_pretrained_unet"):
        base = theirs["from_pretrained_unet"]
        ready.append(checkpoints.ready_control(control, base, theirs.get("from_NeMo"), source="unet"))
    for weights in ready:
        weights.load()
    if all(weights.module is not control for weights in ready):
        control.copy_from(unet)


def check_copy(unet: Architecture, control: Architecture) -> None:
    """Raises ConfigError unless the ControlNet can be a copy of this U-Net's encoder."""
    for field in fields(Architecture):
        ours, theirs = getattr(unet, field.name), getattr(control, field.name)
        if field.type is not Any and field.name not in _FREE and ours != theirs:
            raise ConfigError(
                f"model.control_stage_config.{field.name} is {theirs!r}; expected {ours!r}, as model.unet_config has it"
            )


def check_vector(given: int | None, taken: int | None, what: str) -> None:
    """Raises ConfigError unless the condition stage's vector y has as many channels as the U-Net takes."""
    if given != taken:
        stage = "no vector y" if given is None else f"a vector y of {given} channels"
        raise ConfigError(
            f"{what} is {taken}; expected {given}: the condition stage gives {stage}"
            " (controlnet.conditioning.TextEncoders gives Stable Diffusion XL's, 2816: the pooled prompt's 1280 and 256"
            " of each of six time ids)"
        )


def _check_stages(conditioning: Conditioning, config: Mapping[str, Any]) -> None:
    unet, control = config["unet_config"], config["control_stage_config"]
    if conditioning.latent_channels != unet["in_channels"]:
        raise ConfigError(
            f"model.unet_config.in_channels is {unet['in_channels']}; expected {conditioning.latent_channels}, the"
            " channels of the first stage's latents"
        )
    context_dim = unet.get("context_dim")
    if isinstance(context_dim, int) and conditioning.context_dim != context_dim:
        raise ConfigError(
            f"model.unet_config.context_dim is {context_dim}; expected {conditioning.context_dim}, the features of the"
            " condition stage's context"
        )
    check_vector(conditioning.vector_channels, unet.get("adm_in_channels"), "model.unet_config.adm_in_channels")
    hint_factor = 2 ** (len(control.get("hint_block_channels", (16, 32, 96, 256))) - 1)
    if conditioning.factor != hint_factor:
        raise ConfigError(
            f"model.control_stage_config.hint_block_channels shrinks the hint {hint_factor} times; expected"
            f" {conditioning.factor} times, as the first stage does the image"
        )
