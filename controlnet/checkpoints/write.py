"""Writes a checkpoint in any layout: beside its place, then moved there in one step, so that none is half there."""

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from controlnet.checkpoints import archive, folders, nemo, openclip, shapes, vae
from controlnet.checkpoints.bundle import Bundle
from controlnet.checkpoints.contents import METADATA, text_to_diffusers
from controlnet.checkpoints.errors import CheckpointError
from controlnet.checkpoints.layouts import MODELS
from controlnet.checkpoints.sources import PICKLES, SUBFOLDERS
from controlnet.model.architecture import Architecture

FORMATS = ("original", "diffusers", "nemo", "nemo-1.23")


def write(bundle: Bundle, dst: str | Path, format: str) -> list[str]:
    """Writes a bundle; returns the names of the tensors that the format has no place for, which are left out.

    Args:
        dst: "original": a .safetensors file, or .ckpt, .pth, .pt, .bin. "nemo" and "nemo-1.23": these, or .nemo.
            "diffusers": a new folder, of the model or, for several parts, one like a pipeline's with a subfolder for
            each; or a .safetensors file, for a single part. A file that is there is replaced, a folder is not.
        format: one of FORMATS; "nemo" has the names of release 2, "nemo-1.23" those of 1.23.0.

    Raises:
        ValueError: another format or suffix.
        FileExistsError: a folder that is not empty.
        CheckpointError: an architecture that the format cannot express.
    """
    dst = Path(dst)
    _check_target(dst, format)
    if format != "diffusers":
        tensors = _single_file(bundle, format)
        stated = heads_metadata(bundle.architectures)
        _atomically(dst, lambda path: _write_file(path, dst.suffix, tensors, stated, _nemo_config(bundle)))
        return []
    parts, left_out = _diffusers_parts(bundle)
    if dst.suffix == ".safetensors":
        if len(parts) != 1:
            raise CheckpointError(f"{bundle.path} holds {', '.join(parts)}; expected one part for the one file {dst}")
        (tensors, _), *_ = parts.values()
        stated = heads_metadata(bundle.architectures)
        _atomically(dst, lambda path: _write_file(path, ".safetensors", tensors, stated, ""))
    else:
        _atomically(dst, lambda path: _write_folders(path, parts))
    return left_out


def _check_target(dst: Path, format: str) -> None:
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; expected one of {', '.join(FORMATS)}")
    single = (".safetensors", *PICKLES) if format == "original" else (".safetensors", *PICKLES, ".nemo")
    if format == "diffusers":
        fits, expected = dst.suffix not in (*PICKLES, ".nemo"), "a new folder, or a .safetensors file,"
    else:
        fits, expected = dst.suffix in single, f"a file with the suffix {', '.join(single)}"
    if not fits:
        raise ValueError(f"dst is {dst}; expected {expected} for the format {format}")


def original_names(bundle: Bundle) -> dict[str, Tensor]:
    """All tensors of a bundle under the original's full names."""
    prefixes = bundle.prefixes
    parts = {prefixes[part] + name: tensor for part, names in bundle.parts.items() for name, tensor in names.items()}
    return parts | bundle.extras


def _single_file(bundle: Bundle, format: str) -> dict[str, Tensor]:
    if format == "original":
        return original_names(bundle)
    tensors = {f"model.{name}": tensor for name, tensor in bundle.extras.items()}
    for part, names in bundle.parts.items():
        for name, tensor in names.items():
            renamed = nemo.from_original(name, release_1=format == "nemo-1.23") if part in MODELS else name
            tensors[f"model.{bundle.prefixes[part]}{renamed}"] = tensor
    return tensors


