"""What each launch of a model's step costs on a GPU that is not there: `python -m cnkernels.aot --model NAME`.

A prediction, to be held against the first measurement. Of each launch: the instructions that its compiled code
executes, how long each unit of a multiprocessor is busy with them on the multiprocessor that gets the most blocks, and
how long the DRAM needs for its operands. The slowest of these is the time. Latency, what units do not overlap, and what
the L2 cache still holds from the launch before are left out: the first two make a launch slower, the last faster.
"""

import math
import multiprocessing
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib import import_module

import torch
from torch import Tensor

from cnkernels import aot, aot_gpus, aot_work
from cnkernels.aot_case import AotCase
from cnkernels.aot_gpus import Gpu
from cnkernels.aot_model import OpCall, calls_of_model, launches_of
from cnkernels.aot_sass import Instruction
from cnkernels.launch import Launch
from cnkernels.progress import say
from cnkernels.register import dtype_name


@dataclass(frozen=True)
class Binary:
    """A compiled kernel."""

    registers: int  # of a thread
    shared: int  # bytes of a block
    ttir: str
    code: tuple[Instruction, ...]


@dataclass(frozen=True)
class Prediction:
    """One launch of a call, on one GPU.

    Attributes:
        op, direction, shape, layout, options: of the call; shape and layout as the benchmarks write them.
        calls: how often the step makes it.
        kernel: what it launches; a call may launch several.
        blocks, warps: of the grid, and of a block.
        registers, shared: of a thread, and bytes of a block.
        resident: blocks that a multiprocessor holds at a time.
        waves: how often the GPU is filled with blocks; below 1 a part of it has none.
        instructions: of all warps, by pipe.
        dram_bytes: every operand once.
        microseconds: that each unit needs; the launch takes as long as the slowest.
    """

    op: str
    direction: str
    shape: str
    layout: str
    options: str
    calls: int
    kernel: str
    blocks: int
    warps: int
    registers: int
    shared: int
    resident: int
    waves: float
    instructions: Mapping[str, int]
    dram_bytes: int
    microseconds: Mapping[str, float]

    @property
    def slowest(self) -> str:
        return max(self.microseconds, key=self.microseconds.get)

    @property
    def time(self) -> float:
        """Microseconds of one launch."""
        return self.microseconds[self.slowest]

    def __str__(self):
        thousands = Counter({pipe: count / 1e3 for pipe, count in self.instructions.items()})
        counts = "".join(f"{thousands[pipe]:>8.0f}" for pipe in _SHOWN)
        return (
            f"{self.kernel:<37}{self.shape:<23}{self.calls:>4}{self.blocks:>7}{self.registers:>5}{self.shared:>8}"
            f"{self.resident:>4}{self.waves:>7.2f}{counts}{thousands.total() - sum(thousands[p] for p in _SHOWN):>7.0f}"
            f"{self.dram_bytes / 1e6:>7.1f}{self.time:>8.1f} {self.slowest:<7}{self.calls * self.time:>8.1f}  "
            f"{self.options}"
        ).rstrip()


_SHOWN = ("tensor", "mufu", "fma", "alu", "memory")
HEADER = (
    f"{'kernel':<37}{'shape':<23}{'n':>4}{'blocks':>7}{'regs':>5}{'shared':>8}{'/SM':>4}{'waves':>7}"
    + "".join(f"{pipe:>8}" for pipe in _SHOWN)
    + f"{'other':>7}{'MB':>7}{'us':>8} {'by':<7}{'n x us':>8}"
)


def clocks(instruction: Instruction, gpu: Gpu) -> float:
    """How long the unit of an instruction is busy with it, for one warp, in clocks of a multiprocessor."""
    pipe, opcode = instruction.pipe, instruction.opcode
    if pipe == "tensor":
        return _flops(opcode) / gpu.tensor_flops * (2 if ".TF32" in opcode else 1)
    if pipe == "memory":
        matrices = re.search(r"LDSM.*\.MT?88\.(\d)", opcode)  # of 8 x 8 elements, 128 bytes each
        width = re.search(r"\.[US]?(64|128)\b", opcode)  # bits of a thread
        return float(matrices[1]) if matrices else int(width[1]) / 32 if width else 32 / aot_gpus.MEMORY_LANES
    lanes = {"mufu": aot_gpus.MUFU_LANES, "fma": gpu.fma_lanes, "alu": aot_gpus.ALU_LANES}
    return 32 / lanes[pipe] if pipe in lanes else 0.0


def _flops(opcode: str) -> int:
    """Of one warp's part of a matrix instruction; 0 of one that only orders others."""
    if found := re.match(r"HMMA\.(16)(8)(4|8|16)\b", opcode):
        m, n, k = map(int, found.groups())
        return 2 * m * n * k
    if found := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)\b", opcode):  # of four warps together
        m, n, k = map(int, found.groups())
        return 2 * m * n * k // 4
    return 0


