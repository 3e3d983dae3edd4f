"""Simulates a GPU for measurements of the host: kernels are specialised, compiled on request, and never launched.

CPU tensors take the place of GPU tensors, and results are uninitialised memory. What remains is the host's time of a
call, and the kernels that it compiles. `no_arithmetic` also stubs PyTorch's own heavy operations.
"""

import importlib.util
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
from torch import Tensor

import cnkernels
from cnkernels import dispatch, extension, onednn, plans

SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # that a block may have
MULTIPROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}


class Launcher:
    """Launcher of one compiled kernel: takes a launch's arguments and does nothing."""

    def __init__(self, source: object, metadata: object):
        self.name = getattr(getattr(source, "fn", None), "__name__", "?")

    def __call__(self, *arguments: object) -> None:
        pass


class Uncompiled:
    """Stands in for a compiled kernel; has the attributes that a launch reads."""

    function, packed_metadata = 2, ()

    def __init__(self, name: str):
        self.name, self.run = name, Launcher(None, None)

    def launch_metadata(self, grid: tuple, stream: int, *arguments: object) -> None:
        return None

    def __getitem__(self, grid: tuple) -> Launcher:
        return lambda *arguments, stream=None: self.run(*grid, stream, *arguments)


class _Utils:
    def __init__(self, arch: int):
        self._properties = {
            "max_shared_mem": SHARED_KIB[arch] * 1024,
            "multiprocessor_count": MULTIPROCESSORS[arch],
            "warpSize": 32,
            "max_num_regs": 65536,
        }

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple[int, ...]:
        return 1, 2, 0, 0, 1024  # module, function, registers, spills, threads

    def unload_module(self, module: int) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        return self._properties


class Driver:
    """Stands in for Triton's driver, of a GPU of `arch`, such as 90."""

    launcher_cls = Launcher

    def __init__(self, arch: int):
        self.arch, self.utils = arch, _Utils(arch)

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self, device: int) -> tuple[int, int]:
        return divmod(self.arch, 10)

    def map_python_to_cpp_type(self, kind: str) -> str:
        from triton.backends.nvidia.driver import ty_to_cpp

        return ty_to_cpp(kind)

    @staticmethod
    def is_active() -> bool:
        return True


@contextmanager
def installed(arch: int = 90, compiled: list[str] | None = None, really: bool = False) -> Iterator[Driver]:
    """Installs the stub inside the block: Triton compiles for such a GPU, and CPU tensors pass for its tensors.

    Args:
        compiled: gets the name of each kernel that is compiled, one for each specialisation.
        really: compile them, which takes up to a second each.
    """
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from cnkernels.attention import triton_kernels

    compile_once = JITFunction._do_compile

    def compile_and_note(self, key, signature, device, *rest, **options):
        if compiled is not None:
            compiled.append(self.__name__)
        if really:
            return compile_once(self, key, signature, device, *rest, **options)
        kernel = self.device_caches[device][0][key] = Uncompiled(self.__name__)
        return kernel

    stub = Driver(arch)
    before = driver._active
    with ExitStack() as stack:
        for target, name, value in (
            (JITFunction, "_do_compile", compile_and_note),
            (dispatch, "_triton_absent", lambda device: None),
            (triton_kernels, "compute_capability", lambda tensor: arch // 10),
            (onednn, "serves", lambda tensor: False),  # as on a GPU
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        stack.enter_context(cnkernels.backend("triton"))
        driver.set_active(stub)
        _forget_kernels()
        try:
            yield stub
        finally:
            driver._active = before
            _forget_kernels()


def without_launches() -> ModuleType | None:
    """The CUDA extension with launchers that launch nothing, compiled once; None without a C++ compiler."""
    if shutil.which("c++") is None:
        return None
    root = Path(__file__).resolve().parents[1]
    spec = importlib.util.spec_from_file_location("csrc_build", root / "csrc" / "build.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    sources = [build.CSRC / name for name in ("bindings.cpp", "gpu.cu", "host/no_launches.cpp")]
    return extension.load(build.build_host(root / "build" / "host", sources, "_C_no_launches"))


@contextmanager
def cuda_installed(library: ModuleType) -> Iterator[None]:
    """Inside the block the cuda backend serves CPU tensors with such an extension, as it serves a GPU's."""
    with (
        mock.patch.object(extension._Host, "module", library),
        mock.patch.object(extension, "stream_of", lambda device: lambda *tensors: 0),
        cnkernels.backend("cuda"),
    ):
        plans.forget()
        try:
            yield
        finally:
            plans.forget()


def _forget_kernels() -> None:
    """Clears Triton's caches of compiled kernels."""
    from triton.runtime import jit

    plans.forget()
    for function in jit._triton_jit_function_registry.values():
        function.device_caches.clear()


def _empty_convolution(x: Tensor, weight: Tensor, bias, stride, padding, dilation, transposed, output_padding, groups):
    sizes = [
        (size + 2 * pad - span * (kernel - 1) - 1) // step + 1
        for size, kernel, step, pad, span in zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    ]
    nhwc = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    memory_format = torch.channels_last if nhwc else torch.contiguous_format
    shape = (x.shape[0], weight.shape[0], *sizes)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format)


def _empty_convolution_backward(dout, x, weight, bias_sizes, stride, padding, dilation, transposed, pad, groups, mask):
    return (
        torch.empty_like(x) if mask[0] else None,
        torch.empty_like(weight) if mask[1] else None,
        dout.new_empty(dout.shape[1:2]) if mask[2] else None,
    )


def _empty_product(*operands: Tensor, **_: float) -> Tensor:
    """Stub of mm, addmm and bmm: allocates the output."""
    a, b = operands[-2:]
    return a.new_empty((*a.shape[:-1], b.shape[-1]))


def _empty_attention(q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)


def _empty_attention_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


_KERNELS: dict[str, Callable] = {
    "convolution": _empty_convolution,
    "convolution_backward": _empty_convolution_backward,
    "mm": _empty_product,
    "addmm": _empty_product,
    "bmm": _empty_product,
    "_scaled_dot_product_flash_attention_for_cpu": _empty_attention,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _empty_attention_backward,
}


CONVOLUTIONS = {f"aten::{name}": _KERNELS[name] for name in ("convolution", "convolution_backward")}


@contextmanager
def no_arithmetic() -> Iterator[None]:
    """Inside the block, convolutions, products and attention on the CPU only allocate their outputs."""
    library = torch.library.Library("aten", "IMPL")
    try:
        for name, kernel in _KERNELS.items():
            library.impl(name, kernel, "CPU", allow_override=True)
        yield
    finally:
        library._destroy()
