"""The folder of a training run as files: checkpoints that are there whole or not at all, and which of them is complete.

    RUN/checkpoints/step-XXXXXXXX/{control,unet,ema}.safetensors, state.pt, rng-rankN.pt, config.yaml, manifest.json

A checkpoint is written under a temporary name, synced to disk, the manifest last, and moved into place in one step: a
folder with the final name is complete, however the run ended. The manifest holds size and sha256 of each of the other
files, and its own. Nothing here knows a trainer.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

FORMAT = 2  # 1 had no digest of the manifest itself, and is still read
CHECKPOINTS = "checkpoints"  # folder of a run
MANIFEST = "manifest.json"
CONTROL, UNET = "control.safetensors", "unet.safetensors"
CONFIG = "config.yaml"
AVERAGE = "ema.safetensors"

_NO_DIGEST = b"0" * 64
_OWN_DIGEST = re.compile(rb'"sha256": "([0-9a-f]{64})"\n}\Z')  # the manifest's last entry, of it with zeros there


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and user-space file systems cannot sync a folder, which is no fault of the checkpoint.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)):
            raise
    finally:
        os.close(descriptor)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of the checkpoints in a folder, oldest first, complete or not; temporary ones are not among them."""
    if not folder.is_dir():
        return []
    found = [(re.fullmatch(r"step-(\d+)", path.name), path) for path in folder.iterdir() if path.is_dir()]
    return sorted((int(match[1]), path) for match, path in found if match)


def manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
        ValueError: it is missing, cannot be read, or is not what was written; the message says what is wrong with it.
    """
    file = path / MANIFEST
    try:
        content = file.read_bytes()
        tree = json.loads(content.decode("utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} has no {MANIFEST}: it was not saved to the end") from None
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{file} is damaged: it holds a {type(tree).__name__}; expected an object")
    if tree.get("format") not in (1, FORMAT):
        raise ValueError(f"{path} has format {tree.get('format')}; expected {FORMAT}")
    own = _OWN_DIGEST.search(content)
    if own is not None:
        zeroed = content[: own.start(1)] + _NO_DIGEST + content[own.end(1) :]
        if hashlib.sha256(zeroed).hexdigest().encode() != own[1]:
            raise ValueError(f"{file} is damaged: its content is not that of its own sha256")
    elif tree["format"] != 1 or "sha256" in tree:
        raise ValueError(f"{file} is damaged: it does not end with its own sha256")
    files = tree.get("files")
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{file} is damaged: it names no files")
    for name, facts in files.items():
        described = isinstance(facts, dict) and type(facts.get("size")) is int and isinstance(facts.get("sha256"), str)
        if not described or not re.fullmatch(r"[\w.-]+", name) or name in (".", "..", MANIFEST):
            raise ValueError(f"{file} is damaged: the entry {name!r} is not a file's name, size and sha256")
    return tree


def fault(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None when every file has the size and content that its manifest names.

    Never raises, whatever is in the folder.
    """
    try:
        files = manifest(path)["files"]
    except ValueError as error:
        return str(error)
    for name, expected in files.items():
        file = path / name
        try:
            if not file.is_file():
                return f"{file} is missing"
            if file.stat().st_size != expected["size"]:
                return f"{file} has {file.stat().st_size} bytes; expected {expected['size']}"
            if _digest(file) != expected["sha256"]:
                return f"{file} is damaged: its sha256 is not that of the manifest"
        except OSError as error:
            return f"{file} cannot be read: {error.strerror or error}"
    return None


def newest_complete(folder: Path, report: Callable[[str], None] = lambda message: None) -> Path | None:
    """The complete checkpoint of the highest step; incomplete ones above it are reported and passed over."""
    for _, path in reversed(checkpoints(folder)):
        problem = fault(path)
        if problem is None:
            return path
        report(f"passing over a checkpoint: {problem}")
    return None


