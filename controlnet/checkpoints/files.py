"""Reads the tensors of a checkpoint file; nothing in a file is ever executed."""

import json
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from controlnet.checkpoints import archive
from controlnet.checkpoints.archive import CheckpointError

PICKLES = (".ckpt", ".pth", ".pt", ".bin")
SUFFIXES = (".safetensors", *PICKLES, ".nemo")
FOLDER_FILES = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.bin",
    "model.safetensors",
    "pytorch_model.bin",
)

# Names that real checkpoints carry beside their tensors (Lightning's callbacks as dictionary keys, best scores as numpy
# numbers, NeMo's configuration).
# Each is replaced by an empty class of ours: the package that the name belongs to is neither imported nor run.
INERT_NAMES = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
    "lightning.pytorch.utilities.parsing.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "nemo.utils.callbacks.nemo_model_checkpoint.NeMoModelCheckpoint",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.nodes.AnyNode",
    "omegaconf.nodes.StringNode",
    "omegaconf.nodes.IntegerNode",
    "omegaconf.nodes.FloatNode",
    "omegaconf.nodes.BooleanNode",
    "typing.Any",
    "builtins.bool",
    "builtins.dict",
    "builtins.float",
    "builtins.int",
    "builtins.list",
    "builtins.str",
    "collections.defaultdict",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "_codecs.encode",
    "pathlib.PosixPath",
)


class _Inert(dict):
    """Stands for an object that the file describes and nobody here needs."""

    def __init__(self, *_: Any, **__: Any):
        super().__init__()

    def __setstate__(self, _: Any) -> None:
        pass


def read(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, on the CPU, memory-mapped where the format allows it.

    Arguments:
        path: a .safetensors file; a .ckpt, .pth, .pt or .bin pickle, read with `weights_only=True` alone; a .nemo
            archive of such a pickle; or a diffusers model folder. A `state_dict` entry is descended into, what is not a
            tensor is left out.
    Raises FileNotFoundError; CheckpointError for a damaged or foreign file, one without tensors, and a pickle that
        names anything but tensors and plain containers.
    """
    path = _file_of(Path(path))
    if path.suffix == ".safetensors":
        tensors = _read_safetensors(path)
    elif path.suffix in PICKLES:
        tensors = _read_pickle(path, str(path))
    elif path.suffix == ".nemo":
        with archive.weights(path) as pickle_path:
            tensors = _read_pickle(pickle_path, str(path))
    else:
        raise CheckpointError(f"{path} has the suffix {path.suffix!r}; expected one of {', '.join(SUFFIXES)}")
    if not tensors:
        raise CheckpointError(f"{path} holds no tensor")
    return tensors


def _file_of(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    for name in FOLDER_FILES:
        if (path / name).is_file():
            return path / name
    raise CheckpointError(f"the folder {path} has none of {', '.join(FOLDER_FILES)}")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, ValueError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is damaged, or no safetensors file: {error}") from error


def _read_pickle(path: Path, origin: str) -> dict[str, Tensor]:
    inert = [(type(name.rpartition(".")[2], (_Inert,), {}), name) for name in INERT_NAMES]
    try:
        with torch.serialization.safe_globals(inert):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{origin} is refused: {_refusal(error)}") from error
    except PermissionError:
        raise
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        # what torch.load raises for truncated archives and byte streams that only look like a pickle
        raise CheckpointError(f"{origin} is damaged, or no PyTorch checkpoint: {error}") from error
    while isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise CheckpointError(f"{origin} holds a {type(content).__name__}; expected a dictionary of tensors")
    return {name: value for name, value in _flat(content) if isinstance(value, Tensor)}


def _flat(content: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The entries of nested dictionaries ("model" and "optimizer" side by side) under dotted names."""
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(key, str):
            yield f"{prefix}{key}", value


def _refusal(error: Exception) -> str:
    """torch.load's lengthy advice (which is to read the file unsafely) reduced to what the file asked for."""
    text = str(error)
    _, found, name = text.partition("GLOBAL ")
    if found:
        return (
            f"it asks to load {name.split()[0]}, which is neither a tensor nor a plain container. Such a pickle can run"
            " code. Ask its author for a .safetensors file"
        )
    reason = text.rpartition("error: ")[2].splitlines()[0]
    return f"it is no PyTorch checkpoint, or a pickle of more than tensors and plain containers ({reason})"
