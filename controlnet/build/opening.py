"""Opens trained ControlNets for inference, with their configuration or with the Stable Diffusion that they control."""

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from controlnet import checkpoints, config
from controlnet.build import models
from controlnet.checkpoints import archive, trained
from controlnet.checkpoints.convert import load as load_parts
from controlnet.checkpoints.folders import XL_SCALE_FACTOR
from controlnet.conditioning import AutoencoderKL, CLIPTextEncoder, Conditioning, TextEncoders
from controlnet.config import ConfigError
from controlnet.data.hints import HintReader, read_hint
from controlnet.model.controlled import ControlledUNet
from controlnet.model.controlnet import ControlNet
from controlnet.model.diffusion import NoiseSchedule
from controlnet.model.several import SeveralControlNets

logger = logging.getLogger(__name__)

PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}  # diffusers' names
SCALE_FACTOR = 0.18215  # of Stable Diffusion's latents
DISTILLED = ("LCMScheduler", "TCDScheduler")  # diffusers' schedulers of few-step models


@dataclasses.dataclass
class Origin:
    """The sources of the models. Only what decoding the hints needs has been read; `models` loads the weights.

    Attributes:
        cfg: the configuration of the first checkpoint, None with a base.
        base: checkpoint of the Stable Diffusion that is controlled, instead of a configuration.
        readers: how the hint of each ControlNet is decoded.
        factor: what the size of a picture must be divisible by.
    """

    paths: Sequence[Path]
    weights: Sequence[float]
    average: bool
    cfg: Any
    base: Path | None
    readers: list[HintReader]
    factor: int
    controls: dict[int, ControlNet]  # by position in `paths`; the others are loaded by `models`

    def models(self) -> tuple[ControlledUNet, Conditioning, NoiseSchedule]:
        """Loads the model with its conditioning and noise schedule, on the CPU, in float32.

        Raises CheckpointError, ConfigError, FileNotFoundError.
        """
        if self.cfg is not None:
            model, conditioning = self._configured()
            schedule = models.build_schedule(self.cfg.model)
        else:
            unet = load_parts(self.base).unet
            if unet is None:
                raise checkpoints.CheckpointError(f"--base {self.base} holds no U-Net")
            models.check_copy(unet.arch, self.controls[0].arch)
            model = ControlledUNet(unet, self.controls[0])
            is_xl = unet.arch.num_classes is not None
            conditioning, schedule = _conditioning_of(self.base, is_xl), _schedule_of(self.base)
            vector = conditioning.vector_channels
            models.check_vector(vector, unet.arch.adm_in_channels, f"adm_in_channels of --base {self.base}")
        if len(self.paths) > 1:
            controls = [model.control, *(self.controls[number] for number in range(1, len(self.paths)))]
            model.control = SeveralControlNets(controls, self.weights)
        elif list(self.weights) != [1.0]:
            model.control = SeveralControlNets([model.control], self.weights)
        return model.float().eval(), conditioning, schedule

    def hint(self, paths: Sequence[Path], size: tuple[int, int] | None = None) -> Tensor:
        """Reads the hints of all ControlNets and joins them: [1, C, H, W] in [0, 1].

        Args:
            paths: one file for each ControlNet.
            size: width and height to which they are brought; by default that of the first hint.
        """
        hints: list[Tensor] = []
        for path, reader in zip(paths, self.readers, strict=True):
            hints.append(read_hint(path, size, reader))
            size = size or (hints[0].shape[3], hints[0].shape[2])
        return torch.cat(hints, dim=1)

    def _configured(self) -> tuple[ControlledUNet, Conditioning]:
        node, path = self.cfg.model, self.paths[0]
        found = checkpoints.resolve(path)
        if found.kind != "checkpoint" and node.ckpt_path is None:
            node.ckpt_path = str(path)  # loads the file's U-Net, VAE and text encoder, too
        model, conditioning = models.build_model(node), models.build_conditioning(node)
        if found.kind == "checkpoint":
            trained.load_model(model, found.folder)
            if self.average and found.average is not None:
                trained.load_average(model, found.folder)
        elif node.ckpt_path != str(path) or "control" not in checkpoints.parts(path):
            checkpoints.load_control(model.control, path, source="control")
        return model, conditioning


