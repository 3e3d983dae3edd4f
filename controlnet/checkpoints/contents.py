"""Opens a checkpoint of any layout: the one reader, from a user's path to tensors sorted by part."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from controlnet.checkpoints import folders, layouts, openclip, runs, shapes, vae
from controlnet.checkpoints.errors import CheckpointError
from controlnet.checkpoints.files import read_files
from controlnet.checkpoints.layouts import MODELS, Contents
from controlnet.checkpoints.sources import Source, resolve
from controlnet.common import documents
from controlnet.model.architecture import Architecture

METADATA = "controlnet.heads"  # in a safetensors file that we wrote: what its shapes do not tell, as JSON
_HEADS = ("num_heads", "num_head_channels")
_TEXT = "transformer.text_model."  # where the original has the CLIP text model in its condition stage


def open_contents(path: str | Path, only: str | None = None, *, average: bool = True) -> Contents:
    """The sorted tensors of a checkpoint, with what its files state beside them.

    Args:
        path: what `sources.resolve` takes.
        only: of a pipeline's folder, read this part's files alone.
        average: of a training run, take the averaged weights where it kept them.

    Raises:
        FileNotFoundError: nothing is there.
        CheckpointError: everything else: a damaged or foreign file, an unknown layout, or a mixture of two.
    """
    source = resolve(path, only)
    if source.kind == "pipeline":
        return _pipeline(source)
    tensors = read_files(source.files[""])
    if average and source.average is not None:
        tensors |= read_files([source.average])
    contents = layouts.sort(tensors, str(path))
    return replace(contents, stated=_stated(source, MODELS & contents.parts.keys()))


def model_keys(contents: Contents, part: str, origin: str, architecture: Architecture | None = None) -> dict[str, str]:
    """The original's name of each tensor of U-Net or ControlNet -> the file's key.

    Args:
        origin: names the checkpoint in errors.
        architecture: of the model, where it is known; else it is read off diffusers' names themselves.
    """
    keys = contents.parts[part]
    return shapes.to_original(keys, part, origin, architecture) if contents.layout == "diffusers" else dict(keys)


def part_tensors(contents: Contents, part: str, origin: str) -> dict[str, Tensor]:
    """The tensors of one part under the original's names, without prefix; `origin` names the checkpoint in errors."""
    if part in MODELS:
        keys = model_keys(contents, part, f"{origin} ({part})")
        return {name: contents.tensors[key] for name, key in keys.items()}
    tensors = {name: contents.tensors[key] for name, key in contents.parts[part].items()}
    if part == "first_stage":
        return vae.to_original(tensors)
    if part == "cond_stage_2":
        return openclip.to_original(tensors)
    return {_text_name(name): tensor for name, tensor in tensors.items()}


def text_to_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The condition stage's CLIP text model under transformers' names; None when it is another encoder (OpenCLIP)."""
    if not all(name.startswith(_TEXT) for name in tensors):
        return None
    return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}


def _pipeline(source: Source) -> Contents:
    tensors: dict[str, Tensor] = {}
    parts: dict[str, dict[str, str]] = {}
    stated = {}
    for part, files in source.files.items():
        folder = files[0].parent
        found = read_files(files)
        if part in MODELS:
            sorted_parts = layouts.sort(found, str(folder)).parts
            if part not in sorted_parts:
                raise CheckpointError(f"{folder} holds {', '.join(sorted_parts)}; expected a {part}")
            stated[part] = _config_heads(folder)
        tensors |= {f"{folder.name}/{name}": tensor for name, tensor in found.items()}
        parts[part] = {name: f"{folder.name}/{name}" for name in found}
    return Contents("diffusers", parts, tensors, stated)


def _stated(source: Source, parts: set[str]) -> dict[str, dict[str, Any]]:
    """The heads of each part: of a file's metadata, else of diffusers' config.json or of a run's config.yaml."""
    stated: dict[str, dict[str, Any]] = {}
    for file in source.files[""]:
        stated |= _metadata_heads(file)
    folder = source.files[""][0].parent
    if source.kind == "model":
        return {part: _config_heads(folder) for part in parts} | stated
    if (folder / runs.MANIFEST).is_file() and (folder / runs.CONFIG).is_file():
        return _run_heads(folder / runs.CONFIG) | stated
    return stated


def _config_heads(folder: Path) -> dict[str, Any]:
    config = folders.read_config(folder)
    return folders.heads(config, str(folder)) if config is not None else {}


def _metadata_heads(path: Path) -> dict[str, dict[str, Any]]:
    """The heads that a safetensors file of ours states in its metadata."""
    if path.suffix != ".safetensors":
        return {}
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get(METADATA)
    try:
        stated = json.loads(text) if text else {}
        return {part: {key: int(value) for key, value in heads.items()} for part, heads in stated.items()}
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path}: its metadata {METADATA} is {text!r}; expected heads by part") from error


def _run_heads(config: Path) -> dict[str, dict[str, Any]]:
    """The heads that a training configuration gives its models."""
    import yaml  # comes with OmegaConf, as the run did

    try:
        text = config.read_text(encoding="utf-8")
        with documents.readable(text):
            tree = yaml.safe_load(text)
        nodes = {"unet": tree["model"]["unet_config"], "control": tree["model"]["control_stage_config"]}
        heads = {part: {key: node[key] for key in _HEADS if node.get(key) is not None} for part, node in nodes.items()}
        for number in (number for of_part in heads.values() for number in of_part.values()):
            if type(number) is not int:
                raise TypeError(f"{' or '.join(_HEADS)} is {number!r}")
        return heads
    except (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{config} is damaged; expected the training configuration: {error}") from error


def _text_name(name: str) -> str:
    """The original's name of a CLIP text tensor; releases of transformers differ in a wrapper `text_model`."""
    bare = name.removeprefix("text_model.")
    known = bare.startswith(("embeddings.", "encoder.layers.", "final_layer_norm."))
    return _TEXT + bare if known else name
