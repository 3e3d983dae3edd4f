"""Where a checkpoint's tensors lie: the one look-up from a user's path to weights files, for every entry point.

A path is a weights file, a diffusers folder of a model or of a pipeline, a training run, or one of its checkpoints.
"""

import json
import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from controlnet.checkpoints import runs
from controlnet.checkpoints.errors import CheckpointError

logger = logging.getLogger(__name__)

PICKLES = (".ckpt", ".pth", ".pt", ".bin")
SUFFIXES = (".safetensors", *PICKLES, ".nemo")
# A pipeline's folders by the part that they hold; SDXL has two text encoders.
SUBFOLDERS = {
    "unet": "unet",
    "control": "controlnet",
    "first_stage": "vae",
    "cond_stage": "text_encoder",
    "cond_stage_2": "text_encoder_2",
}
# Weights files of a model's folder are STEM.SUFFIX, or with a variant ("fp16", "non_ema") STEM.VARIANT.SUFFIX.
_STEMS = {".safetensors": ("diffusion_pytorch_model", "model"), ".bin": ("diffusion_pytorch_model", "pytorch_model")}
_VARIANTS = ("", "fp16", "bf16")  # in order of preference; any other one is taken when it is alone
# Pipelines of other families, by a folder that Stable Diffusion's do not have.
_FOREIGN_FOLDERS = {
    "transformer": "a diffusion transformer (Stable Diffusion 3, Flux and the like)",
    "prior": "a prior (Kandinsky, Stable Cascade)",
}


@dataclass(frozen=True)
class Source:
    """A checkpoint's place on disk.

    Attributes:
        path: as it was given.
        kind: "file"; "model", a diffusers folder of one model; "pipeline", one of several models; "checkpoint", a step
            of a training run (for the folder of a run its newest complete one).
        folder: the model's, pipeline's or checkpoint's folder; None for a file.
        files: the weights files, several where a model is stored in shards; under the part for a pipeline ("unet",
            "control", "first_stage", "cond_stage", "cond_stage_2"), else under "".
        average: the averaged weights that a training run kept beside the others.
    """

    path: Path
    kind: Literal["file", "model", "pipeline", "checkpoint"]
    folder: Path | None
    files: dict[str, list[Path]] = field(default_factory=dict)
    average: Path | None = None

    @property
    def config(self) -> Path | None:
        """The training configuration beside a checkpoint of our own; None for anything else."""
        return self.folder / runs.CONFIG if self.kind == "checkpoint" and self.folder else None


def resolve(path: str | Path, only: str | None = None) -> Source:
    """What a user's path names.

    Args:
        path: a weights file (.safetensors, .ckpt, .pth, .pt, .bin, .nemo); a diffusers folder of a model or of a
            pipeline, in one file or in shards with their index.json, of any variant (fp16); the folder of a training
            run, or of one of its checkpoints.
        only: of a pipeline's folder, look for this part's files alone.

    Raises:
        FileNotFoundError: nothing is there.
        CheckpointError: a folder without weights, an incomplete checkpoint, or several files with nothing to choose by.
    """
    path = Path(path)
    if path.is_file():
        return Source(path, "file", None, {"": [path]})
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if (step := _step_folder(path)) is not None:
        return _checkpoint(path, step)
    subfolders = {part: path / name for part, name in SUBFOLDERS.items() if (path / name).is_dir()}
    for name, what in _FOREIGN_FOLDERS.items():
        if (path / name).is_dir():
            raise CheckpointError(f"{path} holds {name}/: {what}; expected a pipeline of Stable Diffusion")
    if only in subfolders:
        subfolders = {only: subfolders[only]}
    if not subfolders:
        return Source(path, "model", path, {"": _weights(path)})
    several = sorted(folder.name for folder in path.glob("controlnet_*") if folder.is_dir())
    if several:
        raise CheckpointError(f"{path} has several ControlNets: controlnet, {', '.join(several)}; name one's folder")
    return Source(path, "pipeline", path, {part: _weights(folder) for part, folder in subfolders.items()})


def _step_folder(path: Path) -> Path | None:
    """The training checkpoint that a folder is, or, for a run, its newest complete one; None for other folders."""
    if (path / runs.MANIFEST).is_file() or re.fullmatch(r"step-\d+", path.name):
        problem = runs.fault(path)
        if problem is not None:
            raise CheckpointError(problem)
        return path
    for folder in (path / runs.CHECKPOINTS, path):
        if runs.checkpoints(folder):
            newest = runs.newest_complete(folder, logger.warning)
            if newest is None:
                raise CheckpointError(f"{path} holds no complete checkpoint")
            return newest
    if (path / runs.CHECKPOINTS).is_dir():
        raise CheckpointError(f"{path} holds no complete checkpoint: no step was saved")
    return None


def _checkpoint(path: Path, step: Path) -> Source:
    files = [step / name for name in (runs.CONTROL, runs.UNET) if (step / name).is_file()]
    if not files:
        raise CheckpointError(f"{step} has no {runs.CONTROL}")
    average = step / runs.AVERAGE
    return Source(path, "checkpoint", step, {"": files}, average if average.is_file() else None)


def _weights(folder: Path) -> list[Path]:
    """The weights files of a model's folder: by their usual names, else the only one there."""
    names = sorted(file.name for file in folder.iterdir() if file.is_file())
    for suffix, stems in _STEMS.items():
        for stem in stems:
            found = {}
            for name in names:
                if match := re.fullmatch(rf"{stem}(?:\.(?P<variant>\w+))?{re.escape(suffix)}", name):
                    found.setdefault(match["variant"] or "", [folder / name])
                elif match := re.fullmatch(rf"{stem}{re.escape(suffix)}\.index(?:\.(?P<variant>\w+))?\.json", name):
                    found[match["variant"] or ""] = _shards(folder / name)
            variant = next((variant for variant in _VARIANTS if variant in found), None)
            if variant is None and len(found) == 1:
                variant = next(iter(found))
            if variant is not None:
                return found[variant]
    others = [name for name in names if name.endswith(SUFFIXES)]
    if len(others) == 1:
        return [folder / others[0]]
    expected = [f"{stem}{suffix}" for suffix, stems in _STEMS.items() for stem in stems]
    if others:
        raise CheckpointError(f"the folder {folder} has {', '.join(others[:8])}; name one of the files")
    raise CheckpointError(
        f"the folder {folder} has none of {', '.join(expected)}, nor shards of them with an index.json"
    )


def _shards(index: Path) -> list[Path]:
    """The files that an index.json spreads a model over."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        plain = all(Path(name).name == name for name in names)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} is damaged; expected a mapping with weight_map: {error}") from error
    if not names or not plain:
        raise CheckpointError(f"{index} names {names[:4]}; expected the names of files beside it")
    there = {path.name for path in index.parent.iterdir() if path.is_file()}  # a name may be longer than any file's
    missing = [name for name in names if name not in there]
    if missing:
        raise CheckpointError(
            f"{index} names {len(names)} files, of which {len(missing)} are missing: {', '.join(missing[:4])}"
        )
    return [index.parent / name for name in names]
