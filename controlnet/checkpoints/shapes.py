"""Reads the architecture of a U-Net or ControlNet off the names and shapes of its tensors.

Everything but the attention heads leaves its mark in a shape. The heads follow the family: linear projections around
the transformers mean Stable Diffusion 2 and its 64 channels per head, 1x1 convolutions mean Stable Diffusion 1 and its
8 heads. A config.json, or an argument of the caller, says otherwise.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from controlnet.checkpoints import diffusers
from controlnet.checkpoints.errors import CheckpointError
from controlnet.model.architecture import Architecture, ControlNetArchitecture, UNetArchitecture

T = TypeVar("T")
SD1_HEADS = 8
SD2_HEAD_CHANNELS = 64
ARCHITECTURES = {"unet": UNetArchitecture, "control": ControlNetArchitecture}
_TRANSFORMER = ".transformer_blocks."
# Beginnings of tensors that belong to what this model has not, and the word for it.
_UNSERVED = {
    "class_embedding.": "class embeddings",
    "label_emb.weight": "class embeddings",
    "encoder_hid_proj.": "an image projection (IP-Adapter)",
}


@dataclass(frozen=True)
class _Level:
    """One resolution of the encoder: index of its first input block, how many, and how many of them have attention."""

    start: int
    blocks: int
    attentions: int


def to_original(
    tensors: Mapping[str, T], part: str, origin: str, architecture: Architecture | None = None
) -> dict[str, T]:
    """A diffusers U-Net's or ControlNet's tensors (or anything by their names) under the original's names.

    Names without counterpart stay as they are. Without the architecture, the names have to tell it.

    Raises:
        CheckpointError: the names show no encoder, or one whose residual blocks change the resolution: in the
            original's names these look like any other.
    """
    if architecture is not None:
        return _renamed(tensors, diffusers.module_names(architecture))
    levels = []
    while blocks := _count(tensors, f"down_blocks.{len(levels)}.resnets"):
        levels.append((blocks, _count(tensors, f"down_blocks.{len(levels)}.attentions")))
    if not levels:
        raise CheckpointError(f"{origin} has no down_blocks.0.resnets.0; expected a {part} in diffusers' names")
    if "down_blocks.0.downsamplers.0.conv1.weight" in tensors:
        raise CheckpointError(
            f"{origin} has residual blocks that change the resolution (resblock_updown); build the model by its"
            " parameters, then load_unet or load_control"
        )
    hint_blocks = _count(tensors, "controlnet_cond_embedding.blocks")
    has_vector = any(name.startswith("add_embedding.") for name in tensors)
    return _renamed(tensors, _module_names(part, levels, hint_blocks, has_vector))


def _renamed(tensors: Mapping[str, T], names: Mapping[str, str]) -> dict[str, T]:
    back = {theirs: ours for ours, theirs in names.items()}
    return {diffusers.rename(name, back) or name: tensor for name, tensor in tensors.items()}


def to_diffusers(tensors: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """The tensors of `to_original`, the other way; the architecture must be theirs."""
    names = diffusers.module_names(architecture)
    return {diffusers.rename(name, names) or name: tensor for name, tensor in tensors.items()}


def parameters(tensors: Mapping[str, Tensor], part: str, origin: str, **known: Any) -> dict[str, Any]:
    """The constructor's parameters of the U-Net or ControlNet that has these tensors.

    Args:
        tensors: under the original's names.
        part: "unet" or "control".
        origin: names the file in errors.
        known: parameters that are known otherwise (heads, from a config.json); they win.

    Raises:
        CheckpointError: the tensors are no such model's; a missing tensor that no parameter hangs on is left to whoever
            fills the model.
    """
    for name in tensors:
        for beginning, what in _UNSERVED.items():
            if name.startswith(beginning):
                raise CheckpointError(f"{origin} has {name}: a model with {what}, which is not served")
    read = _Shapes(tensors, part, origin)
    width, in_channels = read.shape("input_blocks.0.0.weight")[:2]
    levels = _levels(tensors)
    if not levels:
        raise CheckpointError(f"{origin} has no input_blocks.1: a {part} without encoder")
    context_dim, middle_depth = _transformer(tensors, read)
    linear = len(read.shape("middle_block.1.proj_in.weight")) == 2
    channels = [read.shape(f"input_blocks.{level.start}.0.in_layers.2.weight")[0] for level in levels]
    for level, count in enumerate(channels):
        if count % width:
            raise CheckpointError(
                f"{origin}: level {level} is {count} wide; expected a multiple of the first convolution's {width}"
            )
    found: dict[str, Any] = {
        "in_channels": in_channels,
        "model_channels": width,
        "channel_mult": [count // width for count in channels],
        "num_res_blocks": [level.blocks for level in levels],
        "attention_resolutions": [2**i for i, level in enumerate(levels) if level.attentions],
        "use_spatial_transformer": True,
        "transformer_depth": _depth(tensors, levels, middle_depth),
        "context_dim": context_dim,
        "use_linear_in_transformer": linear,
        "legacy": False,
        "use_flash_attention": True,
    }
    if isinstance(found["transformer_depth"], list):
        found["transformer_depth_middle"] = middle_depth
    if "label_emb.0.0.weight" in tensors:
        found |= {"num_classes": "sequential", "adm_in_channels": read.shape("label_emb.0.0.weight")[1]}
    if any(0 < level.attentions < level.blocks for level in levels):
        found["num_attention_blocks"] = [level.attentions for level in levels]
    found |= _self_attention_off(read, levels, channels, context_dim)
    if read.shape("middle_block.0.emb_layers.1.weight")[0] == 2 * channels[-1]:
        found["use_scale_shift_norm"] = True
    if not {"num_heads", "num_head_channels"} & known.keys():
        found |= {"num_head_channels": SD2_HEAD_CHANNELS} if linear else {"num_heads": SD1_HEADS}
    found |= _hint(tensors, read) if part == "control" else {"out_channels": read.shape("out.2.weight")[0]}
    return found | known


def architecture(params: Mapping[str, Any], part: str, origin: str) -> Architecture:
    """The validated architecture of `parameters`; CheckpointError where they make none."""
    try:
        return ARCHITECTURES[part](**params)
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{origin}: the {part}'s tensors make no architecture of this model: {error}. Heads cannot be read off"
            " shapes; give num_heads or num_head_channels if they are the matter"
        ) from error


class _Shapes:
    """Looks a shape up, with an error that says what the missing tensor was wanted for."""

    def __init__(self, tensors: Mapping[str, Tensor], part: str, origin: str):
        self.tensors = tensors
        self.part = part
        self.origin = origin

    def shape(self, name: str) -> list[int]:
        if name not in self.tensors:
            raise CheckpointError(f"{self.origin} lacks {name}, from which the {self.part}'s architecture is read")
        shape = list(self.tensors[name].shape)
        if len(shape) < 2 or 0 in shape:
            raise CheckpointError(f"{self.origin}: {name} is {shape}; expected at least [out, in], none of them 0")
        return shape


def _count(tensors: Mapping[str, Any], prefix: str) -> int:
    """One more than the largest number that follows the prefix; no model counts as far as 1000."""
    pattern = re.compile(re.escape(prefix) + r"\.([0-9]{1,3})\.")
    return max((int(match[1]) + 1 for name in tensors if (match := pattern.match(name))), default=0)


def _levels(tensors: Mapping[str, Tensor]) -> list[_Level]:
    """The encoder's levels: each ends with a downsampling, or with the encoder."""
    blocks = {index: set() for index in range(1, _count(tensors, "input_blocks"))}
    for name in tensors:
        if (match := re.match(r"input_blocks\.([0-9]{1,3})\.([0-9]+)\.(op\.)?", name)) and int(match[1]) in blocks:
            blocks[int(match[1])].add("op" if match[3] else match[2])
    ends = [index for index, layers in blocks.items() if "op" in layers]
    levels, start = [], 1
    for end in [*ends, len(blocks) + 1]:
        attentions = sum("1" in blocks[index] for index in range(start, end))
        if end > start:
            levels.append(_Level(start, end - start, attentions))
        start = end + 1
    return levels


