"""Reads the tensors out of a PyTorch pickle (.ckpt, .pth, .pt, .bin); nothing in a file is ever executed.

`torch.load(weights_only=True)` does the reading. Names that a file carries beside its tensors (Lightning's callbacks,
configurations, numpy scores) are found by disassembling it first, and an empty class of ours stands for each: the
package that a name belongs to is neither imported nor run. A name that only an attack has a use for is refused.
"""

import _compat_pickle
import mmap
import pickle
import pickletools
import re
import struct
import sys
import zipfile
from collections import OrderedDict, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from controlnet.checkpoints.errors import CheckpointError

_DEPTH = 64  # dictionaries in dictionaries; NeMo's go four deep
_ENTRIES = 100_000  # of all dictionaries together, each counted as often as it is named; SDXL's go to 10,000
# Data of the standard library and numpy, by full name. Classes of other packages need no entry.
_DATA = re.compile(
    r"builtins\.(bool|bytes|complex|dict|float|frozenset|int|list|object|range|set|slice|str|tuple)"
    r"|_codecs\.encode|copyreg\._reconstructor"
    r"|argparse\.Namespace|types\.SimpleNamespace|typing\.\w+|uuid\.(UUID|SafeUUID)|decimal\.Decimal"
    r"|fractions\.Fraction|random\.Random|pathlib(\._local)?\.\w*Path"
    r"|collections\.(defaultdict|deque|Counter|OrderedDict|UserDict)|datetime\.(date|datetime|time|timedelta|timezone)"
    r"|numpy\.(ndarray|dtype|bool_?|u?int\d+|float\d+|complex\d+|str_|bytes_|datetime64|timedelta64|longdouble)"
    r"|numpy\.dtypes\.\w+|numpy\.(core|_core)\.(multiarray\.(_reconstruct|scalar)|numeric\._frombuffer)"
    r"|numpy\.random\.(_pickle|_mt19937|_pcg64|mtrand)\.\w+|numpy\.ma\.core\.(MaskedArray|_mareconstruct)"
)
# What torch.load raises for truncated archives and byte streams that only look like a pickle.
_DAMAGE = (
    RuntimeError, OSError, EOFError, ValueError, LookupError, AttributeError, TypeError, AssertionError, MemoryError,
    OverflowError, struct.error, zipfile.BadZipFile,
)  # fmt: skip


class _Object(dict):
    """Stands for an object that the file describes and nobody here needs."""

    def __init__(self, *_: Any, **__: Any):
        super().__init__()

    def __setstate__(self, _: Any) -> None:
        pass


class _Mapping:
    """Stands for a class of dictionaries, whose entries are read: torch.load takes entries for plain ones alone."""

    def __new__(cls, *_: Any, **__: Any) -> OrderedDict:
        return OrderedDict()


class _List:
    """Stands for a class of lists, likewise."""

    def __new__(cls, *_: Any, **__: Any) -> list:
        return []


def read_pickle(path: Path, origin: str) -> dict[str, Tensor]:
    """The tensors of a pickle by dotted name, memory-mapped where the file is a zip archive.

    Args:
        path: the file.
        origin: names it in errors; another than `path` for the member of an archive.

    Raises:
        CheckpointError: a damaged or foreign file, an archive with compressed entries, dictionaries that contain
            themselves, and names that a pickle of tensors has no use for.
    """
    try:
        with open(path, "rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"
        if zipped:
            _check_entries(path, origin)
        stand_ins = [(_stand_in(name, origin), name) for name in sorted(_names(path, zipped))]
        with torch.serialization.safe_globals(stand_ins):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped or None)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{origin} is refused: {_refusal(error)}") from error
    except (CheckpointError, PermissionError):
        raise
    except _DAMAGE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{origin} is damaged, or no PyTorch checkpoint: {reason}") from error
    return _tensors(content, origin)


def _check_entries(path: Path, origin: str) -> None:
    """PyTorch stores its entries as they are and maps them; a compressed one would be read as noise."""
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise CheckpointError(
                f"{origin} is a zip archive with compressed entries ({entry.filename}: {entry.compress_size} bytes for"
                f" {entry.file_size}), packed again by another program; expected them stored, as torch.save writes"
                " them (zip -0)"
            )
    total = sum(entry.file_size for entry in entries)
    if total > size:
        raise CheckpointError(f"{origin} is damaged: its entries claim {total} bytes, the file has {size}")


