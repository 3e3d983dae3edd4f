"""Names of OpenCLIP's text encoder, as original files of Stable Diffusion XL have it, to and from transformers'."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_LAYER = (r"model\.transformer\.resblocks\.(\d+)\.", r"text_model.encoder.layers.\1.")
_INNER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_OUTER = {
    "model.token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "model.positional_embedding": "text_model.embeddings.position_embedding.weight",
    "model.ln_final.weight": "text_model.final_layer_norm.weight",
    "model.ln_final.bias": "text_model.final_layer_norm.bias",
    "model.text_projection": "text_projection.weight",  # transposed
}
_PACKED = re.compile(r"model\.transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)")
_APART = re.compile(r"text_model\.encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)")
LEFT_OUT = "model.logit_scale"  # of the comparison with images: transformers' text model has no place for it


def to_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenCLIP's tensors ("model.*") under transformers' names, without `LEFT_OUT`; other names stay as they are."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if (match := _PACKED.fullmatch(name)) is not None and tensor.dim() and tensor.shape[0] % 3 == 0:
            layer, kind = match.groups()
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"text_model.encoder.layers.{layer}.self_attn.{part}_proj.{kind}"] = rows
        elif name != LEFT_OUT:
            renamed[_to_diffusers(name)] = _transposed(tensor) if name == "model.text_projection" else tensor
    return renamed


def to_original(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The other way; OpenCLIP's own names stay as they are."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if (match := _APART.fullmatch(name)) is None:
            renamed[_to_original(name)] = _transposed(tensor) if name == "text_projection.weight" else tensor
        elif match[2] == "q":
            layer, _, kind = match.groups()
            parts = [tensors.get(f"text_model.encoder.layers.{layer}.self_attn.{part}_proj.{kind}") for part in "qkv"]
            if all(part is not None and part.dim() and part.shape == parts[0].shape for part in parts):
                renamed[f"model.transformer.resblocks.{layer}.attn.in_proj_{kind}"] = torch.cat(parts)
    return renamed


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.T if tensor.dim() == 2 else tensor  # another is no projection, and refused by who reads it


def _to_diffusers(name: str) -> str:
    if name in _OUTER:
        return _OUTER[name]
    name, found = re.subn("^" + _LAYER[0], _LAYER[1], name)
    if found:
        for ours, theirs in _INNER.items():
            name = name.replace(f".{ours}.", f".{theirs}.")
    return name


def _to_original(name: str) -> str:
    for ours, theirs in _OUTER.items():
        if name == theirs:
            return ours
    name, found = re.subn(r"^text_model\.encoder\.layers\.(\d+)\.", r"model.transformer.resblocks.\1.", name)
    if found:
        for ours, theirs in _INNER.items():
            name = name.replace(f".{theirs}.", f".{ours}.")
    return name
