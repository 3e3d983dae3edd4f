"""Choices of backend measured elsewhere: a JSON file per GPU in this folder, made by `python -m cnkernels.tune --ship`.

{"identity": {...}, "choices": {op: [...]}}, both as in the user's own file (`cnkernels.cache`), which comes first.
"""

import functools
import json
import re
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def file_name(gpu: str) -> str:
    """The file of a GPU, by the name that torch.cuda.get_device_name gives it."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"


@functools.cache
def table(gpu: str, folder: Path = FOLDER) -> dict[str, list[dict]]:
    """Op -> measured choices on this GPU; empty where nobody has measured."""
    path = folder / file_name(gpu)
    return json.loads(path.read_text())["choices"] if path.exists() else {}
