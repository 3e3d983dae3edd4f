"""ControlNets that are stored relative to a base: as a difference to it, or as a low-rank change (Control-LoRA).

A difference (the file has a tensor `difference`) holds `control - base` for what the U-Net has too. A Control-LoRA (it
has a tensor `lora_controlnet`) holds two factors for each changed weight, as published for SDXL:

    weight = base + up @ down        for NAME.up [out, rank, ...] and NAME.down [rank, in, ...]

Other tensors of it stand for themselves, and what it lacks is the base's.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from controlnet.checkpoints.errors import CheckpointError

MARKS = {"difference": "difference", "lora_controlnet": "lora"}
_WHAT = {
    "difference": "a 'difference' ControlNet: control minus base",
    "lora": "a Control-LoRA: low-rank changes to a base (lora_controlnet)",
}


def kind(names: Iterable[str]) -> str | None:
    """ "difference" or "lora" by the mark among a file's names; None for a ControlNet of its own numbers."""
    return next((MARKS[name] for name in names if name in MARKS), None)


def refusal(kind: str, origin: str) -> CheckpointError:
    """What to say where no base is given."""
    return CheckpointError(
        f"{origin} is {_WHAT[kind]}, no ControlNet by itself; give its base: controlnet.load(path, base=UNET), or once"
        " and for all python -m controlnet.convert SRC DST --base UNET --format original"
    )


def absolute(tensors: Mapping[str, Tensor], base: Mapping[str, Tensor], kind: str, origin: str) -> dict[str, Tensor]:
    """The ControlNet's own tensors.

    Args:
        tensors: the ControlNet's, under the original's names.
        base: those of the U-Net that it belongs to.
        kind: "difference" or "lora".
        origin: names the ControlNet's file in errors.

    Returns:
        The sums, computed in float32, in the dtype of `tensors`; tensors without counterpart in the base as they are.

    Raises:
        CheckpointError: a shape that is not the base's, or one factor without the other.
    """
    if kind == "difference":
        return {
            name: _sum(tensor, base[name], name, origin) if name in base else tensor for name, tensor in tensors.items()
        }
    trunk = {name: tensor for name, tensor in base.items() if not name.startswith(("output_blocks.", "out."))}
    found = dict(trunk)
    for name, tensor in tensors.items():
        module, _, last = name.rpartition(".")
        if last == "down":
            if f"{module}.up" not in tensors:
                raise CheckpointError(f"{origin} has {name} without {module}.up")
            continue
        if last != "up":
            found[name] = tensor
            continue
        weight = f"{module}.weight"
        if f"{module}.down" not in tensors or weight not in trunk:
            lacking = f"{module}.down" if f"{module}.down" not in tensors else f"{weight} in its base"
            raise CheckpointError(f"{origin} has {name} without {lacking}")
        up, down = (tensors[f"{module}.{factor}"].float().flatten(1) for factor in ("up", "down"))
        if up.shape[1] != down.shape[0] or up.shape[0] * down.shape[1] != trunk[weight].numel():
            raise CheckpointError(
                f"{origin}: {module} has factors {list(up.shape)} and {list(down.shape)}; expected those of one rank"
                f" for {list(trunk[weight].shape)} in its base"
            )
        change = (up @ down).reshape(trunk[weight].shape)
        found[weight] = (trunk[weight].float() + change).to(tensor.dtype)
    return found


def _sum(tensor: Tensor, base: Tensor, name: str, origin: str) -> Tensor:
    if tensor.shape != base.shape:
        raise CheckpointError(f"{origin}: {name} is {list(tensor.shape)}, and {list(base.shape)} in its base")
    with torch.no_grad():
        return (tensor.float() + base.float()).to(tensor.dtype)
