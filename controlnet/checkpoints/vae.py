"""Names of the first stage's tensors (AutoencoderKL): the original's layout to diffusers'."""

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


def to_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The first stage's tensors under diffusers' present names; attention's 1x1 convolutions become linear.

    Takes the original's names and diffusers' older ones; diffusers' present names stay as they are.
    """
    levels = {int(match[1]) for name in tensors if (match := re.match(r"decoder\.up\.(\d+)\.", name))}
    renamed = {}
    for name, tensor in tensors.items():
        # the decoder's levels count from the image in the original, from the latent in diffusers
        new = re.sub(r"^decoder\.up\.(\d+)\.", lambda m: f"decoder.up.{max(levels) - int(m[1])}.", name)
        for pattern, replacement in (*_RULES, *_ATTENTION):
            new = pattern.sub(replacement, new)
        if ".attentions." in new and tensor.dim() == 4:
            tensor = tensor[:, :, 0, 0]
        renamed[new] = tensor
    return renamed
