"""The config.json of diffusers' and transformers' folders: to and from this model's parameters."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from controlnet.checkpoints.errors import CheckpointError
from controlnet.model.architecture import Architecture, ControlNetArchitecture

CLASSES = {"unet": "UNet2DConditionModel", "control": "ControlNetModel"}
WEIGHTS = dict.fromkeys(("unet", "control", "first_stage"), "diffusion_pytorch_model.safetensors")
WEIGHTS |= dict.fromkeys(("cond_stage", "cond_stage_2"), "model.safetensors")

XL_SCALE_FACTOR = 0.13025  # of Stable Diffusion XL's VAE

# What this model computes in one way alone. A key that a config.json lacks has diffusers' default, which is served.
_SERVED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu",),
    "norm_num_groups": (32,),
    "norm_eps": (1e-5,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "center_input_sample": (False,),
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "encoder_hid_dim": (None,),
    "dual_cross_attention": (False,),
    "class_embed_type": (None,),
    "addition_embed_type": (None, "text_time"),
    "addition_time_embed_dim": (None, 256),
    "num_class_embeds": (None,),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1, None),
    "time_embedding_type": ("positional",),
    "time_embedding_dim": (None,),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "time_cond_proj_dim": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default",),
    "cross_attention_norm": (None,),
    "controlnet_conditioning_channel_order": ("rgb",),
    "global_pool_conditions": (False,),
}


def read_config(folder: Path) -> dict[str, Any] | None:
    """A folder's config.json; None without one."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds a {type(config).__name__}; expected a mapping")
    return config