def open_origin(
    paths: Sequence[Path],
    *,
    config_file: Path | None = None,
    base: Path | None = None,
    weights: Sequence[float] | None = None,
    overrides: Sequence[str] = (),
    average: bool = True,
) -> Origin:
    """Finds one or several ControlNets and the Stable Diffusion that they control, without loading its weights.

    Args:
        paths: of each ControlNet a run's folder (its newest complete checkpoint is taken), a checkpoint's folder, a
            diffusers folder, or a file of any layout that `checkpoints` reads.
        config_file: YAML of the first one; by default the one in its checkpoint's folder.
        base: a diffusers pipeline's folder or a Stable Diffusion checkpoint; its U-Net, VAE, text encoder and noise
            schedule are taken, and no configuration is needed.
        weights: of each ControlNet (default 1).
        overrides: settings of the configuration, `key=value`.
        average: take the averaged weights where a run kept them.
    Raises CheckpointError, ConfigError, FileNotFoundError.
    """
    weights = [1.0] * len(paths) if not weights else list(weights)
    if len(weights) != len(paths):
        raise ConfigError(f"--weight is given {len(weights)} times for {len(paths)} ControlNets; expected one for each")
    found, cfg, controls = checkpoints.resolve(paths[0]), None, {}
    if config_file is None and base is None and found.kind == "pipeline":
        base = paths[0]
    if base is None:
        cfg = _configuration(paths[0], config_file or found.config, overrides)
        if found.kind != "checkpoint" and "control" not in checkpoints.parts(paths[0]):
            raise checkpoints.CheckpointError(f"{paths[0]} holds no ControlNet")
    elif config_file is not None or overrides:
        raise ConfigError("--base takes all from its checkpoint; leave out --config and settings, or --base")
    if base is not None:
        _schedule_of(base)  # raises for an unsupported scheduler before weights are loaded
    for number, path in enumerate(paths):
        if number or cfg is None:
            controls[number] = _control(path, base, average)
    if cfg is not None:
        node = models.require_part(cfg.model, "control_stage_config")
        first = HintReader.from_config(cfg.data.train.hint, node["hint_channels"])
        factor = 2 ** (len(node.get("hint_block_channels", (16, 32, 96, 256))) - 1)
    else:
        first, factor = HintReader(controls[0].arch.hint_channels), controls[0].arch.hint_factor
    readers = [first, *(HintReader(controls[number].arch.hint_channels) for number in range(1, len(paths)))]
    return Origin(paths, weights, average, cfg, base, readers, factor, controls)


def _configuration(path: Path, file: Path | None, overrides: Sequence[str]) -> Any:
    if file is not None:
        return config.load(file, overrides, sections=("model",))
    if path.suffix != ".nemo":
        kind = "folder" if path.is_dir() else "file"
        raise ConfigError(
            f"{path} is a {kind}, which holds no configuration; give one with --config, or with --base the Stable"
            " Diffusion that it controls"
        )
    cfg = config.compose({"model": config.parse(archive.read_config(path), path)}, overrides, sections=("model",))
    held = checkpoints.parts(path)
    for part, key in (
        ("unet", "unet_config"),
        ("control", "control_stage_config"),
        ("first_stage", "first_stage_config"),
    ):
        for name in ("from_pretrained", "from_pretrained_unet"):  # paths on the machine that wrote the file
            if part in held and cfg.model[key] is not None:
                cfg.model[key].pop(name, None)
    return cfg


def _control(path: Path, base: Path | None, average: bool) -> ControlNet:
    control = load_parts(path, base=base if base != path else None, average=average).control
    if control is None:
        raise checkpoints.CheckpointError(f"{path} holds no ControlNet")
    return control


def _conditioning_of(base: Path, is_xl: bool) -> Conditioning:
    """Loads the first stage and the text encoders of a Stable Diffusion checkpoint."""
    first_stage = AutoencoderKL(from_pretrained=str(base))
    text = TextEncoders if is_xl else CLIPTextEncoder
    stated = first_stage.vae.config.scaling_factor
    if is_xl and not base.is_dir():
        stated = XL_SCALE_FACTOR  # a single file does not state one
    where = "version" if base.is_dir() else "from_pretrained"
    return Conditioning(first_stage, text(**{where: str(base)}), stated or SCALE_FACTOR)


def _schedule_of(base: Path) -> NoiseSchedule:
    """Returns the noise schedule in a pipeline's folder, or Stable Diffusion 1's where there is none."""
    file = base / "scheduler" / "scheduler_config.json"
    stated = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    prediction = stated.get("prediction_type", "epsilon")
    shape = stated.get("beta_schedule", "scaled_linear")
    if stated.get("timestep_spacing") == "trailing" or stated.get("_class_name") in DISTILLED:
        raise ConfigError(
            f"{file} has {stated.get('_class_name')} with timestep_spacing {stated.get('timestep_spacing')!r}, the"
            " scheduler of a model made to draw in a few steps (Turbo, Lightning, LCM), which is not served; take the"
            " base model, or diffusers' pipeline with controlnet.accelerate"
        )
    if prediction not in PREDICTIONS or shape not in ("scaled_linear", "linear"):
        raise ConfigError(f"{file} has prediction_type {prediction!r}, beta_schedule {shape!r}; use --config instead")
    return NoiseSchedule(
        stated.get("num_train_timesteps", 1000),
        stated.get("beta_start", 0.00085),
        stated.get("beta_end", 0.012),
        beta_schedule="linear" if shape == "scaled_linear" else "sqrt_linear",
        parameterization=PREDICTIONS[prediction],
    )
