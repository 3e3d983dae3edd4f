"""A whole checkpoint, of any layout, as one thing: its parts under the original's names, and their architectures."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from controlnet.checkpoints import layouts, relative, shapes
from controlnet.checkpoints.contents import open_contents, part_tensors
from controlnet.checkpoints.errors import CheckpointError
from controlnet.checkpoints.layouts import MODELS, Contents
from controlnet.checkpoints.weights import compare, listing, near
from controlnet.model.architecture import Architecture
from controlnet.model.controlnet import ControlNet
from controlnet.model.unet import UNet

CLASSES = {"unet": UNet, "control": ControlNet}
_HEADS = {"num_heads", "num_head_channels"}
_LISTED = 8


@dataclass(frozen=True)
class Bundle:
    """A checkpoint's content.

    Attributes:
        path: where it came from.
        layout: "original", "nemo" or "diffusers".
        parts: of "unet", "control", "first_stage", "cond_stage" and "cond_stage_2" those that are there, each with its
            tensors under the original's names, without prefix.
        extras: the file's other tensors (EMA copies, noise schedules) under its own names, without NeMo's "model.".
        architectures: of the U-Net and of the ControlNet.
    """

    path: str
    layout: str
    parts: dict[str, dict[str, Tensor]]
    extras: dict[str, Tensor] = field(default_factory=dict)
    architectures: dict[str, Architecture] = field(default_factory=dict)

    @property
    def is_xl(self) -> bool:
        """Whether it is of Stable Diffusion XL, which has a second text encoder, and a vector beside the timestep."""
        has_vector = any(architecture.num_classes is not None for architecture in self.architectures.values())
        return has_vector or "cond_stage_2" in self.parts

    @property
    def prefixes(self) -> dict[str, str]:
        """The original's prefix of each part."""
        return layouts.prefixes(self.parts, self.is_xl)

    def model(self, part: str) -> nn.Module:
        """The part's U-Net or ControlNet, with the file's tensors themselves as its parameters."""
        model = skeleton(self.architectures[part], part)
        model.load_state_dict(self.parts[part], assign=True)
        return model.requires_grad_(part == "control")


def open_bundle(path: str | Path, *, base: str | Path | None = None, average: bool = True, **params: Any) -> Bundle:
    """Reads a checkpoint of any layout and checks that its tensors are all those of one architecture, and no others.

    Args:
        path, average: as `open_contents`.
        base: a checkpoint with the U-Net to which a ControlNet stored as a difference, or a Control-LoRA, is added.
            A U-Net beside the ControlNet in its own file is the base without saying.
        params: parameters of U-Net and ControlNet that shapes do not tell, num_heads or num_head_channels above all.

    Raises:
        FileNotFoundError: nothing is there.
        CheckpointError: everything else.
    """
    contents = open_contents(path, average=average)
    parts = {part: part_tensors(contents, part, str(path)) for part in contents.parts}
    if contents.relative is not None and "control" in parts:
        parts["control"] = _absolute(parts, contents.relative, str(path), base)
    bundle = Bundle(str(path), contents.layout, parts, _extras(contents))
    for part in MODELS & parts.keys():
        origin = f"{path} ({part})"
        stated = {} if _HEADS & params.keys() else contents.stated.get(part, {})
        found = shapes.parameters(parts[part], part, origin, **{**stated, **params})
        bundle.architectures[part] = shapes.architecture(found, part, origin)
        check(bundle.architectures[part], part, parts[part], origin)
    return bundle


def _absolute(
    parts: Mapping[str, dict[str, Tensor]], kind: str, origin: str, base: str | Path | None
) -> dict[str, Tensor]:
    if base is None and "unet" not in parts:
        raise relative.refusal(kind, origin)
    if base is None:
        return relative.absolute(parts["control"], parts["unet"], kind, origin)
    contents = open_contents(base, "unet")
    if "unet" not in contents.parts:
        raise CheckpointError(f"base {base} holds no U-Net; expected the one that {origin} was made for")
    return relative.absolute(parts["control"], part_tensors(contents, "unet", str(base)), kind, origin)


def skeleton(architecture: Architecture, part: str) -> nn.Module:
    """The part's model without memory for its tensors."""
    with torch.device("meta"):
        return CLASSES[part](**vars(architecture))


def check(architecture: Architecture, part: str, tensors: Mapping[str, Tensor], origin: str) -> None:
    """CheckpointError, listing names, unless the tensors are the model's: none missing, none more, of its shapes."""
    wanted = skeleton(architecture, part).state_dict()
    compare(wanted, tensors, origin, lambda name: False)
    surplus = [name for name in tensors if name not in wanted]
    if surplus:
        rows = [name + near(name, wanted, "in the model") for name in surplus[:_LISTED]]
        raise CheckpointError(
            f"{origin} has {len(surplus)} tensors more than its architecture: {listing(rows, surplus)}"
        )
    odd = [name for name, tensor in wanted.items() if tensors[name].shape != tensor.shape]
    if odd:  # a [C, C] for a [C, C, 1, 1], which filling a model of known architecture forgives
        rows = [f"{name} is {list(tensors[name].shape)}, expected {list(wanted[name].shape)}" for name in odd[:_LISTED]]
        raise CheckpointError(f"{origin} mixes linear layers and 1x1 convolutions: {listing(rows, odd)}")


def _extras(contents: Contents) -> dict[str, Tensor]:
    used = {key for keys in contents.parts.values() for key in keys.values()}
    used |= {key for key in contents.tensors if relative.kind([key]) is not None}
    prefix = "model." if contents.layout == "nemo" else ""
    return {key.removeprefix(prefix): tensor for key, tensor in contents.tensors.items() if key not in used}
