"""The folder of a training run as files: checkpoints that are there whole or not at all, and which of them is complete.

    RUN/checkpoints/step-XXXXXXXX/{control,unet,ema}.safetensors, state.pt, rng-rankN.pt, config.yaml, manifest.json

A checkpoint is written under a temporary name, synced to disk, the manifest last, and moved into place in one step: a
folder with the final name is complete, however the run ended. Nothing here knows a trainer.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

FORMAT = 1
CHECKPOINTS = "checkpoints"  # folder of a run
MANIFEST = "manifest.json"
CONTROL, UNET = "control.safetensors", "unet.safetensors"
CONFIG = "config.yaml"
AVERAGE = "ema.safetensors"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
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


def fault(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None when every file has the size and content that its manifest names."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{path} has no {MANIFEST}: it was not saved to the end"
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        return f"{path / MANIFEST} is damaged: {error}"
    if manifest.get("format") != FORMAT:
        return f"{path} has format {manifest.get('format')}; expected {FORMAT}"
    for name, expected in manifest["files"].items():
        file = path / name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != expected["size"]:
            return f"{file} has {file.stat().st_size} bytes; expected {expected['size']}"
        if _digest(file) != expected["sha256"]:
            return f"{file} is damaged: its sha256 is not that of the manifest"
    return None


def newest_complete(folder: Path, report: Callable[[str], None] = lambda message: None) -> Path | None:
    """The complete checkpoint of the highest step; incomplete ones above it are reported and passed over."""
    for _, path in reversed(checkpoints(folder)):
        problem = fault(path)
        if problem is None:
            return path
        report(f"passing over a checkpoint: {problem}")
    return None


def write(folder: Path, step: int, writers: Mapping[str, Callable[[Path], None]], facts: Mapping[str, Any]) -> Path:
    """Writes a checkpoint so that it is there whole or not at all, and returns its path.

    Arguments:
        folder: of the run's checkpoints.
        writers: file name -> a function that writes it to the path it is given.
        facts: entries for the manifest beside the files.
    Raises OSError when the disk does not take it; earlier checkpoints are then untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / folder_name(step)
    temporary = folder / f"{final.name}.tmp-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        files = {}
        for name, writer in writers.items():
            path = temporary / name
            writer(path)
            _sync(path)
            files[name] = {"size": path.stat().st_size, "sha256": _digest(path)}
        manifest = {"format": FORMAT, "step": step, **facts, "files": files}
        with open(temporary / MANIFEST, "w", encoding="utf-8") as file:
            json.dump(manifest, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        _sync(temporary)
        if final.exists():  # the run was taken up from an older step and came by here again
            replaced = folder / f"{final.name}.old-{os.getpid()}"
            os.replace(final, replaced)
            os.replace(temporary, final)
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            os.replace(temporary, final)
        _sync(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


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
