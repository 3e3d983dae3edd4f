"""Measured choices of backend: one JSON file per GPU in this folder, made by `python -m benchmarks.tune` from a result.

{"machine": {GPU, driver, torch, triton, commit, date ...},
 "choices": {op: [{"dtype": "float16", "head_dim": 40 or null, "size": elements of the first input, "backend": ...}]}}
"""

import functools
import json
import math
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parent


def file_name(gpu: str) -> str:
    """The file of a GPU, by the name that torch.cuda.get_device_name gives it."""
    return f"{gpu.lower().replace(' ', '-')}.json"


@functools.cache
def table(gpu: str, folder: Path = FOLDER) -> dict[str, list[dict]]:
    """Op -> measured choices on this GPU; empty where nobody has measured."""
    path = folder / file_name(gpu)
    return json.loads(path.read_text())["choices"] if path.exists() else {}


def nearest(choices: list[dict], dtype: torch.dtype, size: int, head_dim: int | None) -> str | None:
    """The backend of the choice nearest in size, of those of this dtype and head dimension; None without one."""
    name = str(dtype).removeprefix("torch.")
    alike = [c for c in choices if c["dtype"] == name and c["head_dim"] == head_dim]
    if not alike:
        return None
    return min(alike, key=lambda c: abs(math.log(c["size"] / max(size, 1))))["backend"]


def measured(op: str, device: torch.device, dtype: torch.dtype, size: int, head_dim: int | None) -> str | None:
    """The backend that was fastest for the most similar call on this GPU, or None."""
    return nearest(table(torch.cuda.get_device_name(device)).get(op, []), dtype, size, head_dim)
