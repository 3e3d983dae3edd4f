"""Recognises the layout of a checkpoint by its keys, and sorts them into parts under the original's names.

The original's names are those of latent-diffusion: `model.diffusion_model.*` (U-Net), `control_model.*` (ControlNet),
`first_stage_model.*` (VAE) and `cond_stage_model.*` (text encoder); within U-Net and ControlNet `input_blocks.1.0...`.
Stable Diffusion XL's text encoders are `conditioner.embedders.0.*` (CLIP) and `conditioner.embedders.1.*` (OpenCLIP).
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from controlnet.checkpoints import nemo, relative
from controlnet.checkpoints.errors import CheckpointError

MODELS = frozenset({"unet", "control"})
PREFIXES = {
    "unet": "model.diffusion_model.",
    "control": "control_model.",
    "first_stage": "first_stage_model.",
    "cond_stage": "cond_stage_model.",
}
_EMBEDDER = re.compile(r"conditioner\.embedders\.\d+\.")
_DIFFUSERS_MARKS = ("down_blocks.", "mid_block.", "up_blocks.")
_DIFFUSERS_BARE = (*_DIFFUSERS_MARKS, "conv_in.", "conv_norm_out.", "conv_out.", "time_embedding.", "add_embedding.")
# How the names of a part begin in a file that holds this part alone.
_BARE = {
    "unet": ("time_embed.", "input_blocks.", "middle_block.", "output_blocks.", "out.", "label_emb.", *_DIFFUSERS_BARE),
    "control": ("zero_convs.", "input_hint_block.", "middle_block_out.", "controlnet_"),
    # before the first stage, whose encoder has no layers
    "cond_stage": (
        "transformer.",
        "text_model.",
        "embeddings.",
        "encoder.layers.",
        "final_layer_norm.",
        "text_projection.",
    ),
    "first_stage": ("encoder.", "decoder.", "quant_conv.", "post_quant_conv."),
}


def prefixes(parts: Iterable[str], is_xl: bool) -> dict[str, str]:
    """The original's prefix of each part; of Stable Diffusion XL's refiner the second text encoder is the only one."""
    parts = set(parts)
    second = 0 if "unet" in parts and "cond_stage" not in parts else 1
    embedders = {"cond_stage": "conditioner.embedders.0.", "cond_stage_2": f"conditioner.embedders.{second}."}
    return PREFIXES | embedders if is_xl else PREFIXES


# What people take for a ControlNet or a Stable Diffusion checkpoint, by a piece of its tensors' names.
_OTHERS = {
    "lora_unet_": "a LoRA (kohya's names): it changes a U-Net and is no model by itself",
    ".lora_A.": "a LoRA: it changes a model and is none by itself",
    ".lora_B.": "a LoRA: it changes a model and is none by itself",
    "lora.down.weight": "a LoRA: it changes a model and is none by itself",
    "lllite_": "a ControlNet-LLLite, another architecture than ControlNet",
    "adapter.body.": "a T2I-Adapter, another architecture than ControlNet",
    "image_proj": "an IP-Adapter, another architecture than ControlNet",
    "task_embedding": "a ControlNet-Union, with control types that are not served",
    "control_add_embedding.": "a ControlNet-Union, with control types that are not served",
    "double_blocks.": "a model of the Flux family, which is not served",
    "joint_blocks.": "a model of the Stable Diffusion 3 family, which is not served",
    "single_transformer_blocks.": "a model of the Flux family, which is not served",
    "transformer_blocks.0.attn.add_q_proj.": "a diffusion transformer, which is not served",
}


def other_model(names: Iterable[str]) -> str | None:
    """What other kind of model has such names; None for none that is known."""
    return next((what for piece, what in _OTHERS.items() if any(piece in name for name in names)), None)


@dataclass(frozen=True)
class Contents:
    """What a file holds.

    Attributes:
        layout: "original", "nemo" or "diffusers".
        parts: for each of "unet", "control", "first_stage", "cond_stage" and, of Stable Diffusion XL's second text
            encoder, "cond_stage_2" that is there: name within the part -> the file's own key. Names of U-Net and
            ControlNet are the original's, but diffusers' in a diffusers file, whose renaming hangs on the architecture.
        tensors: the file's tensors under its own keys.
        stated: for U-Net and ControlNet the parameters that the files state beside the tensors: the attention heads.
        relative: of a ControlNet whose numbers are to be added to a base: "difference", or "lora" for a Control-LoRA.
    """

    layout: str
    parts: Mapping[str, Mapping[str, str]]
    tensors: Mapping[str, Tensor]
    stated: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    relative: str | None = None

    def summary(self) -> str:
        """ "unet 686, first_stage 248": the parts with their number of tensors."""
        return ", ".join(f"{part} {len(names)}" for part, names in self.parts.items()) or "nothing known"


def sort(tensors: Mapping[str, Tensor], origin: str) -> Contents:
    """Sorts a checkpoint's tensors into parts.

    Args:
        tensors: under the file's own keys.
        origin: names the file in errors.

    Raises:
        CheckpointError: an unknown layout, or a mixture of two.
    """
    parts: dict[str, dict[str, str]] = {}
    diffusers, others, renamed = [], [], False
    # A ControlNet without prefix has the trunk's names beside its own: what looks like a U-Net is its trunk.
    trunk = "control" if any(_unwrapped(key).startswith(_BARE["control"]) for key in tensors) else "unet"
    for key in tensors:
        part, name = _place(key, trunk)
        if part is None:
            continue
        if _is_diffusers(name):
            diffusers.append((part, key))
        elif part in MODELS:
            others.append(key)
            original = nemo.to_original(name)
            renamed |= original != name or key.startswith(("model.model.", "model.control_model."))
            name = original
        parts.setdefault(part, {})[name] = key
    if "text_projection.weight" in parts.get("cond_stage", {}):
        parts["cond_stage_2"] = parts.pop("cond_stage")  # the folder of the second text encoder, which alone has it
    foreign = [key for part, key in diffusers if part in MODELS]
    if foreign and others:
        raise CheckpointError(
            f"{origin} has two layouts in one file: {foreign[0]} is diffusers' name, {others[0]} one of the original"
        )
    if (what := other_model(tensors.keys())) is not None:
        raise CheckpointError(f"{origin} is {what}")
    if not parts:
        raise CheckpointError(f"{origin} has no known layout; its names begin {', '.join(sorted(tensors)[:4])}")
    layout = "nemo" if renamed else "diffusers" if diffusers and not others else "original"
    return Contents(layout, parts, tensors, relative=relative.kind(map(_unwrapped, tensors)))


def _unwrapped(key: str) -> str:
    """A key without what torch.compile and DistributedDataParallel put into it."""
    return ".".join(piece for piece in key.split(".") if piece not in ("_orig_mod", "module"))


def _place(key: str, trunk: str) -> tuple[str | None, str]:
    """The part that a key belongs to (None: none of ours, as EMA copies and schedules) and its name there.

    `trunk` is the part that a name of encoder or middle block belongs to when it has no prefix.
    """
    name = _unwrapped(key)
    for candidate in (name.removeprefix("model."), name):
        for part, prefix in PREFIXES.items():
            if candidate.startswith(prefix):
                return part, candidate.removeprefix(prefix)
        if (match := _EMBEDDER.match(candidate)) is not None:
            inner = candidate[match.end() :]
            return "cond_stage_2" if inner.startswith("model.") else "cond_stage", inner
    if name.startswith("diffusion_model."):
        return "unet", name.removeprefix("diffusion_model.")
    for part, beginnings in _BARE.items():
        if name.startswith(beginnings):
            return trunk if part == "unet" else part, name
    return None, name


def _is_diffusers(name: str) -> bool:
    return any(mark in name for mark in _DIFFUSERS_MARKS) or name.startswith(("controlnet_", *_DIFFUSERS_BARE))


def grouped(names: Iterable[str]) -> str:
    """ "first_stage_model 248, model_ema 688": names counted by their first component."""
    counts = Counter(name.partition(".")[0] for name in names)
    return ", ".join(f"{group} {count}" for group, count in sorted(counts.items()))
