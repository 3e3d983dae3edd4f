"""Reads the rows of results in benchmarks/results/, for tables, plots and comparisons."""

import json
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS
from cnkernels import dispatch

Rows = list[dict[str, Any]]


def load(path: Path) -> dict[str, Any]:
    result = json.loads(path.read_text())
    missing = {"machine", "rows", "tests"} - result.keys()
    if missing:
        raise ValueError(f"{path}: not a benchmark result, it lacks {', '.join(sorted(missing))}")
    return result


def newest(folder: Path = RESULTS) -> Path:
    """Returns the newest result, preferring one of a GPU."""
    files = sorted(folder.glob("*/*.json"), key=lambda p: (p.parent.name != "cpu", p.name))
    if not files:
        raise FileNotFoundError(f"no results in {folder}; make one with: python -m benchmarks.run")
    return files[-1]


def key(row: dict[str, Any]) -> tuple:
    """Returns the fields that comparable rows share."""
    return tuple(row.get(k) for k in ("kind", "op", "job", "shape", "dtype", "layout", "direction", "provider"))


def groups(rows: Rows, kind: str) -> dict[tuple, Rows]:
    """Groups rows by case, in the order of the file."""
    found: dict[tuple, Rows] = {}
    for row in rows:
        if row["kind"] == kind:
            found.setdefault(key(row)[:-1], []).append(row)
    return found


def timed(rows: Rows) -> Rows:
    return [row for row in rows if "median" in row]


def is_ours(row: dict[str, Any]) -> bool:
    return row["provider"] in dispatch.BACKENDS or row["provider"].startswith("ours")
