"""Puts a checkpoint's tensors into a U-Net or a ControlNet, and says what matched, what is new and what was unused."""

import difflib
import itertools
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from controlnet.checkpoints import layouts, openclip, relative, vae
from controlnet.checkpoints.contents import model_keys, open_contents
from controlnet.checkpoints.errors import CheckpointError

logger = logging.getLogger(__name__)

CONTROL_ONLY = ("zero_convs.", "input_hint_block.", "middle_block_out.")
_LISTED = 8
_MOST_COMPARED = 2000  # names, each in some 20 us; Stable Diffusion's U-Net has 686


@dataclass(frozen=True)
class Report:
    """What loading did.

    Attributes:
        path: the file.
        layout: "original", "nemo" or "diffusers".
        matched: the model's tensors that were loaded.
        new: the model's tensors that the file does not have, and need not have.
        unused: the file's tensors that were not loaded, by the file's names.
    """

    path: str
    layout: str
    matched: list[str]
    new: list[str]
    unused: list[str]

    def __str__(self) -> str:
        text = f"{self.path} ({self.layout}): {len(self.matched)} tensors matched, {len(self.new)} new"
        text += f" ({layouts.grouped(self.new)})" if self.new else ""
        text += f", {len(self.unused)} unused"
        return text + (f" ({layouts.grouped(self.unused)})" if self.unused else "")


@dataclass(frozen=True)
class Ready:
    """Tensors that were found to fit a model, and are not in it yet.

    Several files are checked, each against its model, before the first one is loaded.
    """

    module: nn.Module
    tensors: Mapping[str, Tensor]
    report: Report

    def load(self) -> Report:
        """Copies the tensors into the model; CheckpointError for values that are not finite, before any is copied."""
        check_finite(self.tensors, self.report.path)
        _copy(self.module, self.tensors)
        logger.info("%s", self.report)
        return self.report


def load_unet(unet: nn.Module, path: str | Path, from_nemo: bool | None = None) -> Report:
    """Loads a U-Net's weights from a file of any known layout.

    Args:
        unet: `UNet`.
        path: what `sources.resolve` takes.
        from_nemo: what the configuration says of the file. The file's own names decide; a contradiction is logged.

    Raises:
        CheckpointError: a tensor is missing or has another shape, or the file holds no U-Net.
    """
    return ready_unet(unet, path, from_nemo).load()


def ready_unet(unet: nn.Module, path: str | Path, from_nemo: bool | None = None) -> Ready:
    """`load_unet` but for the loading."""
    return _ready(unet, _opened(path, "unet", from_nemo), "unet", path, lambda name: False)


def load_control(
    control: nn.Module, path: str | Path, from_nemo: bool | None = None, *, source: str | None = None
) -> Report:
    """Loads a ControlNet's weights, or starts a ControlNet from a U-Net's.

    Args:
        control: `ControlNet`.
        path, from_nemo: as `load_unet`.
        source: "control" wants a trained ControlNet; "unet" takes encoder and middle block from a U-Net and leaves zero
            convolutions and hint encoder as they are; None is "control" where the file has one, else "unet".

    Raises:
        CheckpointError: a tensor of encoder or middle block is missing or has another shape, when one of a trained
            ControlNet is missing, or the file holds no such part.
    """
    return ready_control(control, path, from_nemo, source=source).load()


def ready_control(
    control: nn.Module, path: str | Path, from_nemo: bool | None = None, *, source: str | None = None
) -> Ready:
    """`load_control` but for the loading."""
    contents = _opened(path, source or "control", from_nemo)
    if source is None:
        source = "control" if "control" in contents.parts else "unet"
    return _ready(control, contents, source, path, lambda name: source == "unet" and name.startswith(CONTROL_ONLY))


def parts(path: str | Path) -> list[str]:
    """Which of "unet", "control", "first_stage", "cond_stage" and "cond_stage_2" a checkpoint holds."""
    return list(open_contents(path).parts)


def part_tensors(path: str | Path, part: str) -> dict[str, Tensor]:
    """The tensors of one part of a file, under the part's own names; the VAE's are diffusers'.

    Args:
        part: "first_stage", "cond_stage", or "cond_stage_2", Stable Diffusion XL's second text encoder, which comes
            under transformers' names (CLIPTextModelWithProjection).

    Raises:
        CheckpointError: the file has no such part.
    """
    contents = _opened(path, part)
    if part not in contents.parts:
        raise CheckpointError(f"{path} holds {contents.summary()}; expected a {part}")
    tensors = {name: contents.tensors[key] for name, key in contents.parts[part].items()}
    rename = {"first_stage": vae.to_diffusers, "cond_stage_2": openclip.to_diffusers}.get(part, dict)
    return rename(tensors)


