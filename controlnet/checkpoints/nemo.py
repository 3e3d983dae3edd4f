"""Names of U-Net and ControlNet tensors in NeMo's checkpoints, to and from the original's.

NeMo fuses group norm and SiLU into one layer, so that the layers after it move up by one, and has its layer norms
inside the attentions and the feed-forward. Two generations of the latter exist: `attn1.norm` and `attn1.to_q`, and, in
release 1.23.0, `attn1.norm_to_q.0` and `attn1.norm_to_q.1`. Each name says by itself which it is.
"""

import re

from controlnet.checkpoints.errors import CheckpointError

_TO_ORIGINAL = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\.in_layers\.1\.", ".in_layers.2."),
        (r"\.out_layers\.2\.", ".out_layers.3."),
        (r"^out\.1\.", "out.2."),
        (r"\.attn1\.norm(_to_q\.0)?\.", ".norm1."),
        (r"\.attn2\.norm(_to_q\.0)?\.", ".norm2."),
        (r"\.norm_to_q\.1\.", ".to_q."),
        (r"\.ff\.net\.0\.(weight|bias)$", r".norm3.\1"),
        (r"\.ff\.net\.1\.proj\.", ".ff.net.0.proj."),
        (r"\.ff\.net\.3\.", ".ff.net.2."),
    )
]
_FROM_ORIGINAL = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\.in_layers\.2\.", ".in_layers.1."),
        (r"\.out_layers\.3\.", ".out_layers.2."),
        (r"^out\.2\.", "out.1."),
        (r"(\.transformer_blocks\.\d+)\.norm1\.", r"\1.attn1.norm."),
        (r"(\.transformer_blocks\.\d+)\.norm2\.", r"\1.attn2.norm."),
        (r"(\.transformer_blocks\.\d+)\.norm3\.", r"\1.ff.net.0."),
        (r"\.ff\.net\.0\.proj\.", ".ff.net.1.proj."),
        (r"\.ff\.net\.2\.", ".ff.net.3."),
    )
]

_RELEASE_1 = [
    (re.compile(r"\.(attn[12])\.norm\."), r".\1.norm_to_q.0."),
    (re.compile(r"\.(attn[12])\.to_q\."), r".\1.norm_to_q.1."),
]


def to_original(name: str) -> str:
    """The original's name of a tensor; a name that is the original's already comes back as it is.

    Raises:
        CheckpointError: the names of Transformer Engine's fused layers: there the two halves of the GEGLU
    projection may have traded places, which no name tells.
    """
    if ".layer_norm_" in name or ".ff.net.fc1_" in name:
        raise CheckpointError(
            f"{name} is a tensor of Transformer Engine's FP8 layers, which are not read; save the model from NeMo with"
            " use_te_fp8 false"
        )
    for pattern, replacement in _TO_ORIGINAL:
        name = pattern.sub(replacement, name)
    return name


def from_original(name: str, *, release_1: bool = False) -> str:
    """NeMo's name of a tensor, in the generation of release 2 (`attn1.norm`), or in that of 1.23.0."""
    for pattern, replacement in _FROM_ORIGINAL + (_RELEASE_1 if release_1 else []):
        name = pattern.sub(replacement, name)
    return name