def of_launch(call: OpCall, calls: int, launch: Launch, operands: dict, binary: Binary, gpu: Gpu) -> Prediction:
    blocks, warps = math.prod(launch.grid), launch.num_warps
    turns = aot_work.loop_turns(binary.ttir, {**launch.sizes, **operands}, launch.grid)
    instructions, busy = Counter(), Counter()
    for instruction, times in aot_work.executed(binary.code, turns, blocks).items():
        instructions[instruction.pipe] += times * warps
        busy[instruction.pipe] += times * warps * clocks(instruction, gpu)
    busy["issue"] = instructions.total() / aot_gpus.WARP_INSTRUCTIONS
    # The multiprocessor with the most blocks ends last. Per GHz a clock is a nanosecond.
    share = math.ceil(blocks / gpu.multiprocessors) / blocks
    microseconds = {unit: count * share / gpu.clock / 1e3 for unit, count in busy.items() if count}
    read = {(t.data_ptr(), t.numel()): t.numel() * t.itemsize for t in operands.values() if isinstance(t, Tensor)}
    resident = aot_gpus.blocks_per_multiprocessor(gpu, binary.registers, binary.shared, warps)
    return Prediction(
        op=call.op,
        direction=call.direction,
        shape=call.shape,
        layout=call.layout,
        options=call.options,
        calls=calls,
        kernel=launch.kernel.__name__.removeprefix("_").removesuffix("_kernel"),
        blocks=blocks,
        warps=warps,
        registers=binary.registers,
        shared=binary.shared,
        resident=resident,
        waves=blocks / (resident * gpu.multiprocessors),
        instructions=dict(instructions),
        dram_bytes=sum(read.values()),
        microseconds=microseconds | {"DRAM": sum(read.values()) / gpu.bandwidth / 1e3},
    )


def _compile(job: tuple[AotCase, str, str, int]) -> Binary:
    case, module, kernel, arch = job
    compiled = aot.compiled(replace(case, kernel=getattr(import_module(module), kernel)), arch)
    registers, code = aot.disassembled(compiled.asm["cubin"])
    return Binary(registers, compiled.metadata.shared, compiled.asm["ttir"], tuple(code))


def predict(calls: Mapping[OpCall, int], gpu: Gpu, processes: int = 2) -> list[Prediction]:
    """Every launch of the calls, which come with how often a step makes them; each binary is compiled once."""
    made = [(call, *launched) for call in calls for launched in launches_of(call, gpu.arch)]
    cases = {}
    for _, launch, operands in made:
        case = launch.case("", operands)
        # A kernel does not travel to another process; its name does.
        cases[case.key] = (replace(case, kernel=None), launch.kernel.__module__, launch.kernel.__name__, gpu.arch)
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may deadlock
    say(f"compiling {len(cases)} kernels for sm_{gpu.arch}")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        binaries = dict(zip(cases, pool.map(_compile, cases.values()), strict=True))
    return [
        of_launch(call, calls[call], launch, operands, binaries[launch.case("", operands).key], gpu)
        for call, launch, operands in made
    ]


def distinct(predictions: Iterable[Prediction]) -> list[Prediction]:
    """Launches that several calls share, once, with the calls of all; those that cost a step the most come first."""
    merged: dict[tuple, Prediction] = {}
    for one in predictions:
        key = one.kernel, one.shape, one.layout, one.direction, one.blocks, *sorted(one.instructions.items())
        if key in merged:
            options = dict.fromkeys((*merged[key].options.split(" | "), one.options))
            one = replace(one, calls=merged[key].calls + one.calls, options=" | ".join(options))
        merged[key] = one
    return sorted(merged.values(), key=lambda one: -one.calls * one.time)


def table(predictions: Iterable[Prediction]) -> str:
    rows = distinct(predictions)
    sums = Counter()
    for row in rows:
        sums[f"{row.op}, {row.direction}"] += row.calls * row.time
    lines = [HEADER, *map(str, rows), "", *(f"{name:<40}{total / 1e3:>9.3f} ms" for name, total in sums.most_common())]
    return "\n".join([*lines, f"{'these kernels, in all':<40}{sums.total() / 1e3:>9.3f} ms"])


def of_model(
    name: str, gpus: Iterable[str], batch: int, dtype: torch.dtype, training: bool, processes: int = 2
) -> Iterator[dict[str, object]]:
    """One record for each GPU, for JSON: what was asked, and its launches."""
    calls = calls_of_model(name, batch, dtype, training)
    asked = {"model": name, "batch": batch, "dtype": dtype_name(dtype), "training": training}
    for gpu in gpus:
        yield {**asked, "gpu": gpu, "launches": predict(calls, aot_gpus.GPUS[gpu], processes)}


def as_json(records: list[dict[str, object]]) -> dict[str, object]:
    """What `benchmarks.report --predicted` reads."""
    return {
        "what": "predicted by cnkernels.aot, not measured",
        "predictions": [{**record, "launches": list(map(asdict, record["launches"]))} for record in records],
    }
