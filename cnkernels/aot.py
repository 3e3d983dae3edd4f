"""python -m cnkernels.aot: every Triton kernel compiled without a GPU, and what became of it.

Each op's `triton_kernels.aot_cases()` names its kernels as Stable Diffusion 1.5 launches them: their types, constants
and warps; what XL launches beside these is found by its calls. They are compiled for one GPU of each generation, and
the machine code is read back: registers, spills, shared memory, 16-byte loads, whether the products run on that
generation's matrix units, and whether a Python float was taken for float64. `loop` is the number of instructions in one
turn of the inner loop of a warp.

With --model, the launches of a step of a model instead, and what each is predicted to cost (`cnkernels.aot_predict`).
"""

import argparse
import functools
import importlib
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from cnkernels import aot_sass
from cnkernels.aot_case import AotCase
from cnkernels.aot_gpus import GPUS
from cnkernels.aot_model import MODELS, OpCall, launches_of
from cnkernels.dispatch import OPS
from cnkernels.tune.calls import of_model


@dataclass(frozen=True)
class Architecture:
    matrix_unit: str  # the instruction of its matrix units, as in SASS
    shared_limit: int  # bytes of shared memory one block may have


ARCHITECTURES = {
    80: Architecture("HMMA", 163 * 1024),  # A100
    86: Architecture("HMMA", 99 * 1024),  # RTX 30, A10
    89: Architecture("HMMA", 99 * 1024),  # RTX 40, L4
    90: Architecture("HGMMA", 227 * 1024),  # H100, H200
    100: Architecture("UTCHMMA", 227 * 1024),  # B200
    120: Architecture("HMMA", 99 * 1024),  # RTX 50, RTX PRO
}
_MATRIX_UNITS = ("HMMA", "HGMMA", "UTCHMMA")
_DOUBLES = ("DADD", "DMUL", "DFMA", "DSETP", "DMNMX", "DMMA")


@dataclass(frozen=True)
class Compiled:
    """What a case became on one architecture."""

    case: str
    arch: int
    warps: int
    registers: int  # per thread
    spills: int  # instructions that move a register to or from memory
    shared: int  # bytes
    wide_loads: int  # instructions that load or copy 16 bytes a thread from global memory, or a tile by TMA
    loads: int  # all that load from global memory
    doubles: int  # instructions that compute in float64
    matrix_units: tuple[str, ...]
    wants_matrix_units: bool
    loop: Mapping[str, int]  # instructions of the inner loop by pipe; empty where there is none
    code: Mapping[str, int]  # of all of it

    @property
    def faults(self) -> list[str]:
        """What is wrong with it, in words."""
        target, faults = ARCHITECTURES[self.arch], []
        if self.spills:
            faults.append(f"{self.spills} spill instructions")
        if self.shared > target.shared_limit:
            faults.append(f"{self.shared} bytes of shared memory, the limit is {target.shared_limit}")
        if self.doubles:
            faults.append(f"{self.doubles} float64 instructions")
        if self.wants_matrix_units and target.matrix_unit not in self.matrix_units:
            faults.append(f"no {target.matrix_unit}")
        return faults

    def __str__(self):
        units, loop = "+".join(self.matrix_units) or "-", sum(self.loop.values())
        return (
            f"sm_{self.arch:<4}{self.case:<58}{self.warps:>6}{self.registers:>6}{self.spills:>7}{self.shared:>9}"
            f"{f'{self.wide_loads}/{self.loads}':>10}{loop:>6}  {units:<10}{'; '.join(self.faults)}".rstrip()
        )


HEADER = (
    f"{'arch':<7}{'kernel and shape':<58}{'warps':>6}{'regs':>6}{'spills':>7}{'shared':>9}{'16B/loads':>10}{'loop':>6}"
    "  unit"
)


@functools.cache
def cases(op: str, arch: int) -> list[AotCase]:
    """The op's cases on that architecture, one of each binary: what its module names, and what SDXL adds."""
    module = importlib.import_module(f"cnkernels.{op}.triton_kernels")
    named = (case if isinstance(case, AotCase) else AotCase(*case) for case in module.aot_cases())
    distinct = {}
    for case in (*(case for case in named if case.archs is None or arch in case.archs), *_cases_of_sdxl(op, arch)):
        distinct.setdefault(replace(case, archs=None).key, case)
    return list(distinct.values())


def _cases_of_sdxl(op: str, arch: int) -> Iterator[AotCase]:
    """As its launchers launch a training step of Stable Diffusion XL."""
    import torch

    for call in of_model("sdxl", torch.float16, training=True):
        if call.op == op:
            made = OpCall(op, call.arguments)
            for launch, operands in launches_of(made, arch, call.gradients):
                name = launch.kernel.__name__
                products = op in ("attention", "zero_conv_add") and "sum" not in name
                yield launch.case(f"{name.strip('_').removesuffix('_kernel')} {made.shape} SDXL", operands, products)


def compiled(case: AotCase, arch: int) -> object:
    """What Triton makes of a case."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(case.kernel.arg_names)
    types = {name: case.signature[name].partition(":")[0] if name in case.signature else "constexpr" for name in names}
    aligned = (name for name, kind in case.signature.items() if kind.startswith("*") or kind.endswith(":16"))
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(case.kernel, types, dict(case.constexprs), attributes)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "maxnreg": case.maxnreg}
    return compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def disassembled(cubin: bytes) -> tuple[int, list[aot_sass.Instruction]]:
    """Registers of a thread, and the instructions in order."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage = _tool("cuobjdump", "-res-usage", str(path))
        code = aot_sass.instructions(_tool("cuobjdump", "-sass", str(path)))
    return int(re.search(r"\bREG:(\d+)", usage)[1]), code


