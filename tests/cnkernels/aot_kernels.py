"""Kernels with one fault each, for test_aot.py; run as a program, it prints the report of `cnkernels.aot`."""

import torch
import triton
import triton.language as tl

from cnkernels.aot import ARCHITECTURES, compile_case
from cnkernels.aot_case import case_of


@triton.jit
def sum_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    tl.store(y_ptr + offsets, x / tl.sum(x))


@triton.jit
def widened_kernel(x_ptr, scale, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    wide = scale.to(tl.float64)
    tl.store(x_ptr + offsets, (tl.load(x_ptr + offsets) + wide) * wide)


@triton.jit
def product_kernel(a_ptr, b_ptr, c_ptr, depth, BLOCK: tl.constexpr):
    rows, columns = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, depth, BLOCK):
        a = tl.load(a_ptr + rows * depth + start + columns)
        total = tl.dot(a, tl.load(b_ptr + (start + rows) * BLOCK + columns), total)
    tl.store(c_ptr + rows * BLOCK + columns, total)


def main():
    half, wide = torch.float16, torch.float32
    sums = {"x_ptr": wide, "y_ptr": wide}
    products = {"a_ptr": half, "b_ptr": half, "c_ptr": wide, "depth": 1024}
    sound = case_of("sound", product_kernel, products | {"BLOCK": 64}, num_warps=4, uses_matrix_units=True)
    faulty = (
        case_of("spills", sum_kernel, sums | {"BLOCK": 32768}, num_warps=1),
        case_of("shared", product_kernel, products | {"BLOCK": 128}, num_warps=8, num_stages=6, uses_matrix_units=True),
        case_of("unit", sum_kernel, sums | {"BLOCK": 1024}, num_warps=4, uses_matrix_units=True),
        case_of("double", widened_kernel, {"x_ptr": wide, "scale": 0.5, "BLOCK": 1024}, num_warps=4),
    )
    for case, arch in (*((sound, arch) for arch in ARCHITECTURES), *((case, 90) for case in faulty)):
        compiled = compile_case(case, arch)
        print(case.name, arch, "+".join(compiled.matrix_units), "; ".join(compiled.faults), sep="|")


if __name__ == "__main__":
    main()