def fill(module: nn.Module, tensors: Mapping[str, Tensor], origin: str, optional: Callable[[str], bool]) -> list[str]:
    """Copies tensors into a module's parameters and buffers; returns the names of those that had none to take.

    A tensor [C, C, 1, 1] and one [C, C] of the same numbers are taken for each other (1x1 convolution and linear).

    Raises:
        CheckpointError: listing names and shapes, before anything is changed; also for NaN and infinity.
    """
    wanted = module.state_dict()
    missing = compare(wanted, tensors, origin, optional)
    check_finite({name: tensors[name] for name in wanted if name in tensors}, origin)
    _copy(module, tensors)
    return missing


@torch.no_grad()
def _copy(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in module.state_dict().items():
        if name in tensors:
            tensor.copy_(tensors[name].reshape(tensor.shape))


def compare(
    wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor], origin: str, optional: Callable[[str], bool]
) -> list[str]:
    """The wanted names that are not there and need not be; CheckpointError, listing them, for others and for shapes."""
    missing = [name for name in wanted if name not in tensors]
    required = [name for name in missing if not optional(name)]
    if required:
        unused = [name for name in tensors if name not in wanted]
        rows = [f"{name} {list(wanted[name].shape)}" + near(name, unused, "in the file") for name in required[:_LISTED]]
        raise CheckpointError(f"{origin} lacks {len(required)} of {len(wanted)} tensors: {listing(rows, required)}")
    wrong = [
        f"{name} is {list(tensors[name].shape)}, expected {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in tensors and not _same_numbers(tensors[name].shape, tensor.shape)
    ]
    if wrong:
        raise CheckpointError(
            f"{origin} has {len(wrong)} tensors of another shape than the model (another width or architecture):"
            f" {listing(wrong[:_LISTED], wrong)}"
        )
    return missing


def check_finite(tensors: Mapping[str, Tensor], origin: str) -> None:
    """CheckpointError, listing names, for tensors with NaN or infinity in them."""
    wrong = [name for name, tensor in tensors.items() if not _is_finite(tensor)]
    if wrong:
        raise CheckpointError(
            f"{origin} has values that are not finite (NaN or infinity) in {len(wrong)} of {len(tensors)} tensors:"
            f" {listing(wrong[:_LISTED], wrong)}; the file is damaged, or the model was when it was saved"
        )


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    # one pass without a copy; the float8 types know no such reduction
    low, high = (tensor.float() if tensor.element_size() == 1 else tensor).aminmax()
    return bool(low.isfinite() and high.isfinite())


def near(name: str, known: Iterable[str], where: str) -> str:
    """ " (nearest in the file: NAME)" for a name that a slip of the hand may have made of another; "" without one."""
    similar = (other for other in known if abs(len(other) - len(name)) <= len(name) // 2)
    found = difflib.get_close_matches(name, itertools.islice(similar, _MOST_COMPARED), n=1, cutoff=0.8)
    return f" (nearest {where}: {found[0]})" if found else ""


def listing(rows: list[str], everything: list[str]) -> str:
    """The rows, and how many more there are."""
    rest = len(everything) - len(rows)
    return "; ".join(rows) + (f"; and {rest} more" if rest else "")


def _same_numbers(found: torch.Size, expected: torch.Size) -> bool:
    if found == expected:
        return True
    shorter, longer = sorted((tuple(found), tuple(expected)), key=len)
    return len(shorter) == 2 and longer == (*shorter, *(1,) * (len(longer) - 2))


def _opened(path: str | Path, part: str, from_nemo: bool | None = None) -> layouts.Contents:
    contents = open_contents(path, part)
    if from_nemo is not None and from_nemo != (contents.layout == "nemo"):
        logger.info("%s: from_NeMo is %s, but the names in it are %s; read as such", path, from_nemo, contents.layout)
    return contents


def _ready(
    module: nn.Module, contents: layouts.Contents, part: str, path: str | Path, optional: Callable[[str], bool]
) -> Ready:
    if part not in contents.parts:
        what = {"unet": "a U-Net", "control": "a ControlNet"}[part]
        raise CheckpointError(f"{path} holds {contents.summary()}; expected {what}")
    if part == "control" and contents.relative is not None:
        raise relative.refusal(contents.relative, str(path))
    keys = model_keys(contents, part, str(path), module.arch)
    wanted = module.state_dict()
    new = compare(wanted, {name: contents.tensors[key] for name, key in keys.items()}, str(path), optional)
    used = {name: key for name, key in keys.items() if name in wanted}
    taken = set(used.values())
    report = Report(
        path=str(path),
        layout=contents.layout,
        matched=[name for name in wanted if name in used],
        new=new,
        unused=[key for key in contents.tensors if key not in taken],
    )
    return Ready(module, {name: contents.tensors[key] for name, key in used.items()}, report)
