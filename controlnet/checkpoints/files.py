"""Reads the tensors of checkpoint files; nothing in a file is ever executed."""

import json
from pathlib import Path

from torch import Tensor

from controlnet.checkpoints import archive
from controlnet.checkpoints.errors import CheckpointError
from controlnet.checkpoints.pickles import read_pickle
from controlnet.checkpoints.sources import PICKLES, SUFFIXES, resolve

__all__ = ["PICKLES", "SUFFIXES", "CheckpointError", "read", "read_files"]

_LFS = b"version https://git-lfs"


def read(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, on the CPU, memory-mapped where the format allows it.

    Args:
        path: what `sources.resolve` takes, but for a pipeline of several models. A pickle is read with
            `weights_only=True` alone; its `state_dict` entry is descended into, what is not a tensor is left out.

    Raises:
        FileNotFoundError: nothing is there.
        CheckpointError: a damaged or foreign file, one without tensors, and a pickle that names anything but tensors
            and plain data.
    """
    source = resolve(path)
    if source.kind == "pipeline":
        raise CheckpointError(f"{path} is the folder of a pipeline; expected one of {', '.join(source.files)}")
    return read_files(source.files[""])


def read_files(paths: list[Path]) -> dict[str, Tensor]:
    """The tensors of all the files; a name in two of them is an error."""
    tensors: dict[str, Tensor] = {}
    for path in paths:
        found = _read_file(path)
        twice = tensors.keys() & found.keys()
        if twice:
            raise CheckpointError(
                f"{path} has {min(twice)} once more; expected each tensor in one file of {len(paths)}"
            )
        tensors |= found
    return tensors


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix not in SUFFIXES:
        raise CheckpointError(f"{path} has the suffix {path.suffix!r}; expected one of {', '.join(SUFFIXES)}")
    _check_content(path)
    if path.suffix == ".safetensors":
        tensors = _read_safetensors(path)
    elif path.suffix in PICKLES:
        tensors = read_pickle(path, str(path))
    else:
        with archive.weights(path) as pickle_path:
            tensors = read_pickle(pickle_path, str(path))
    if not tensors:
        raise CheckpointError(f"{path} holds no tensor")
    return tensors


def _check_content(path: Path) -> None:
    """CheckpointError for what a download often leaves instead of weights, and for a file named as another kind."""
    with open(path, "rb") as file:
        head = file.read(512)
    if head.startswith(_LFS):
        raise CheckpointError(
            f"{path} is a Git LFS pointer, not the weights themselves; fetch them with `git lfs pull`, or download the"
            " file"
        )
    if head.lstrip()[:15].lower().startswith((b"<!doctype html", b"<html")):
        raise CheckpointError(f"{path} is no checkpoint but damaged by its download: an HTML page")
    kind = _kind(head, path.stat().st_size)
    if kind is not None and path.suffix not in kind[1]:
        raise CheckpointError(f"{path} is {kind[0]} by its content; expected the suffix {' or '.join(kind[1])}")


def _kind(head: bytes, size: int) -> tuple[str, tuple[str, ...]] | None:
    """What a file is by its first bytes, and the suffixes of such files; None where they do not tell."""
    if head.startswith(b"PK\x03\x04"):
        return "a PyTorch checkpoint (a pickle)", PICKLES
    if head[8:9] == b"{" and 0 < int.from_bytes(head[:8], "little") <= size - 8:
        return "a safetensors file", (".safetensors",)
    if head[257:262] == b"ustar":
        return "a tar archive", (".nemo",)
    if head.startswith(b"GGUF"):
        return "a GGUF file, which is not read", SUFFIXES[:1]
    return None


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, ValueError, json.JSONDecodeError, KeyError, OverflowError) as error:
        raise CheckpointError(f"{path} is damaged, or no safetensors file: {error}") from error
