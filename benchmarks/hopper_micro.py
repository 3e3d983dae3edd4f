"""Measures the throughput of a Hopper multiprocessor's units, for the design of attention at head dimension 40.

    python -m benchmarks.hopper_micro [--output FILE]      # builds and runs, on an H100 or H200
    python -m benchmarks.hopper_micro --compile-only       # builds and lists the instructions; needs nvcc alone

Each benchmark is a loop of one instruction (or one short sequence) on one thread block, timed with clock64. wgmma: one
warpgroup issues products into independent accumulators before it waits. exp2: 128 threads, eight independent chains
each, so that the unit and not the latency is measured. The source is generated, because wgmma takes one operand per
accumulator register.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import triton

from cnkernels.progress import say
from controlnet.common.command import parser as command_parser

COLUMNS = (40, 48, 80, 88, 160, 64, 128)  # N of wgmma: exact, ones column, peers' padding
ITERATIONS, CHAINS = 256, 8

PRELUDE = r"""
#include <cstdint>
#include <cstdio>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define CHECK(call)                                                                                  \
    do {                                                                                             \
        cudaError_t error = (call);                                                                  \
        if (error != cudaSuccess) {                                                                  \
            std::fprintf(stderr, "%s: %s\n", #call, cudaGetErrorString(error));                      \
            return 1;                                                                                \
        }                                                                                            \
    } while (0)

// Shared-memory operand without swizzle: 8x8 core matrices of 128 bytes, 128 bytes apart along K and 256 along M or N.
__device__ uint64_t descriptor(const void* shared) {
    uint64_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    return ((address & 0x3FFFF) >> 4) | (uint64_t(128 >> 4) << 16) | (uint64_t(256 >> 4) << 32);
}

__device__ void fill(__half* values, int count) {
    for (int i = threadIdx.x; i < count; i += blockDim.x) values[i] = __float2half((i * 37 % 101 - 50) * 0.01f);
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
}
"""


def wgmma_kernel(columns: int, from_registers: bool) -> str:
    """A kernel of m64n<columns>k16 (fp16 in, fp32 out), A from registers or shared memory, B from shared memory."""
    registers = columns // 2
    accumulators = max(1, min(CHAINS, 160 // registers))  # within 255 registers of a thread
    place = "{" + ", ".join(f"%{i}" for i in range(registers)) + "}"
    a = "{" + ", ".join(f"%{registers + i}" for i in range(4)) + "}" if from_registers else f"%{registers}"
    b = f"%{registers + (4 if from_registers else 1)}"
    tail = "1, 1, 1, 0" if from_registers else "1, 1, 1, 0, 0"
    inputs = ", ".join(f'"r"(a{i})' for i in range(4)) if from_registers else '"l"(a)'
    issue = []
    for chain in range(accumulators):
        outputs = ", ".join(f'"+f"(d[{chain}][{i}])' for i in range(registers))
        text = f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.f16.f16 {place}, {a}, {b}, {tail};"
        issue.append(f'        asm volatile("{text}" : {outputs} : {inputs}, "l"(b));')
    name = f"wgmma_n{columns}_{'rs' if from_registers else 'ss'}"
    operand = (
        "uint32_t a0 = threadIdx.x * 2654435761u & 0x3bff3bff, a1 = a0, a2 = a0, a3 = a0;"
        if from_registers
        else "uint64_t a = descriptor(tile);"
    )
    return f"""
__global__ void __launch_bounds__(128) {name}(long long* cycles, float* sink) {{
    __shared__ alignas(1024) __half tile[64 * 16 + {columns} * 16];
    fill(tile, 64 * 16 + {columns} * 16);
    {operand}
    uint64_t b = descriptor(tile + 64 * 16);
    float d[{accumulators}][{registers}] = {{}};
    long long begin = clock64();
    for (int i = 0; i < {ITERATIONS}; ++i) {{
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
{chr(10).join(issue)}
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    }}
    long long end = clock64();
    float sum = 0;
    for (int c = 0; c < {accumulators}; ++c)
        for (int i = 0; i < {registers}; ++i) sum += d[c][i];
    sink[threadIdx.x] = sum;
    if (threadIdx.x == 0) *cycles = (end - begin);
}}
"""


EXP2_F32 = 'asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(x[c]));'
EXP2_F16X2 = 'asm volatile("ex2.approx.f16x2 %0, %0;" : "+r"(x[c]));'
# 2^x = 2^round(x) * p(x - round(x)): a magic number rounds, p takes the fraction in [-0.5, 0.5], and the exponent
# is added to the bits. Least relative error: 1.7e-3 in degree 2, enough for bfloat16; 7.5e-5 in degree 3.
POLYNOMIALS = {2: (1.0004431, 0.7034480, 0.2384289), 3: (0.9999281, 0.6932610, 0.2426111, 0.0551717)}


def polynomial(degree: int) -> str:
    coefficients = POLYNOMIALS[degree]
    horner = f"{coefficients[-1]}f"
    for value in reversed(coefficients[:-1]):
        horner = f"fmaf({horner}, f, {value}f)"
    return (
        "float t = fmaxf(x[c], -126.0f) + 12582912.0f; float f = x[c] - (t - 12582912.0f); "
        f"float p = {horner}; x[c] = __int_as_float(__float_as_int(p) + (__float_as_int(t) << 23));"
    )


def exp2_kernel(name: str, body: str, kind: str) -> str:
    start = "0.001f * (threadIdx.x + c)" if kind == "float" else "0x1c001c00u + threadIdx.x + c"
    return f"""
__global__ void __launch_bounds__(128) {name}(long long* cycles, float* sink) {{
    {kind} x[{CHAINS}];
    for (int c = 0; c < {CHAINS}; ++c) x[c] = {start};
    long long begin = clock64();
#pragma unroll 4
    for (int i = 0; i < {ITERATIONS}; ++i) {{
#pragma unroll
        for (int c = 0; c < {CHAINS}; ++c) {{ {body} }}
    }}
    long long end = clock64();
    float sum = 0;
    for (int c = 0; c < {CHAINS}; ++c) sum += static_cast<float>(x[c]);
    sink[threadIdx.x] = sum;
    if (threadIdx.x == 0) *cycles = (end - begin);
}}
"""


def kernels() -> dict[str, tuple[str, str, int]]:
    """Name -> (source, what one iteration counts, how many of these)."""
    found = {}
    for columns in COLUMNS:
        for from_registers in (False, True):
            name = f"wgmma_n{columns}_{'rs' if from_registers else 'ss'}"
            found[name] = (wgmma_kernel(columns, from_registers), "instruction", max(1, min(CHAINS, 320 // columns)))
    found["exp2_mufu_f32"] = (exp2_kernel("exp2_mufu_f32", EXP2_F32, "float"), "result", 128 * CHAINS)
    found["exp2_mufu_f16x2"] = (exp2_kernel("exp2_mufu_f16x2", EXP2_F16X2, "uint32_t"), "result", 2 * 128 * CHAINS)
    for degree in POLYNOMIALS:
        name = f"exp2_polynomial_{degree}"
        found[name] = (exp2_kernel(name, polynomial(degree), "float"), "result", 128 * CHAINS)
    return found


def source() -> str:
    parts = [PRELUDE]
    calls = []
    for name, (text, unit, count) in kernels().items():
        parts.append(text)
        calls.append(
            f"    for (int repeat = 0; repeat < 3; ++repeat) {{\n        {name}<<<1, 128>>>(cycles, sink);\n"
            "        CHECK(cudaGetLastError());\n        CHECK(cudaDeviceSynchronize());\n    }\n"
            f'    std::printf("{name} {unit} %.6f\\n", *cycles / ({ITERATIONS}.0 * {count}));'
        )
    main = "\n".join(calls)
    return "".join(parts) + (
        "\nint main() {\n    long long* cycles;\n    float* sink;\n"
        "    CHECK(cudaMallocManaged(&cycles, sizeof(long long)));\n"
        "    CHECK(cudaMalloc(&sink, 128 * sizeof(float)));\n"
        f"{main}\n    return 0;\n}}\n"
    )


def build(folder: Path) -> Path:
    """Compiles the program for sm_90a, the only architecture with wgmma."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise FileNotFoundError("nvcc is not on the PATH; the microbenchmarks need CUDA 12 or later")
    (folder / "micro.cu").write_text(source())
    command = [nvcc, "-O3", "-gencode", "arch=compute_90a,code=sm_90a", "-Xptxas", "-v", "-o", "micro", "micro.cu"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc failed:\n{done.stderr}")
    if re.search(r"[1-9]\d* bytes spill", done.stderr):
        raise RuntimeError(f"a microbenchmark spills registers:\n{done.stderr}")
    return folder / "micro"


def instructions(program: Path) -> dict[str, set[str]]:
    """Returns kernel -> the instructions of interest in its machine code."""
    tool = triton.knobs.nvidia.cuobjdump.path  # Triton's package carries it; nvdisasm must be beside it
    folders = os.pathsep.join((str(Path(tool).parent), os.environ.get("PATH", "")))
    command = [tool, "--dump-sass", program]
    environment = {**os.environ, "PATH": folders}
    dump = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    found: dict[str, set[str]] = {}
    for name, body in re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function|\Z)", dump, re.S):
        plain = next((known for known in kernels() if known in name), name)
        found[plain] = set(re.findall(r"\b(HGMMA\.64x\d+x16|MUFU\.EX2(?:\.F16)?|FFMA)", body))
    return found


EXAMPLES = """
python -m benchmarks.hopper_micro --output hopper.json
"""


def main() -> None:
    parser = command_parser("benchmarks.hopper_micro", __doc__, EXAMPLES)
    parser.add_argument("--compile-only", action="store_true", help="build, print the instructions, do not run")
    parser.add_argument("--output", type=Path, help="JSON file of the results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        say("compiling the benchmarks, then running them")
        program = build(Path(folder))
        if options.compile_only:
            for name, found in instructions(program).items():
                print(f"{name:<22} {' '.join(sorted(found))}")
            return
        done = subprocess.run([program], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {done.stderr.strip()}")
    rows = [line.split() for line in done.stdout.splitlines()]
    result = {name: {"cycles_per": unit, "cycles": float(cycles)} for name, unit, cycles in rows}
    text = json.dumps(result, indent=1)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
