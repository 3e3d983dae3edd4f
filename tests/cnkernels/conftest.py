"""Every op test runs with uninitialised memory poisoned, and without a GPU on Triton's interpreter and csrc/host."""

import os

import numpy as np
import pytest
import torch

from cnkernels import extension
from tests.cnkernels import host_build

if not torch.cuda.is_available() and host_build.COMPILER is not None:
    extension.load_host(host_build.build())


@pytest.fixture(autouse=True)
def poisoned_empty():
    """Fills what torch.empty and its kin return with NaN, so that an element nobody wrote fails a comparison."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(autouse=True, scope="session")
def fused_multiply_add_in_the_interpreter():
    """Triton's interpreter rounds tl.fma twice; a GPU rounds once, as this does but for ties of the wider sum."""
    if "TRITON_INTERPRET" not in os.environ:
        yield
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")

    def fma(self, x, y, z):
        exact = x.data.astype(np.float64) * y.data + z.data
        return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_fma", fma)
        yield


@pytest.fixture(autouse=True, scope="session")
def bfloat16_in_the_interpreter():
    """Triton 3.7 interprets bfloat16 as its bits: a conversion to it cuts them off, where a GPU rounds to the nearest,
    and tl.dot multiplies them as integers.
    """
    if "TRITON_INTERPRET" not in os.environ:
        yield
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    multiply, convert, tl = interpreter.InterpreterBuilder.create_dot, interpreter._convert_float, interpreter.tl

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

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", converted)
        patch.setattr(
            interpreter.InterpreterBuilder,
            "create_dot",
            lambda self, a, b, *rest: multiply(self, widened(a), widened(b), *rest),
        )
        yield