def _transformer(tensors: Mapping[str, Tensor], read: _Shapes) -> tuple[int, int]:
    """Features of the context, and blocks of a transformer, off the middle block's, which always is one."""
    if "middle_block.1.qkv.weight" in tensors:
        raise CheckpointError(
            f"{read.origin} has middle_block.1.qkv: attention without context; expected spatial transformers"
        )
    depth = _count(tensors, "middle_block.1.transformer_blocks")
    return read.shape("middle_block.1.transformer_blocks.0.attn2.to_k.weight")[1], depth


def _depth(tensors: Mapping[str, Tensor], levels: Sequence[_Level], middle: int) -> int | list[int]:
    """transformer_depth: one number where all levels with attention, and the middle block, have the same."""
    depths = [
        _count(tensors, f"input_blocks.{level.start}.1.transformer_blocks") if level.attentions else 0
        for level in levels
    ]
    return depths if any(depth not in (0, middle) for depth in depths) else middle


def _self_attention_off(
    read: _Shapes, levels: Sequence[_Level], channels: Sequence[int], context_dim: int
) -> dict[str, Any]:
    """disable_self_attentions: a first attention that is as wide as the context, where the two widths differ."""

    def reads_context(module: str, width: int) -> bool:
        name = f"{module}{_TRANSFORMER}0.attn1.to_k.weight"
        return name in read.tensors and read.shape(name)[1] == context_dim != width

    pairs = zip(levels, channels, strict=True)
    off = [bool(level.attentions) and reads_context(f"input_blocks.{level.start}.1", width) for level, width in pairs]
    found: dict[str, Any] = {"disable_self_attentions": off} if any(off) else {}
    return found | ({"disable_middle_self_attn": True} if reads_context("middle_block.1", channels[-1]) else {})


