"""The user's file of what was checked and measured on this machine: one JSON file per device and set of versions.

{"identity": {...},                       what it was made with (`machine.identity`); another identity has another file
 "faults": [{"op", "backend", "dtype", "case", "fault", "date"}],       found by `python -m cnkernels.check`
 "checked": {"date", "kernels": [[op, backend, dtype], ...]} or null,   when last, and all that was ever checked
 "choices": {op: [{"dtype", "head_dim", "direction", "size", "backend", "seconds": {backend: s}, "date",
                   "launches": bool, "configurations": {backend: configuration}, "by_rule": {backend: s}}]}}

Choices are what `python -m cnkernels.tune` measured; "launches" says whether launch configurations were, and the last
two are there where a backend is faster with others than by rule.

Files are replaced atomically, under a lock. A file that cannot be read is one warning and counts as empty.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cnkernels import variables
from cnkernels.machine import Identity

logger = logging.getLogger(__name__)

Record = dict[str, Any]


def folder() -> Path:
    """Where the files are: $CNKERNELS_CACHE, else $XDG_CACHE_HOME/cnkernels, else ~/.cache/cnkernels."""
    given = variables.read("CNKERNELS_CACHE")
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cnkernels"


def path(identity: Identity) -> Path:
    """The file of one device with one set of versions."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    name = re.sub(r"[^a-z0-9]+", "-", str(identity["device"]).lower()).strip("-")
    return folder() / f"{name}-{digest}.json"


def empty(identity: Identity) -> Record:
    return {"identity": identity, "faults": [], "checked": None, "choices": {}}


def read(identity: Identity) -> Record:
    """The record of this identity; an empty one where there is none, or where its file is damaged (one warning)."""
    file = path(identity)
    try:
        record = json.loads(file.read_text())
        _validate(record, identity)
    except FileNotFoundError:
        return empty(identity)
    except (OSError, ValueError) as error:
        logger.warning("%s is not used: %s. Delete it, or run python -m cnkernels.check again.", file, error)
        return empty(identity)
    return record


def update(identity: Identity, change: Callable[[Record], None]) -> Path | None:
    """Reads the record, lets `change` alter it in place, and replaces the file; no other process does so meanwhile.

    Returns:
        The file, or None where the folder cannot be written: one warning then says so.
    """
    file = path(identity)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with _locked(file.with_suffix(".lock")):
            record = read(identity)
            change(record)
            _replace(file, json.dumps(record, indent=1) + "\n")
    except OSError as error:
        logger.warning("nothing is kept in %s: %s. CNKERNELS_CACHE names another folder.", file.parent, error)
        return None
    return file


def _replace(file: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=file.stem, suffix=".partial")
    try:
        with os.fdopen(handle, "w") as partial:
            partial.write(text)
            partial.flush()
            os.fsync(partial.fileno())
        os.replace(name, file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:  # Windows: the replacement is atomic, but of two updates at once one may be lost
        yield
        return
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _validate(record: Any, identity: Identity) -> None:
    """Raises ValueError where a record is not what this module writes."""
    if not isinstance(record, dict) or record.get("identity") != identity:
        raise ValueError("it is not a record of this device and these versions")
    faults, choices = record.get("faults"), record.get("choices")
    if not isinstance(faults, list) or not all(_has(fault, ("op", "backend", "dtype", "case")) for fault in faults):
        raise ValueError("its faults are damaged")
    checked = record.get("checked")
    if checked is not None and not (
        _has(checked, ("date",))
        and isinstance(checked.get("kernels"), list)
        and all(isinstance(k, list) and len(k) == 3 and all(isinstance(n, str) for n in k) for k in checked["kernels"])
    ):
        raise ValueError("what it says was checked is damaged")
    if not isinstance(choices, dict) or not all(
        isinstance(entries, list) and all(_is_choice(entry) for entry in entries) for entries in choices.values()
    ):
        raise ValueError("its choices are damaged")


def _has(entry: Any, texts: tuple[str, ...]) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in texts)


def _is_choice(entry: Any) -> bool:
    if not _has(entry, ("dtype", "direction", "backend")):
        return False
    size, head_dim = entry.get("size"), entry.get("head_dim")
    if not isinstance(size, int) or size <= 0 or not (head_dim is None or isinstance(head_dim, int)):
        return False
    configurations = entry.get("configurations", {})  # backend -> rule -> fields
    return isinstance(configurations, dict) and all(
        isinstance(by_rule, dict) and all(_is_configuration(fields) for fields in by_rule.values())
        for by_rule in configurations.values()
    )


def _is_configuration(fields: Any) -> bool:
    return isinstance(fields, dict) and all(value is None or isinstance(value, int) for value in fields.values())
