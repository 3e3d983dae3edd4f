"""Finds the compiled CUDA extension, lazily, and can say why it is absent."""

import functools
import importlib
from types import ModuleType


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("cnkernels._C"), ""
    except ModuleNotFoundError:
        return None, "the CUDA extension is not built (nvcc was not there when cnkernels was installed)"
    except ImportError as error:
        return None, f"the CUDA extension does not load: {error}"


def why_absent() -> str | None:
    """Why the extension cannot be used on a GPU; None when it can."""
    module, reason = _load()
    return None if module is not None else reason


def why_host_absent() -> str | None:
    """Why the CUDA kernels cannot be executed on CPU tensors; None when they can."""
    return "the CUDA kernels have no build for the CPU"


def status() -> str:
    """One line for the report of `python -m cnkernels.env`."""
    module, reason = _load()
    return reason if module is None else f"loaded from {module.__file__}"
