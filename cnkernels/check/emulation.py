"""Runs the GPU kernels on a CPU: Triton's in its interpreter, repaired, and CUDA's by the build of csrc for a CPU."""

import importlib.util
import os
import shutil
from pathlib import Path

import numpy as np
import torch

from cnkernels import extension

CSRC = Path(__file__).resolve().parents[2] / "csrc"


def prepare() -> str | None:
    """Makes the backends triton and cuda run on CPU tensors in this process; before anything imports triton.

    Returns:
        Why the CUDA kernels cannot be executed here; None where they can.
    """
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
    repair_interpreter()
    if not (CSRC / "build.py").exists():
        return "the CUDA sources are not here: only a checkout of the repository has them"
    if shutil.which("c++") is None:
        return "no C++ compiler (c++) is on PATH"
    spec = importlib.util.spec_from_file_location("csrc_build", CSRC / "build.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    extension.load_host(build.build_host(CSRC.parent / "build" / "host"))
    return None


def repair_interpreter() -> None:
    """Makes Triton's interpreter round as a GPU does.

    As of Triton 3.7 it rounds tl.fma twice (once here, but for ties of the wider sum); and it holds bfloat16 as its
    bits, which a conversion cuts off instead of rounding to the nearest, and which tl.dot multiplies as integers.
    """
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    if getattr(interpreter.InterpreterBuilder.create_fma, "repaired", False):
        return
    multiply, convert, tl = interpreter.InterpreterBuilder.create_dot, interpreter._convert_float, interpreter.tl

    def fma(self, x, y, z):
        exact = x.data.astype(np.float64) * y.data + z.data
        return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    def converted(data, source, target, rounding_mode):
        if (source, target) == (tl.float32, tl.bfloat16):
            return torch.from_numpy(np.array(data, np.float32)).bfloat16().view(torch.uint16).numpy()
        if (source, target) == (tl.bfloat16, tl.float32):
            return (data.astype(np.uint32) << 16).view(np.float32)
        return convert(data, source, target, rounding_mode)

    def widened(handle):
        if handle.data.dtype != np.uint16:
            return handle
        return interpreter.TensorHandle(converted(handle.data, tl.bfloat16, tl.float32, None), tl.float32)

    fma.repaired = True
    interpreter.InterpreterBuilder.create_fma = fma
    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: multiply(self, widened(a), widened(b), *rest)
    interpreter._convert_float = converted
