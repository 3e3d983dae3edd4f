"""Names of the first stage's tensors (AutoencoderKL): the original's layout to diffusers', and back."""

import re
from collections.abc import Mapping

from torch import Tensor

_RULES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^encoder\.down\.(\d+)\.block\.", r"encoder.down_blocks.\1.resnets."),
        (r"^encoder\.down\.(\d+)\.attn\.", r"encoder.down_blocks.\1.attentions."),
        (r"^encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
        (r"^decoder\.up\.(\d+)\.block\.", r"decoder.up_blocks.\1.resnets."),
        (r"^decoder\.up\.(\d+)\.attn\.", r"decoder.up_blocks.\1.attentions."),
        (r"^decoder\.up\.(\d+)\.upsample\.", r"decoder.up_blocks.\1.upsamplers.0."),
        (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
        (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
        (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
        (r"\.nin_shortcut\.", ".conv_shortcut."),
        (r"coder\.norm_out\.", "coder.conv_norm_out."),
    )
]
# The last two columns of names are those of the original and of diffusers before its release 0.14.
_ATTENTION = [
    (re.compile(rf"(\.attentions\.\d+)\.({names})\."), rf"\1.{ours}.")
    for ours, names in (
        ("group_norm", "norm"),
        ("to_q", "q|query"),
        ("to_k", "k|key"),
        ("to_v", "v|value"),
        ("to_out.0", "proj_out|proj_attn"),
    )
]

_BACK = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^encoder\.down_blocks\.(\d+)\.resnets\.", r"encoder.down.\1.block."),
        (r"^encoder\.down_blocks\.(\d+)\.attentions\.", r"encoder.down.\1.attn."),
        (r"^encoder\.down_blocks\.(\d+)\.downsamplers\.0\.", r"encoder.down.\1.downsample."),
        (r"^decoder\.up_blocks\.(\d+)\.resnets\.", r"decoder.up.\1.block."),
        (r"^decoder\.up_blocks\.(\d+)\.attentions\.", r"decoder.up.\1.attn."),
        (r"^decoder\.up_blocks\.(\d+)\.upsamplers\.0\.", r"decoder.up.\1.upsample."),
        (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
        (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
        (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
        (r"\.conv_shortcut\.", ".nin_shortcut."),
        (r"coder\.conv_norm_out\.", "coder.norm_out."),
        (r"(\.attn(_1|\.\d+))\.group_norm\.", r"\1.norm."),
        (r"(\.attn(_1|\.\d+))\.to_([qkv])\.", r"\1.\3."),
        (r"(\.attn(_1|\.\d+))\.to_out\.0\.", r"\1.proj_out."),
    )
]


def to_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The first stage's tensors under diffusers' present names; attention's 1x1 convolutions become linear.

    Takes the original's names and diffusers' older ones; diffusers' present names stay as they are.
    """
    levels = {int(match[1]) for name in tensors if (match := re.match(r"decoder\.up\.(\d{1,3})\.", name))}
    renamed = {}
    for name, tensor in tensors.items():
        # the decoder's levels count from the image in the original, from the latent in diffusers
        new = re.sub(r"^decoder\.up\.(\d{1,3})\.", lambda m: f"decoder.up.{max(levels) - int(m[1])}.", name)
        for pattern, replacement in (*_RULES, *_ATTENTION):
            new = pattern.sub(replacement, new)
        if ".attentions." in new and tensor.dim() == 4:
            tensor = tensor[:, :, 0, 0]
        renamed[new] = tensor
    return renamed


def to_original(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The first stage's tensors under the original's names; attention's linear layers become 1x1 convolutions.

    Takes diffusers' present names and its older ones; the original's stay as they are.
    """
    if not any("_block" in name for name in tensors if name.startswith(("encoder.down_", "decoder.up_"))):
        return dict(tensors)
    tensors = to_diffusers(tensors)
    levels = [int(match[1]) for name in tensors if (match := re.match(r"decoder\.up_blocks\.(\d{1,3})\.", name))]
    renamed = {}
    for name, tensor in tensors.items():
        attention = ".attentions." in name
        for pattern, replacement in _BACK:
            name = pattern.sub(replacement, name)
        name = re.sub(r"^decoder\.up\.(\d{1,3})\.", lambda match: f"decoder.up.{max(levels) - int(match[1])}.", name)
        renamed[name] = tensor[:, :, None, None] if attention and tensor.dim() == 2 else tensor
    return renamed