def compile_case(case: AotCase, arch: int) -> Compiled:
    binary = compiled(case, arch)
    registers, code = disassembled(binary.asm["cubin"])
    opcodes = [instruction.opcode for instruction in code]
    loads = [op for op in opcodes if op.startswith(("LDG", "LDGSTS", "UTMALDG"))]
    return Compiled(
        case=case.name,
        arch=arch,
        warps=case.num_warps,
        registers=registers,
        spills=sum(op.startswith(("STL", "LDL")) for op in opcodes),
        shared=binary.metadata.shared,
        wide_loads=sum(".128" in op or op.startswith("UTMALDG") for op in loads),
        loads=len(loads),
        doubles=sum(op.startswith(_DOUBLES) or ".F64" in op for op in opcodes),
        matrix_units=tuple(unit for unit in _MATRIX_UNITS if any(op.partition(".")[0] == unit for op in opcodes)),
        wants_matrix_units=case.uses_matrix_units,
        loop=dict(aot_sass.count(aot_sass.hot_loop(code))),
        code=dict(aot_sass.count(code)),
    )


def _tool(name: str, *arguments: str) -> str:
    """Runs one of NVIDIA's tools that come with Triton."""
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([program, *arguments], check=True, capture_output=True, text=True).stdout


def _compile_indexed(job: tuple[str, int, int]) -> Compiled:
    op, index, arch = job
    return compile_case(cases(op, arch)[index], arch)


def sample(op: str, arch: int, every: int, offset: int) -> list[int]:
    """Indices of one in `every` of each kernel's cases, of one at least; another `offset` takes others."""
    by_kernel = {}
    for index, case in enumerate(cases(op, arch)):
        by_kernel.setdefault(case.kernel.__name__, []).append(index)
    chosen = []
    for indices in by_kernel.values():
        step = min(every, len(indices))
        chosen += indices[offset % step :: step]
    return sorted(chosen)


def report(archs: list[int], ops: list[str], every: int = 1, processes: int = 2) -> Iterator[Compiled]:
    """Compiles the cases, or one in `every`, others for each architecture; yields them in a fixed order."""
    jobs = [(op, index, arch) for op in ops for i, arch in enumerate(archs) for index in sample(op, arch, every, i)]
    return compile_all(jobs, processes)


def compile_all(jobs: Sequence[tuple[str, int, int]], processes: int = 2) -> Iterator[Compiled]:
    """Compiles (op, index of a case, architecture), in processes of their own; yields them in this order."""
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may deadlock
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        yield from pool.map(_compile_indexed, jobs)


def _predict(chosen: argparse.Namespace) -> None:
    import torch

    from cnkernels import aot_predict

    gpus = list(GPUS) if chosen.gpu == "all" else [chosen.gpu]
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[chosen.dtype]
    step = "training" if chosen.train else "denoise"
    records = []
    for record in aot_predict.of_model(chosen.model, gpus, chosen.batch, dtype, chosen.train, chosen.processes):
        records.append(record)
        print(f"Predicted, not measured: a {step} step of {chosen.model} at batch {chosen.batch} in {chosen.dtype} on")
        print(f"one {record['gpu']}, Triton's kernels. Instructions of warps in thousands; DRAM: each operand once.\n")
        print(aot_predict.table(record["launches"]), flush=True)
        print()
    if chosen.json:
        chosen.json.write_text(json.dumps(aot_predict.as_json(records), indent=1) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m cnkernels.aot",
        description="Compiles every Triton kernel without a GPU, and prints its registers, spills and instructions.",
        epilog="examples:\n  python -m cnkernels.aot --arch 90 --op group_norm_silu --every 20\n"
        "  python -m cnkernels.aot --model sdxl --train --gpu all --json prediction.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--arch", type=int, action="append", choices=list(ARCHITECTURES), help="default: all")
    parser.add_argument("--op", action="append", choices=list(OPS), help="default: all")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="one in N of each kernel's cases")
    parser.add_argument("--processes", type=int, default=2)
    model = parser.add_argument_group("prediction of a model's step")
    model.add_argument("--model", choices=list(MODELS), help="U-Net and ControlNet, at its own size")
    model.add_argument("--gpu", choices=[*GPUS, "all"], default="H100", help="default: H100")
    model.add_argument("--batch", type=int, default=2, metavar="N", help="of the networks: 2 is one image, guided")
    model.add_argument("--dtype", choices=["fp16", "bf16"], default="fp16")
    model.add_argument("--train", action="store_true", help="forward and backward of training, no checkpointing")
    model.add_argument("--json", type=Path, metavar="FILE", help="write the prediction to this file, too")
    chosen = parser.parse_args(arguments)

    from triton import knobs

    if knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET=1 makes every kernel an interpreted one, which cannot be compiled; unset it")
    if chosen.batch < 1:
        parser.error(f"--batch: expected 1 or more, got {chosen.batch}")
    if chosen.model:
        _predict(chosen)
        return 0
    print(HEADER)
    faulty = 0
    for compiled in report(chosen.arch or list(ARCHITECTURES), chosen.op or list(OPS), chosen.every, chosen.processes):
        print(compiled, flush=True)
        faulty += bool(compiled.faults)
    print(f"{faulty} with faults")
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