def heads(config: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """num_heads or num_head_channels of a U-Net's or ControlNet's config.json.

    diffusers' `attention_head_dim` is a number of heads, one for all levels or one for each. Raises CheckpointError for
    heads that are neither the same number nor the same width on all levels with attention, and for a key that asks for
    what this model does not compute.
    """
    for key, served in _SERVED.items():
        if key in config and config[key] not in served:
            raise CheckpointError(
                f"{origin}: {key} is {config[key]!r} in config.json; expected {' or '.join(map(repr, served))}"
            )
    numbers = config.get("num_attention_heads") or config.get("attention_head_dim", 8)
    widths = config.get("block_out_channels", (320, 640, 1280, 1280))
    for name, given in (("attention_head_dim", numbers), ("block_out_channels", widths)):
        entries = given if isinstance(given, (list, tuple)) else [given]
        if not entries or not all(isinstance(entry, int) and 0 < entry < 1 << 20 for entry in entries):
            raise CheckpointError(f"{origin}: {name} is {given!r} in config.json; expected positive integers")
    widths = widths if isinstance(widths, (list, tuple)) else [widths]
    if isinstance(numbers, int):
        return {"num_heads": numbers}
    if len(set(numbers)) == 1:
        return {"num_heads": numbers[0]}
    sizes = {width // number for width, number in zip(widths, numbers, strict=False)}
    if len(numbers) != len(widths) or len(sizes) != 1:
        raise CheckpointError(
            f"{origin}: attention_head_dim is {numbers} for levels of {widths} channels in config.json; expected the"
            " same number of heads, or of channels per head, on all levels"
        )
    return {"num_head_channels": sizes.pop()}


def model_config(architecture: Architecture) -> dict[str, Any]:
    """The config.json of diffusers' model of an architecture.

    Raises:
        CheckpointError: a ControlNet whose levels differ in their number of blocks: diffusers has none.
    """
    levels = range(architecture.levels)
    has_attention = [architecture.has_attention(level, 0) for level in levels]
    numbers = [architecture.heads(architecture.channels(level)) for level in levels]
    blocks = list(architecture.num_res_blocks)
    control = isinstance(architecture, ControlNetArchitecture)
    if architecture.num_attention_blocks is not None or (control and len(set(blocks)) > 1):
        raise CheckpointError(
            f"num_res_blocks is {blocks} with num_attention_blocks {architecture.num_attention_blocks}: diffusers has"
            f" no such {'ControlNet' if control else 'U-Net'}"
        )
    depths = [depth for depth in architecture.transformer_depth if depth]
    if depths and architecture.transformer_depth_middle != architecture.transformer_depth[-1] != 0:
        raise CheckpointError(
            f"transformer_depth is {list(architecture.transformer_depth)} with transformer_depth_middle"
            f" {architecture.transformer_depth_middle}: diffusers' middle block has as many as the last level"
        )
    config: dict[str, Any] = {
        "_class_name": CLASSES["control" if control else "unet"],
        "in_channels": architecture.in_channels,
        "down_block_types": ["CrossAttnDownBlock2D" if attention else "DownBlock2D" for attention in has_attention],
        "block_out_channels": [architecture.channels(level) for level in levels],
        "layers_per_block": blocks[0] if len(set(blocks)) == 1 else blocks,
        "cross_attention_dim": architecture.context_dim,
        "transformer_layers_per_block": _layers_per_block(architecture),
        "attention_head_dim": numbers[0] if len(set(numbers)) == 1 else numbers,
        "use_linear_projection": architecture.use_linear_in_transformer,
        "resnet_time_scale_shift": "scale_shift" if architecture.use_scale_shift_norm else "default",
    }
    if architecture.num_classes is not None:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": architecture.adm_in_channels,
        }
    if architecture.disable_self_attentions is not None:
        config["only_cross_attention"] = list(architecture.disable_self_attentions)
    if control:
        return config | {
            "conditioning_channels": architecture.hint_channels,
            "conditioning_embedding_out_channels": list(architecture.hint_block_channels),
        }
    up = ["CrossAttnUpBlock2D" if attention else "UpBlock2D" for attention in reversed(has_attention)]
    return config | {"out_channels": architecture.out_channels, "up_block_types": up}


def _layers_per_block(architecture: Architecture) -> int | list[int]:
    """diffusers' transformer_layers_per_block, of which the middle block has the last."""
    middle = architecture.transformer_depth_middle
    depths = [depth or 1 for depth in architecture.transformer_depth]
    depths[-1] = architecture.transformer_depth[-1] or middle
    same = {depth for depth in architecture.transformer_depth if depth} | {middle}
    return middle if len(same) == 1 else depths


def vae_config(tensors: Mapping[str, Tensor], origin: str, is_xl: bool = False) -> dict[str, Any]:
    """The config.json of an AutoencoderKL with these tensors, in diffusers' names; what nothing tells is left out."""
    names = ("encoder.conv_in.weight", "decoder.conv_out.weight", "decoder.conv_in.weight")
    missing = [name for name in names if name not in tensors]
    if missing:
        raise CheckpointError(f"{origin}: the first stage lacks {', '.join(missing)}")
    widths, blocks = [], 0
    while (name := f"encoder.down_blocks.{len(widths)}.resnets.0.conv1.weight") in tensors:
        widths.append(tensors[name].shape[0])
    while f"encoder.down_blocks.0.resnets.{blocks}.conv1.weight" in tensors:
        blocks += 1
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": tensors[names[0]].shape[1],
        "out_channels": tensors[names[1]].shape[0],
        "latent_channels": tensors[names[2]].shape[1],
        "block_out_channels": widths,
        "layers_per_block": blocks,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "use_quant_conv": "quant_conv.weight" in tensors,
        "use_post_quant_conv": "post_quant_conv.weight" in tensors,
        **({"scaling_factor": XL_SCALE_FACTOR} if is_xl else {}),
    }


def clip_config(tensors: Mapping[str, Tensor], origin: str) -> dict[str, Any]:
    """The config.json of the CLIP text model with these tensors ("text_model.*"), at CLIP's 64 channels per head.

    A width that 64 does not divide has one head. The activation is that of OpenAI's CLIP, quick_gelu, and OpenCLIP's
    gelu for a model with a projection.
    """
    projection = tensors.get("text_projection.weight")
    embeddings = "text_model.embeddings."
    names = (f"{embeddings}token_embedding.weight", f"{embeddings}position_embedding.weight")
    inner = "text_model.encoder.layers.0.mlp.fc1.weight"
    missing = [name for name in (*names, inner) if name not in tensors]
    if missing:
        raise CheckpointError(f"{origin}: the text encoder lacks {', '.join(missing)}")
    (vocabulary, width), (positions, _) = (tensors[name].shape for name in names)
    layers = {match[1] for name in tensors if (match := re.match(r"text_model\.encoder\.layers\.(\d+)\.", name))}
    return {
        "architectures": ["CLIPTextModel" if projection is None else "CLIPTextModelWithProjection"],
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "projection_dim": width if projection is None else projection.shape[0],
        "intermediate_size": tensors[inner].shape[0],
        "num_hidden_layers": len(layers),
        "num_attention_heads": max(width // 64, 1),
        "max_position_embeddings": positions,
        "hidden_act": "quick_gelu" if projection is None else "gelu",
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1,
    }
