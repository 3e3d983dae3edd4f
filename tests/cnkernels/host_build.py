"""Builds the CUDA kernels for execution on a CPU, once per state of csrc/, and loads them."""

import importlib.util
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("c++")


def csrc_build() -> ModuleType:
    """csrc/build.py, which belongs to no package."""
    return load("csrc_build", ROOT / "csrc" / "build.py")


def build(sources: Iterable[Path] = (), name: str = "_C_host") -> Path:
    return csrc_build().build_host(ROOT / "build" / "host", sources, name)


def load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
