"""What GPUs offer, from NVIDIA's data sheets, and the arithmetic of occupancy: what `cnkernels.aot` predicts with."""

import math
from dataclasses import dataclass

REGISTERS = 65536  # of a multiprocessor, since compute capability 3.5
RESERVED_SHARED = 1024  # bytes that CUDA takes of each block's shared memory, since compute capability 8.0

# Lanes a clock and multiprocessor, of every architecture here: CUDA C++ Programming Guide, "Arithmetic Instructions".
# Of memory: 32 lanes of 4 bytes, the bandwidth of the shared memory and of the first-level cache.
ALU_LANES, MUFU_LANES, MEMORY_LANES = 64, 16, 32
WARP_INSTRUCTIONS = 4  # issued a clock and multiprocessor


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        arch: compute capability as a number, such as 90.
        multiprocessors: how many it has.
        clock: boost clock in GHz.
        bandwidth: of its DRAM in GB/s.
        tensor_flops: of its matrix units a clock and multiprocessor, in half precision, accumulated in float32.
        fma_lanes: float32 multiply-adds a clock and multiprocessor.
        shared: bytes of shared memory of a multiprocessor.
        threads, blocks: that a multiprocessor holds at most.
        source: where the figures stand. Those of a multiprocessor: CUDA C++ Programming Guide, "Compute Capabilities".
    """

    arch: int
    multiprocessors: int
    clock: float
    bandwidth: float
    tensor_flops: int
    fma_lanes: int
    shared: int
    threads: int
    blocks: int
    source: str


GPUS = {
    "A100": Gpu(
        80, 108, 1.41, 2039, 2048, 64, 164 * 1024, 2048, 32,
        "NVIDIA A100 data sheet (SXM, 80 GB) and A100 architecture white paper: 312 TFLOPS",
    ),
    "H100": Gpu(
        90, 132, 1.83, 3350, 4096, 128, 228 * 1024, 2048, 32,
        "NVIDIA H100 data sheet (SXM) and H100 architecture white paper: 989.4 TFLOPS",
    ),
    "RTX 4090": Gpu(
        89, 128, 2.52, 1008, 512, 128, 100 * 1024, 1536, 24,
        "NVIDIA Ada GPU architecture white paper: 165.2 TFLOPS with FP32 accumulation",
    ),
    "RTX 5090": Gpu(
        120, 170, 2.407, 1792, 512, 128, 100 * 1024, 1536, 24,
        "NVIDIA RTX Blackwell GPU architecture white paper: 209.5 TFLOPS with FP32 accumulation",
    ),
}  # fmt: skip


def blocks_per_multiprocessor(gpu: Gpu, registers: int, shared: int, warps: int) -> int:
    """How many blocks one multiprocessor holds at a time: what its registers, shared memory and threads allow.

    Args:
        gpu: the GPU.
        registers: of a thread.
        shared: bytes of shared memory of a block.
        warps: of a block.
    """
    of_warp = math.ceil(registers * 32 / 256) * 256  # registers are given to warps by 256, warps to a quarter each
    warps_by_registers = REGISTERS // of_warp // 4 * 4
    by_shared = gpu.shared // (math.ceil(shared / 128) * 128 + RESERVED_SHARED)
    return min(gpu.blocks, warps_by_registers // warps, by_shared, gpu.threads // (32 * warps))