def _names(path: Path, zipped: bool) -> set[str]:
    """The full names of classes and functions that a file asks for and torch.load does not know by itself."""
    if zipped:
        return set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    known = torch.serialization._weights_only_unpickler._get_allowed_globals()
    names: list[str] = []
    # The older format: five pickles in a row, then the storages' bytes. Mapped, so that a claim of more bytes than the
    # file has is an error here, and no allocation of that size anywhere.
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for _ in range(5):
            if content.tell() == len(content):
                break
            names += [arg for opcode, arg, _ in pickletools.genops(content) if opcode.name == "GLOBAL"]
    return {_present_name(*name.split(" ", 1)) for name in names} - known.keys()


def _present_name(module: str, name: str) -> str:
    """The full name; protocol 2 writes those of Python 2, which torch.load looks up under today's."""
    module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
    return f"{_compat_pickle.IMPORT_MAPPING.get(module, module)}.{name}"


def _stand_in(name: str, origin: str) -> type:
    """The class that stands for a name; CheckpointError for a name that is neither data nor another package's class."""
    module, _, short = name.rpartition(".")
    package = module.partition(".")[0]
    foreign_class = package not in sys.stdlib_module_names and short[:1].isupper()
    if not (foreign_class or _DATA.fullmatch(name)):
        raise CheckpointError(
            f"{origin} is refused: it asks to load {name}, which is neither a tensor nor plain data. Such a pickle can"
            " run code. Ask its author for a .safetensors file"
        )
    kinds = {"dict": _Mapping, "list": _List, "deque": _List}
    kind = next((kind for ending, kind in kinds.items() if short.lower().endswith(ending)), _Object)
    return type(short, (kind,), {})


def _tensors(content: Any, origin: str) -> dict[str, Tensor]:
    """The tensors of nested dictionaries under dotted names; a `state_dict` stands for all that holds it."""
    depth = 0
    while isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content, depth = content["state_dict"], depth + 1
        if depth > _DEPTH:
            raise CheckpointError(f"{origin} is refused: a state_dict that contains itself")
    if isinstance(content, _Object) and not content:
        raise CheckpointError(
            f"{origin} holds an object of the class {type(content).__name__}, saved whole; expected a dictionary of"
            " tensors (torch.save of its state_dict)"
        )
    if not isinstance(content, dict):
        raise CheckpointError(f"{origin} holds a {type(content).__name__}; expected a dictionary of tensors")
    tensors = {name: value for name, value in _flat(content, origin) if isinstance(value, Tensor)}
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided or tensor.is_quantized:
            raise CheckpointError(f"{origin}: {name} is a sparse or quantised tensor; expected plain ones")
        if tensor.numel() * tensor.element_size() > max(tensor.untyped_storage().nbytes(), 1 << 20):
            raise CheckpointError(f"{origin} is refused: {name} is {list(tensor.shape)}, larger than what is stored")
    return tensors


def _flat(content: dict, origin: str) -> Iterator[tuple[str, Any]]:
    """The entries of nested dictionaries ("model" and "optimizer" side by side) under dotted names."""
    waiting, entries = deque([("", content, ())]), 0
    while waiting:
        prefix, content, parents = waiting.popleft()
        if id(content) in parents or len(parents) > _DEPTH:
            raise CheckpointError(f"{origin} is refused: its dictionaries contain themselves, or lie {_DEPTH} deep")
        entries += len(content)
        if entries > _ENTRIES:
            raise CheckpointError(f"{origin} is refused: more than {_ENTRIES:,} entries in its dictionaries")
        for key, value in content.items():
            if isinstance(key, str) and isinstance(value, dict):
                waiting.append((f"{prefix}{key}.", value, (*parents, id(content))))
            elif isinstance(key, str):
                yield f"{prefix}{key}", value


def _refusal(error: Exception) -> str:
    """torch.load's lengthy advice (which is to read the file unsafely) reduced to what the file asked for."""
    text = str(error)
    _, found, name = text.partition("GLOBAL ")
    if found:
        return (
            f"it asks to load {name.split()[0]}, which is neither a tensor nor plain data. Such a pickle can run code."
            " Ask its author for a .safetensors file"
        )
    reason = text.rpartition("error: ")[2].splitlines()[0]
    return f"it is no PyTorch checkpoint, or a pickle of more than tensors and plain containers ({reason})"
