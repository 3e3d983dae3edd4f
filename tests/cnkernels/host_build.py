"""Builds the CUDA kernels for execution on a CPU, once per state of csrc/, and loads them."""

import importlib.util
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch

from cnkernels import extension

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("c++")
DEFAULT = (90, 4)  # what the CPU execution stands for at first: few multiprocessors, so that small plans are cut


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


@contextmanager
def execute_as(capability: int = 90, multiprocessors: int = 0) -> Iterator[None]:
    """Holds CPU launches to the limits of a compute capability, with so many multiprocessors (0: as its GPU has)."""
    library = extension.module_for(torch.device("cpu"))
    library.execute_as(capability, multiprocessors)
    try:
        yield
    finally:
        library.execute_as(*DEFAULT)
