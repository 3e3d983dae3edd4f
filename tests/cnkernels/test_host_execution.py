"""The execution of CUDA kernels on a CPU: it computes the same, and reports faults that a GPU ignores."""

import numpy as np
import pytest
import torch

from tests.cnkernels import host_build

pytestmark = pytest.mark.skipif(host_build.COMPILER is None, reason="needs a C++ compiler")

FAULTS = {  # kernel: the fault, the thread or the place it is reported at
    "shift": r"shift: shared memory race: reads tile\[0\], which was written with no barrier between by thread 0 of",
    "two_rounds": r"shared memory race: (reads|writes) tile\[\d+\]",
    "warp_exchange": r"shared memory race: reads tile\[0\]",
    "named_barrier": r"shared memory race: reads tile\[\d+\]",
    "wrong_index": r"shared index out of bounds: tile\[256\] of 256 \(thread 255 of block 0\)",
    "unmasked_tail": r"global access out of bounds: a read of 4 bytes .* \(thread 8 of block 3\)",
    "vector_load": r"misaligned vector access: 16 bytes of global memory \(thread 0 of block 0\)",
    "uninitialised": r"uninitialised shared memory: reads tile\[255\] \(thread 0 of block 0\)",
    "copy_async": r"asynchronous copy not waited for: reads tile\[3\] of thread 0 of block 0",
    "diverged_barrier": r"deadlock: thread 0 of block 0 waits at __syncthreads",
    "diverged_shuffle": r"deadlock: thread 1 of block 0 waits at a shuffle",
    "cluster": r"a block exits while its shared memory is in use by|shared memory of a block that has exited: sum",
    "cluster_race": r"uninitialised shared memory: reads sum\[0\]|shared memory race: reads sum\[0\]",
    "slice": r"misaligned vector access: shared tile\[0\]",
    "same_place": r"global memory race: a write of what block \d wrote in the same launch",
    "block_order": r"global memory race: a (read of what block \d wrote|write of what block \d read) in the same",
}
SIZES = {"unmasked_tail": (200, 200), "copy_async": (1024, 256), "cluster": (8, 256), "cluster_race": (8, 256)}


@pytest.fixture(scope="module")
def kernels():
    source = host_build.ROOT / "tests" / "csrc" / "broken_kernels.cu"
    return host_build.load("_broken_kernels", host_build.build([source], "_broken_kernels"))


def aligned(count: int) -> np.ndarray:
    """Distinct floats at an address that is a multiple of 16 bytes."""
    buffer = np.zeros(count + 4, dtype=np.float32)
    start = -buffer.ctypes.data % 16 // 4
    view = buffer[start : start + count]
    view[:] = np.arange(1, count + 1)
    return view


def run(kernels, name: str, broken: bool) -> tuple[np.ndarray, np.ndarray]:
    inputs, outputs = SIZES.get(name, (256, 256))
    x, out = aligned(inputs), aligned(outputs)
    kernels.run(name, x, out, broken)
    return x, out


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named(kernels, name):
    with pytest.raises(RuntimeError, match=FAULTS[name]):
        run(kernels, name, broken=True)


def test_without_the_fault_the_answer_is_right(kernels):
    threads = np.arange(256)
    expected = {
        "shift": lambda x: x[np.maximum(threads - 1, 0)],
        "two_rounds": lambda x: x[::-1] + 1,
        "warp_exchange": lambda x: x[threads & ~1],
        "named_barrier": lambda x: np.concatenate((x[:128][::-1], x[128:][::-1])),
        "wrong_index": lambda x: np.roll(x, -1),
        "unmasked_tail": lambda x: 2 * x,
        "vector_load": lambda x: x,
        "uninitialised": np.ones_like,
        "copy_async": lambda x: x[1023 - 4 * threads],
        "diverged_barrier": lambda x: x,
        "diverged_shuffle": lambda x: x[threads ^ 1],
        "cluster": lambda x: np.repeat(x[[1, 2, 3, 0, 5, 6, 7, 4]], 32),
        "cluster_race": lambda x: np.repeat(x[[1, 2, 3, 0, 5, 6, 7, 4]], 32),
        "slice": lambda x: x,
        "same_place": np.ones_like,
        "block_order": lambda x: x,
    }
    assert expected.keys() == FAULTS.keys()
    for name, answer in expected.items():
        x, out = run(kernels, name, broken=False)
        np.testing.assert_array_equal(out, answer(x), err_msg=name)


KIB = 1024
LIMITS = {80: (163, 1), 86: (99, 1), 89: (99, 1), 90: (227, 8), 100: (227, 8), 120: (99, 8)}  # KiB, blocks of a cluster


@pytest.mark.parametrize("capability", LIMITS)
def test_a_launch_is_held_to_its_architecture(kernels, capability):
    """What fits runs; one byte, warp or block of a cluster more is refused."""
    shared, cluster = LIMITS[capability]
    x, out = aligned(256), aligned(256)
    for fits in ((4, 256, 0, 1), (16, 1024, 0, 1), (4, 32, shared * KIB, 1), (2 * cluster, 32, 0, cluster)):
        out[:] = 0
        kernels.copy(x, out, capability, *fits)
        np.testing.assert_array_equal(out, x)
    for refused, why in (
        ((4, 1056, 0, 1), "1056 threads, a block has 32 to 1024"),
        ((4, 32, shared * KIB + 1, 1), f"the limit is {shared * KIB} on compute capability {capability}"),
        ((16, 32, 0, cluster + 1), f"a cluster of {cluster + 1}, the limit is {cluster} on compute capability"),
        ((16, 32, 300 * KIB, 16), "the limit is"),
    ):
        with pytest.raises(RuntimeError, match=f"copy: .*{why}"):
            kernels.copy(x, out, capability, *refused)


def test_a_fault_leaves_the_next_launch_intact(kernels):
    with pytest.raises(RuntimeError):
        run(kernels, "shift", broken=True)
    x, out = run(kernels, "shift", broken=False)
    np.testing.assert_array_equal(out[1:], x[:-1])


@pytest.mark.parametrize("b_is_rows", [True, False], ids=["ldmatrix.trans", "ldmatrix"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_mma_multiplies(kernels, dtype, b_is_rows):
    torch.manual_seed(0)
    a, b, c = (torch.randn(shape).to(dtype).float() for shape in ((16, 16), (16, 8), (16, 8)))
    out = c.numpy().copy()
    laid_out = b if b_is_rows else b.T.contiguous()
    kernels.run_mma(a.numpy(), laid_out.numpy(), out, dtype == torch.bfloat16, b_is_rows)
    torch.testing.assert_close(torch.from_numpy(out), c + a @ b, rtol=0, atol=1e-5)  # 16 terms of float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounding_is_that_of_pytorch(kernels, dtype):
    """Every value of the dtype, the midpoints between neighbours, subnormals, overflow and NaN."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    finite = values[values.isfinite()].sort().values
    middle = (finite[1:].double() + finite[:-1].double()).div(2).float()
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 65519.0, 65520.0, 1e-8, 3e38, 3.4e38, 2**-25, 2**-24.5])
    x = torch.cat((finite, middle, torch.nextafter(middle, torch.tensor(torch.inf)), special))
    rounded = torch.from_numpy(getattr(kernels, f"round_{str(dtype).removeprefix('torch.')}")(x.numpy()))
    torch.testing.assert_close(rounded, x.to(dtype).float(), rtol=0, atol=0, equal_nan=True)