def _diffusers_parts(bundle: Bundle) -> tuple[dict[str, tuple[dict[str, Tensor], dict[str, Any]]], list[str]]:
    """By part the tensors and the config.json, and the full names of what has no place there."""
    parts, left_out = {}, list(bundle.extras)
    for part, tensors in bundle.parts.items():
        if part in MODELS:
            architecture = bundle.architectures[part]
            parts[part] = shapes.to_diffusers(tensors, architecture), folders.model_config(architecture)
        elif part == "first_stage":
            renamed = vae.to_diffusers(tensors)
            parts[part] = renamed, folders.vae_config(renamed, bundle.path, bundle.is_xl)
        elif part == "cond_stage_2":
            renamed = openclip.to_diffusers(tensors)
            parts[part] = renamed, folders.clip_config(renamed, bundle.path)
            left_out += [bundle.prefixes[part] + name for name in tensors if name == openclip.LEFT_OUT]
        elif (renamed := text_to_diffusers(tensors)) is not None:
            parts[part] = renamed, folders.clip_config(renamed, bundle.path)
        else:
            left_out += [bundle.prefixes[part] + name for name in tensors]
    return parts, left_out


def _write_folders(path: Path, parts: Mapping[str, tuple[dict[str, Tensor], dict[str, Any]]]) -> None:
    path.mkdir()
    alone = len(parts) == 1
    for part, (tensors, config) in parts.items():
        folder = path if alone else path / SUBFOLDERS[part]
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        _save_safetensors(folder / folders.WEIGHTS[part], tensors, {})


def _write_file(path: Path, suffix: str, tensors: Mapping[str, Tensor], stated: dict[str, str], config: str) -> None:
    if suffix == ".safetensors":
        _save_safetensors(path, tensors, stated)
    elif suffix == ".nemo":
        weights = path.with_name(path.name + "-weights")
        try:
            torch.save(dict(tensors), weights)
            archive.write(path, weights, config)
        finally:
            weights.unlink(missing_ok=True)
    else:
        torch.save({"state_dict": dict(tensors)}, path)


def _save_safetensors(path: Path, tensors: Mapping[str, Tensor], stated: dict[str, str]) -> None:
    from safetensors.torch import save_file

    seen, separate = set(), {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        # the format has no two names for the same memory
        separate[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    save_file(separate, path, metadata={"format": "pt", **stated})


def heads_metadata(architectures: Mapping[str, Architecture]) -> dict[str, str]:
    """The metadata of a safetensors file that states each part's attention heads, which no shape tells."""
    if not architectures:
        return {}
    return {METADATA: json.dumps({part: _heads(architecture) for part, architecture in architectures.items()})}


def _heads(architecture: Architecture) -> dict[str, int]:
    by_size = architecture.num_head_channels != -1
    return {"num_head_channels": architecture.num_head_channels} if by_size else {"num_heads": architecture.num_heads}


def _nemo_config(bundle: Bundle) -> str:
    """The text of model_config.yaml: the parameters of the models. JSON is YAML."""
    names = {"unet": "unet_config", "control": "control_stage_config"}
    keys = ("in_channels", "out_channels", "hint_channels", "model_channels", "attention_resolutions", "channel_mult",
            "num_res_blocks", "num_heads", "num_head_channels", "use_spatial_transformer", "transformer_depth",
            "transformer_depth_middle", "num_classes", "adm_in_channels",
            "context_dim", "use_linear_in_transformer", "legacy")  # fmt: skip
    config = {}
    for part, architecture in bundle.architectures.items():
        config[names[part]] = {key: getattr(architecture, key) for key in keys if hasattr(architecture, key)}
    return json.dumps(config, indent=2) + "\n"


def _atomically(dst: Path, write_to: Callable[[Path], None]) -> None:
    """Has a file or folder written under a temporary name beside dst, then moves it there; on failure nothing stays."""
    if dst.is_dir() and any(dst.iterdir()):
        raise FileExistsError(f"dst {dst} is a folder that is not empty; expected a new one")
    dst.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=dst.parent, prefix=f".{dst.name}.") as scratch:
        path = Path(scratch) / dst.name
        write_to(path)
        for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        os.replace(path, dst)