def _hint(tensors: Mapping[str, Tensor], read: _Shapes) -> dict[str, Any]:
    convolutions = (_count(tensors, "input_hint_block") + 1) // 2  # SiLU between them
    first = read.shape("input_hint_block.0.weight")
    stages = range(1, convolutions // 2)
    widths = [read.shape(f"input_hint_block.{4 * stage}.weight")[0] for stage in stages]
    return {"hint_channels": first[1], "hint_block_channels": [first[0], *widths]}


def _module_names(part: str, levels: Sequence[tuple[int, int]], hint_blocks: int, has_vector: bool) -> dict[str, str]:
    """`diffusers.module_names` of an architecture with these levels; nothing but the levels matters to names."""
    partial = any(0 < attentions < blocks for blocks, attentions in levels)
    shared: dict[str, Any] = {
        "in_channels": 1,
        "model_channels": 32,
        "channel_mult": [1] * len(levels),
        "num_res_blocks": [blocks for blocks, _ in levels],
        "attention_resolutions": [2**i for i, (_, attentions) in enumerate(levels) if attentions],
        "num_attention_blocks": [attentions for _, attentions in levels] if partial else None,
        "num_heads": 1,
        "use_spatial_transformer": True,
        "context_dim": 1,
        "num_classes": "sequential" if has_vector else None,
        "adm_in_channels": 1 if has_vector else None,
    }
    if part == "unet":
        return diffusers.module_names(UNetArchitecture(**shared, out_channels=1))
    stages = [1] * (hint_blocks // 2 + 1)
    return diffusers.module_names(ControlNetArchitecture(**shared, hint_channels=1, hint_block_channels=stages))
