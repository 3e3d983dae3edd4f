"""Any checkpoint, of any layout, as one thing: its parts under the original's names, and their architectures."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from controlnet.checkpoints import folders, layouts, shapes, vae
from controlnet.checkpoints.errors import CheckpointError
from controlnet.checkpoints.files import read
from controlnet.checkpoints.load import compare, listing
from controlnet.config import nearest
from controlnet.model.architecture import Architecture
from controlnet.model.controlnet import ControlNet
from controlnet.model.unet import UNet

MODELS = {"unet": UNet, "control": ControlNet}
METADATA = "controlnet.heads"  # in a safetensors file that we wrote: what its shapes do not tell, as JSON
_TEXT = "transformer.text_model."  # where the original has the CLIP text model in its condition stage
_HEADS = {"num_heads", "num_head_channels"}
_LISTED = 8


@dataclass(frozen=True)
class Bundle:
    """A checkpoint's content.

    Attributes:
        path: where it came from.
        layout: "original", "nemo" or "diffusers".
        parts: of "unet", "control", "first_stage" and "cond_stage" those that are there, each with its tensors under
            the original's names, without prefix.
        extras: the file's other tensors (EMA copies, noise schedules) under its own names, without NeMo's "model.".
        architectures: of the U-Net and of the ControlNet.
    """

    path: str
    layout: str
    parts: dict[str, dict[str, Tensor]]
    extras: dict[str, Tensor] = field(default_factory=dict)
    architectures: dict[str, Architecture] = field(default_factory=dict)

    def model(self, part: str) -> nn.Module:
        """The part's U-Net or ControlNet, with the file's tensors themselves as its parameters."""
        model = skeleton(self.architectures[part], part)
        model.load_state_dict(self.parts[part], assign=True)
        return model.requires_grad_(part == "control")


def open_bundle(path: str | Path, **params: Any) -> Bundle:
    """Reads a checkpoint of any layout and checks that its tensors are all those of one architecture, and no others.

    Arguments:
        path: a file or a diffusers folder, of one model or of a pipeline.
        params: parameters of U-Net and ControlNet that shapes do not tell, num_heads or num_head_channels above all.
    Raises FileNotFoundError; CheckpointError for everything else.
    """
    path = Path(path)
    contents, known = _contents(path)
    parts, extras = _parts(contents, str(path))
    bundle = Bundle(str(path), contents.layout, parts, extras)
    for part in MODELS.keys() & parts.keys():
        origin = f"{path} ({part})"
        stated = {} if _HEADS & params.keys() else known.get(part, {})
        found = shapes.parameters(parts[part], part, origin, **stated, **params)
        bundle.architectures[part] = shapes.architecture(found, part, origin)
        check(bundle.architectures[part], part, parts[part], origin)
    return bundle


def skeleton(architecture: Architecture, part: str) -> nn.Module:
    """The part's model without memory for its tensors."""
    with torch.device("meta"):
        return MODELS[part](**vars(architecture))


def check(architecture: Architecture, part: str, tensors: Mapping[str, Tensor], origin: str) -> None:
    """CheckpointError, listing names, unless the tensors are the model's: none missing, none more, of its shapes."""
    wanted = skeleton(architecture, part).state_dict()
    compare(wanted, tensors, origin, lambda name: False)
    surplus = [name for name in tensors if name not in wanted]
    if surplus:
        rows = [f"{name} (nearest in the model: {nearest(name, wanted)})" for name in surplus[:_LISTED]]
        raise CheckpointError(
            f"{origin} has {len(surplus)} tensors more than its architecture: {listing(rows, surplus)}"
        )
    odd = [name for name, tensor in wanted.items() if tensors[name].shape != tensor.shape]
    if odd:  # a [C, C] for a [C, C, 1, 1], which filling a model of known architecture forgives
        rows = [f"{name} is {list(tensors[name].shape)}, expected {list(wanted[name].shape)}" for name in odd[:_LISTED]]
        raise CheckpointError(f"{origin} mixes linear layers and 1x1 convolutions: {listing(rows, odd)}")


def _contents(path: Path) -> tuple[layouts.Contents, dict[str, dict[str, Any]]]:
    """The sorted tensors, and by part the parameters that the files state beside them."""
    subfolders = {part: path / name for part, name in folders.SUBFOLDERS.items() if (path / name).is_dir()}
    if path.is_dir() and subfolders:
        return _pipeline(path, subfolders)
    contents = layouts.sort(read(path))
    known = _stated(path) if path.is_file() else {}
    config = folders.read_config(path) if path.is_dir() else None
    if config is not None:
        known = {part: folders.heads(config, str(path)) for part in MODELS.keys() & contents.parts.keys()}
    return contents, known


def _pipeline(path: Path, subfolders: Mapping[str, Path]) -> tuple[layouts.Contents, dict[str, dict[str, Any]]]:
    several = sorted(folder.name for folder in path.glob("controlnet_*") if folder.is_dir())
    if several:
        raise CheckpointError(f"{path} has several ControlNets: controlnet, {', '.join(several)}; name one's folder")
    tensors: dict[str, Tensor] = {}
    parts: dict[str, dict[str, str]] = {}
    known = {}
    for part, folder in subfolders.items():
        found = read(folder)
        if part in MODELS:
            sorted_parts = layouts.sort(found).parts
            if part not in sorted_parts:
                raise CheckpointError(f"{folder} holds {', '.join(sorted_parts)}; expected a {part}")
            config = folders.read_config(folder)
            known[part] = folders.heads(config, str(folder)) if config is not None else {}
        tensors |= {f"{folder.name}/{name}": tensor for name, tensor in found.items()}
        parts[part] = {name: f"{folder.name}/{name}" for name in found}
    return layouts.Contents("diffusers", parts, tensors), known


def _parts(contents: layouts.Contents, origin: str) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    parts = {}
    for part, keys in contents.parts.items():
        tensors = {name: contents.tensors[key] for name, key in keys.items()}
        if part in MODELS and contents.layout == "diffusers":
            tensors = shapes.to_original(tensors, part, f"{origin} ({part})")
        elif part == "first_stage":
            tensors = vae.to_original(tensors)
        elif part == "cond_stage":
            tensors = {_text_name(name): tensor for name, tensor in tensors.items()}
        parts[part] = tensors
    used = {key for keys in contents.parts.values() for key in keys.values()}
    prefix = "model." if contents.layout == "nemo" else ""
    extras = {key.removeprefix(prefix): tensor for key, tensor in contents.tensors.items() if key not in used}
    return parts, extras


def _text_name(name: str) -> str:
    """The original's name of a CLIP text tensor; releases of transformers differ in a wrapper `text_model`."""
    bare = name.removeprefix("text_model.")
    known = bare.startswith(("embeddings.", "encoder.layers.", "final_layer_norm."))
    return _TEXT + bare if known else name


def text_to_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The condition stage's CLIP text model under transformers' names; None when it is another encoder (OpenCLIP)."""
    if not all(name.startswith(_TEXT) for name in tensors):
        return None
    return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}


def _stated(path: Path) -> dict[str, dict[str, Any]]:
    """The heads that a safetensors file of ours states in its metadata."""
    if path.suffix != ".safetensors":
        return {}
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get(METADATA)
    try:
        stated = json.loads(text) if text else {}
        return {part: {key: int(value) for key, value in heads.items()} for part, heads in stated.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: its metadata {METADATA} is {text!r}; expected heads by part") from error
