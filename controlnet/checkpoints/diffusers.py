"""Names of U-Net and ControlNet tensors in diffusers' checkpoints, to and from the original's, for any architecture."""

from collections.abc import Mapping

from controlnet.checkpoints.errors import CheckpointError
from controlnet.model.architecture import Architecture, ControlNetArchitecture

_RES = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def module_names(architecture: Architecture) -> dict[str, str]:
    """Original module name -> diffusers' module name, for the U-Net or ControlNet of an architecture.

    A tensor's name is a module's name and a rest that both layouts share ("transformer_blocks.0.attn1.to_q.weight").

    Raises:
        CheckpointError: an architecture without counterpart in diffusers: attention without transformer.
    """
    if not architecture.use_spatial_transformer:
        raise CheckpointError("use_spatial_transformer is false: diffusers has no such U-Net to take weights from")
    names = {"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2"}
    if architecture.num_classes is not None:
        names |= {"label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2"}
    names |= _encoder(architecture) | _res("middle_block.0", "mid_block.resnets.0")
    names |= {"middle_block.1": "mid_block.attentions.0"} | _res("middle_block.2", "mid_block.resnets.1")
    if isinstance(architecture, ControlNetArchitecture):
        return names | _control_only(architecture)
    return names | _decoder(architecture) | {"out.0": "conv_norm_out", "out.2": "conv_out"}


def rename(name: str, names: Mapping[str, str]) -> str | None:
    """The other layout's name of a tensor; None where it has none.

    Args:
        names: `module_names`, or its inverse.
    """
    head, rest = name, ""
    while head:
        if head in names:
            return names[head] + rest
        head, _, last = head.rpartition(".")
        rest = f".{last}{rest}"
    return None


def _res(original: str, diffusers: str) -> dict[str, str]:
    return {f"{original}.{ours}": f"{diffusers}.{theirs}" for ours, theirs in _RES.items()}


def _encoder(architecture: Architecture) -> dict[str, str]:
    names, index = {"input_blocks.0.0": "conv_in"}, 1
    for level, count in enumerate(architecture.num_res_blocks):
        attentions = 0
        for block in range(count):
            names |= _res(f"input_blocks.{index}.0", f"down_blocks.{level}.resnets.{block}")
            if architecture.has_attention(level, block):
                names[f"input_blocks.{index}.1"] = f"down_blocks.{level}.attentions.{attentions}"
                attentions += 1
            index += 1
        if level < architecture.levels - 1:
            original, diffusers = f"input_blocks.{index}.0", f"down_blocks.{level}.downsamplers.0"
            names |= (
                _res(original, diffusers) if architecture.resblock_updown else {f"{original}.op": f"{diffusers}.conv"}
            )
            index += 1
    return names


def _decoder(architecture: Architecture) -> dict[str, str]:
    names, index = {}, 0
    for position, level in enumerate(reversed(range(architecture.levels))):
        attentions = 0
        for block in range(architecture.num_res_blocks[level] + 1):
            names |= _res(f"output_blocks.{index}.0", f"up_blocks.{position}.resnets.{block}")
            attention = architecture.has_attention(level, block)
            if attention:
                names[f"output_blocks.{index}.1"] = f"up_blocks.{position}.attentions.{attentions}"
                attentions += 1
            if level > 0 and block == architecture.num_res_blocks[level]:
                original, diffusers = f"output_blocks.{index}.{1 + attention}", f"up_blocks.{position}.upsamplers.0"
                convolution = {f"{original}.conv": f"{diffusers}.conv"}
                names |= _res(original, diffusers) if architecture.resblock_updown else convolution
            index += 1
    return names


def _control_only(architecture: ControlNetArchitecture) -> dict[str, str]:
    skips = 1 + sum(architecture.num_res_blocks) + architecture.levels - 1
    names = {f"zero_convs.{i}.0": f"controlnet_down_blocks.{i}" for i in range(skips)}
    names["middle_block_out.0"] = "controlnet_mid_block"
    blocks = 2 * (len(architecture.hint_block_channels) - 1)
    hint = ["conv_in", *(f"blocks.{i}" for i in range(blocks)), "conv_out"]
    names |= {f"input_hint_block.{2 * i}": f"controlnet_cond_embedding.{name}" for i, name in enumerate(hint)}
    return names
