"""Finds the compiled CUDA extension, lazily, and can say why it is absent.

Two builds of the same kernels: `cnkernels._C` for a GPU, and one that executes them on a CPU, checking every access,
which tests compile and hand to `load_host`. Nothing here compiles.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from cnkernels.register import dtype_name


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
    _Host.module = load(path)


def load(path: Path) -> ModuleType:
    """Imports a build of csrc/ by its file, whose name begins with that of the module."""
    spec = importlib.util.spec_from_file_location(path.name.split(".")[0], path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def why_absent(device: torch.device | None = None) -> str | None:
    """Why the extension cannot be used on a GPU, `device` or the current one; None when it can.

    Whether its code runs there is asked of the driver once a GPU, at the first call that could use it.
    """
    module, reason = _load()
    if module is None:
        return reason
    index = None if device is None else device.index
    return _why_unusable(torch.cuda.current_device() if index is None else index)


@functools.cache
def _why_unusable(index: int) -> str | None:
    module, _ = _load()
    reason = module.why_unusable(module.Place(device=index))
    if not reason:
        return None
    major, minor = torch.cuda.get_device_capability(index)
    return (
        f"the CUDA extension, built for {module.architectures}, does not run on GPU {index}, of compute capability "
        f"{major}.{minor} ({reason}); CNKERNELS_ARCHS={major}{minor} when it is built makes it"
    )


def why_host_absent() -> str | None:
    """Why the CUDA kernels cannot be executed on CPU tensors; None when they can."""
    return None if _Host.module is not None else "the CUDA kernels have no build for the CPU (the tests compile one)"


def status() -> str:
    """One line for the report of `python -m cnkernels.env`."""
    module, reason = _load()
    if module is None:
        return reason
    devices = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    unusable = [reason for reason in map(_why_unusable, devices) if reason]
    return "; ".join((f"loaded from {module.__file__}, for {module.architectures}", *unusable))


def module_for(device: torch.device) -> ModuleType:
    """The build that serves `device`; dispatch has made sure that it is there."""
    return _load()[0] if device.type == "cuda" else _Host.module


def stream_of(device: torch.device) -> Callable[..., int]:
    """A function that returns the current stream of `device`, given the tensors of the call about to be launched.

    Some of them may be None. On a CPU the kernels are held to their memory: a touch of any other byte is an error.
    """
    if device.type == "cuda":
        current, index = torch._C._cuda_getCurrentRawStream, device.index
        return lambda *tensors: current(index)

    def watch(*tensors: Tensor | None) -> int:
        _Host.module.watch([_extent(t) for t in tensors if t is not None and t.numel()])
        return 0

    return watch


def limits(device: torch.device) -> object:
    """What the GPU allows, `Limits` of csrc/launchers.h; on a CPU what the GPU does that its execution stands for."""
    if device.type == "cpu":
        return _Host.module.limits_of(_Host.module.Place())
    return _limits(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _limits(index: int) -> object:
    module, _ = _load()
    return module.limits_of(module.Place(device=index))


def multiprocessors(device: torch.device) -> int:
    return limits(device).multiprocessors


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def dtype_of(library: ModuleType, tensor: Tensor) -> object:
    """The extension's name of the tensor's dtype."""
    return getattr(library.Dtype, dtype_name(tensor.dtype))


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Address and bytes from the first element to the last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), (last + 1) * tensor.element_size()