def write(
    folder: Path,
    step: int,
    writers: Mapping[str, Callable[[Path], None]],
    facts: Mapping[str, Any],
    size: int = 0,
) -> Path:
    """Writes a checkpoint so that it is there whole or not at all, and returns its path.

    Args:
        folder: of the run's checkpoints.
        writers: file name -> a function that writes it to the path it is given.
        facts: entries for the manifest beside the files.
        size: bytes that the files will have at least; not begun when the disk has fewer free.

    Raises:
        OSError: the disk does not take it; earlier checkpoints are then untouched. A full disk has errno ENOSPC, and a
            message with the path, the bytes wanted and the bytes free.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _require_space(folder, size)
    final = folder / folder_name(step)
    temporary = folder / f"{final.name}.tmp-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        files = {}
        for name, writer in writers.items():
            path = temporary / name
            try:
                writer(path)
                _sync(path)
            except Exception as error:  # PyTorch and safetensors report a full disk as errors of their own
                raise _disk_error(error, path, size) from error
            files[name] = {"size": path.stat().st_size, "sha256": _digest(path)}
        _write_manifest(temporary / MANIFEST, {"format": FORMAT, "step": step, **facts, "files": files})
        _sync(temporary)
        _put_in_place(temporary, final)
        _sync(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def _put_in_place(temporary: Path, final: Path) -> None:
    """Gives a whole checkpoint its name. What has that name stays until then, and gets it back when that fails.

    Raises:
        OSError: with the message of a full disk, where that is it.
    """
    replaced = final.with_name(f"{final.name}.old-{os.getpid()}")
    exists = final.exists()  # the run was taken up from an older step and came by here again
    try:
        if exists:
            shutil.rmtree(replaced, ignore_errors=True)
            os.replace(final, replaced)
        os.replace(temporary, final)
    except OSError as error:
        if exists and not final.exists():
            os.replace(replaced, final)
        raise _disk_error(error, temporary / MANIFEST, 0) from error
    if exists:
        shutil.rmtree(replaced, ignore_errors=True)


def _write_manifest(path: Path, tree: Mapping[str, Any]) -> None:
    text = json.dumps({**tree, "sha256": _NO_DIGEST.decode()}, indent=1).encode()
    own = _OWN_DIGEST.search(text)
    digest = hashlib.sha256(text).hexdigest().encode()
    with open(path, "wb") as file:
        file.write(text[: own.start(1)] + digest + text[own.end(1) :])
        file.flush()
        os.fsync(file.fileno())


def _require_space(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(
            errno.ENOSPC, f"the disk is full: a checkpoint takes {_mb(size)}, {_mb(free)} are free", str(folder)
        )


def _disk_error(error: Exception, path: Path, size: int) -> Exception:
    """The error itself, or for a disk that has become full one that says so."""
    errors = [error, error.__cause__, error.__context__]
    numbers = {getattr(each, "errno", None) for each in errors}
    told = any(sign in str(error) for sign in ("os error 28", "No space left", "inline_container"))
    if errno.ENOSPC not in numbers and not told:
        return error
    written = sum(file.stat().st_size for file in path.parent.iterdir())
    free = shutil.disk_usage(path.parent).free
    wanted = f" of about {_mb(size)}" if size else ""
    return OSError(
        errno.ENOSPC, f"the disk is full: {_mb(written)}{wanted} were written, {_mb(free)} are free", str(path)
    )


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def prune(folder: Path, keep: int) -> None:
    """Deletes all but the newest `keep` checkpoints (at least 2; all for 0 or less), and what dead processes left.

    Called after a new checkpoint is in place, so that at no moment fewer than it and its predecessor exist.
    """
    for path in folder.iterdir():
        left_over = re.fullmatch(r"step-\d+\.(tmp|old)-(\d+)", path.name)
        if left_over and int(left_over[2]) != os.getpid():
            shutil.rmtree(path, ignore_errors=True)
    if keep > 0:
        for _, path in checkpoints(folder)[: -max(2, keep)]:
            # Renamed first: a folder half deleted must not look like a checkpoint.
            doomed = path.with_name(f"{path.name}.old-{os.getpid()}")
            os.replace(path, doomed)
            shutil.rmtree(doomed, ignore_errors=True)
