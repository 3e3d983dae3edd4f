"""Loads any checkpoint, and makes one of another: another format, another base, a ControlNet for a base."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from controlnet.checkpoints.bundle import Bundle, open_bundle
from controlnet.checkpoints.errors import CheckpointError
from controlnet.checkpoints.layouts import grouped
from controlnet.checkpoints.weights import CONTROL_ONLY, Report, check_finite
from controlnet.checkpoints.write import write
from controlnet.model.controlnet import ControlNet
from controlnet.model.unet import UNet

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """What a checkpoint held.

    Attributes:
        unet, control: the models, in the file's own dtype; None where the file has none. The U-Net's parameters do not
            require gradients, the ControlNet's do.
        first_stage, cond_stage: the tensors of VAE and text encoder under the original's names, if there are any.
        cond_stage_2: those of Stable Diffusion XL's second text encoder.
        report: which tensors the models took, and which the file has besides.
    """

    unet: UNet | None
    control: ControlNet | None
    first_stage: dict[str, Tensor]
    cond_stage: dict[str, Tensor]
    report: Report
    cond_stage_2: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Conversion:
    """What a conversion did: how many tensors of each part were written, and the names of those that were left out."""

    src: str
    layout: str
    dst: str
    format: str
    written: dict[str, int]
    left_out: list[str]

    def __str__(self) -> str:
        text = ", ".join(f"{part} {count}" for part, count in self.written.items())
        text = f"{self.src} ({self.layout}) -> {self.dst} ({self.format}): {text} tensors"
        rest = f"; {len(self.left_out)} left out, for which the format has no place ({grouped(self.left_out)})"
        return text + (rest if self.left_out else "")


def load(path: str | Path, *, base: str | Path | None = None, average: bool = True, **params: Any) -> Loaded:
    """The models in a checkpoint of any known layout, which its keys tell.

    Args:
        path: an original ControlNet (with or without its U-Net), a Stable Diffusion checkpoint, a NeMo checkpoint in
            either generation of names, or a diffusers file: .safetensors, .ckpt, .pth, .pt, .bin, .nemo; a diffusers
            folder, of a model or a pipeline, in shards or of a variant (fp16), too; the folder of a training run, whose
            newest complete checkpoint is taken, or of one checkpoint.
        base: a checkpoint with the U-Net to which a ControlNet stored as a difference, or a Control-LoRA, is added.
        average: of a training run, take the averaged weights where it kept them.
        params: parameters of U-Net and ControlNet that the file does not tell.

    Returns:
        `Loaded`. The architecture is read off the tensors' shapes. The one thing that has no shape is the heads: they
        are those that the checkpoint states (config.json, our own metadata, a run's configuration), else 8 for models
        with 1x1 convolutions around their transformers (Stable Diffusion 1), and one for each 64 channels for those
        with linear layers (Stable Diffusion 2 and XL). For others give num_heads or num_head_channels.

    Raises:
        FileNotFoundError: nothing is there.
        CheckpointError: a damaged or foreign file, mixed layouts, and tensors that are missing, too many, of another
            shape than the architecture's or not finite, which it lists.
    """
    return _loaded(open_bundle(path, base=base, average=average, **params))


def convert(
    src: str | Path,
    dst: str | Path,
    format: str,
    *,
    base: str | Path | None = None,
    average: bool = True,
    **params: Any,
) -> Conversion:
    """Writes a checkpoint in another format, bit for bit.

    Args:
        src, base, average, params: as `load`'s.
        dst: a file (.safetensors; where asked for by name .ckpt, .pth, .pt, .bin, or .nemo for NeMo), or for diffusers
            a new folder with config.json and weights; with subfolders like a pipeline's when there are several parts. A
            file that is there is replaced.
        format: "original", "diffusers", "nemo" (names of release 2) or "nemo-1.23".

    Returns:
        `Conversion`. VAE and text encoder go along. Left out of diffusers' format are EMA copies and noise schedules,
        for which it has no place, and the text encoder of Stable Diffusion 2 (OpenCLIP), whose tensors transformers
        stores split.

    Raises:
        The errors of `load`, and of `write.write` for dst and format. After an error nothing is at dst that was not
        there before.
    """
    return _written(open_bundle(src, base=base, average=average, **params), dst, format)


def transfer(
    control: str | Path,
    from_base: str | Path,
    to_base: str | Path,
    dst: str | Path | None = None,
    format: str = "original",
    **params: Any,
) -> Loaded:
    """A ControlNet for another base than the one it was trained on.

        tensor + (to_base's - from_base's)    for each tensor that the ControlNet has from its base; others stay

    Args:
        control: a checkpoint with a ControlNet, also one stored as a difference to from_base. A U-Net beside it is
            moved to the new base the same way, and VAE and text encoder beside it are replaced by those of to_base.
        from_base, to_base: checkpoints with the U-Net it was trained on, and the one it is to work with.
        dst, format: where and how to write the result; nowhere by default.
        params: as `load`'s, for all three.

    Returns:
        The models, in the dtypes of `control`; the sum is computed in float32.

    Raises:
        The errors of `load`.
        CheckpointError: one of the files lacks its part, or the U-Nets are not alike.

    Source: the original repository's tool_transfer_control.py.
    """
    moved = open_bundle(control, base=from_base, **params)
    old, new = (open_bundle(path, **params) for path in (from_base, to_base))
    _require(moved, "control")
    for base in (old, new):
        _require(base, "unet")
        trunk = {name for name in moved.parts["control"] if not name.startswith(CONTROL_ONLY)}
        missing = sorted(trunk - base.parts["unet"].keys())
        if missing:
            raise CheckpointError(
                f"{base.path} lacks {len(missing)} tensors of {moved.path}'s encoder, {missing[0]} first; expected its"
                " base, or another of the same architecture"
            )
    parts = dict(moved.parts)
    for part in {"unet", "control"} & parts.keys():
        parts[part] = {
            name: _moved(tensor, old.parts["unet"].get(name), new.parts["unet"].get(name), f"{part}: {name}")
            for name, tensor in parts[part].items()
        }
    for part in {"first_stage", "cond_stage", "cond_stage_2"} & parts.keys() & new.parts.keys():
        parts[part] = new.parts[part]
    return _result(Bundle(moved.path, moved.layout, parts, moved.extras, moved.architectures), dst, format)


def add_control(
    base: str | Path,
    dst: str | Path | None = None,
    format: str = "original",
    *,
    hint_channels: int = 3,
    hint_block_channels: tuple[int, ...] = (16, 32, 96, 256),
    **params: Any,
) -> Loaded:
    """A new ControlNet for a Stable Diffusion checkpoint: encoder and middle block are copies of the U-Net's.

    Args:
        base: a checkpoint with a U-Net. A ControlNet that it has already is an error.
        dst, format: where and how to write base and ControlNet together; nowhere by default.
        hint_channels, hint_block_channels: of the hint encoder, as `ControlNet`'s.
        params: as `load`'s.

    Returns:
        The models. The ControlNet's outputs are zero until it is trained: zero convolutions start at zero. The hint
        encoder's other convolutions are random, by torch's global generator.

    Raises:
        The errors of `load`.
        CheckpointError: there is no U-Net, or a ControlNet.
    """
    bundle = open_bundle(base, **params)
    _require(bundle, "unet")
    if "control" in bundle.parts:
        raise CheckpointError(f"{base} holds a ControlNet already; expected a U-Net without")
    unet = bundle.architectures["unet"]
    shared = {name: value for name, value in vars(unet).items() if name != "out_channels"}
    hint = {"hint_channels": hint_channels, "hint_block_channels": hint_block_channels}
    trunk = bundle.parts["unet"]
    fresh = ControlNet(**shared, **hint).to(trunk["input_blocks.0.0.weight"].dtype)
    copy = {name: trunk[name].clone() if name in trunk else tensor for name, tensor in fresh.state_dict().items()}
    parts = bundle.parts | {"control": copy}
    architectures = bundle.architectures | {"control": fresh.arch}
    return _result(Bundle(bundle.path, bundle.layout, parts, bundle.extras, architectures), dst, format)


def _result(bundle: Bundle, dst: str | Path | None, format: str) -> Loaded:
    if dst is not None:
        _written(bundle, dst, format)
    return _loaded(bundle)


def _written(bundle: Bundle, dst: str | Path, format: str) -> Conversion:
    left_out = write(bundle, dst, format)
    gone = set(left_out)
    counts = {
        part: sum(bundle.prefixes[part] + name not in gone for name in names) for part, names in bundle.parts.items()
    }
    kept = {part: count for part, count in counts.items() if count}
    conversion = Conversion(bundle.path, bundle.layout, str(dst), format, kept, left_out)
    logger.info("%s", conversion)
    return conversion


def _loaded(bundle: Bundle) -> Loaded:
    for part in bundle.architectures:
        check_finite(bundle.parts[part], f"{bundle.path} ({part})")
    models = {part: bundle.model(part) for part in bundle.architectures}
    matched = [bundle.prefixes[part] + name for part in models for name in bundle.parts[part]]
    report = Report(bundle.path, bundle.layout, matched, [], list(bundle.extras))
    logger.info("%s", report)
    first, text, second = (bundle.parts.get(part, {}) for part in ("first_stage", "cond_stage", "cond_stage_2"))
    return Loaded(models.get("unet"), models.get("control"), first, text, report, second)


def _moved(tensor: Tensor, old: Tensor | None, new: Tensor | None, name: str) -> Tensor:
    """tensor + (new - old), in float32, where the base has it."""
    if old is None or new is None:
        return tensor
    if not tensor.shape == old.shape == new.shape:
        shapes = ", ".join(str(list(t.shape)) for t in (tensor, old, new))
        raise CheckpointError(f"{name} has the shapes {shapes} in control, from_base and to_base; expected one")
    with torch.no_grad():
        return (tensor.float() + (new.float() - old.float())).to(tensor.dtype)


def _require(bundle: Bundle, part: str) -> None:
    if part not in bundle.parts:
        what = {"unet": "a U-Net", "control": "a ControlNet"}[part]
        raise CheckpointError(f"{bundle.path} holds {', '.join(bundle.parts)}; expected {what}")
