"""Finds the compiled CUDA extension, lazily, and can say why it is absent.

Two builds of the same kernels: `cnkernels._C` for a GPU, and one that executes them on a CPU, checking every access,
which tests compile and hand to `load_host`. Nothing here compiles.
"""

import functools
import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("cnkernels._C"), ""
    except ModuleNotFoundError:
        return None, "the CUDA extension is not built (nvcc was not there when cnkernels was installed)"
    except ImportError as error:
        return None, f"the CUDA extension does not load: {error}"


class _Host:
    module: ModuleType | None = None


def load_host(path: Path) -> None:
    """Loads the build that executes the CUDA kernels on CPU tensors; for tests."""
    spec = importlib.util.spec_from_file_location("_C_host", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    _Host.module = module


def why_absent() -> str | None:
    """Why the extension cannot be used on a GPU; None when it can."""
    module, reason = _load()
    return None if module is not None else reason


def why_host_absent() -> str | None:
    """Why the CUDA kernels cannot be executed on CPU tensors; None when they can."""
    return None if _Host.module is not None else "the CUDA kernels have no build for the CPU (the tests compile one)"


def status() -> str:
    """One line for the report of `python -m cnkernels.env`."""
    module, reason = _load()
    return reason if module is None else f"loaded from {module.__file__}, for {module.architectures}"


def module_for(device: torch.device) -> ModuleType:
    """The build that serves `device`; dispatch has made sure that it is there."""
    return _load()[0] if device.type == "cuda" else _Host.module


def prepare(*tensors: Tensor | None) -> tuple[ModuleType, object]:
    """The build and the place (device, current stream) for one call on these tensors, the first of which is given.

    On a CPU the kernels are held to the memory of these tensors: a touch of any other byte is an error.
    """
    device = tensors[0].device
    library = module_for(device)
    if device.type == "cuda":
        return library, library.Place(device=device.index, stream=torch.cuda.current_stream(device).cuda_stream)
    library.watch([_extent(t) for t in tensors if t is not None and t.numel()])
    return library, library.Place()


def multiprocessors(device: torch.device) -> int:
    """Of the GPU; a few on a CPU, where tests want several blocks but not many."""
    return 4 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def dtype_of(library: ModuleType, tensor: Tensor) -> object:
    """The extension's name of the tensor's dtype."""
    return getattr(library.Dtype, str(tensor.dtype).removeprefix("torch."))


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Address and bytes from the first element to the last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), (last + 1) * tensor.element_size()
