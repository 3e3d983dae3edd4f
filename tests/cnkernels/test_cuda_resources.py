"""Every CUDA kernel compiled for six architectures: no spills, tensor cores, 16-byte loads, lean inner loops.

Instructions are counted from the machine code: no test of results, and none for the presence of an opcode, sees that a
loop spends half its instructions on addresses.
"""

import hashlib
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from cnkernels import aot_sass, extension
from cnkernels.attention import cuda_kernels as attention
from cnkernels.zero_conv_add import cuda_kernels as zero_conv_add
from tests.cnkernels import host_build

BUILD = host_build.csrc_build()
# Machine code: from this PTX. No kernel has instructions of 90a alone; one that had would not compile for 90.
ARCHS = {"80": "80", "86": "80", "89": "80", "90": "90", "100": "90", "120": "90"}
READ = ("80", "89", "90", "120")  # whose machine code is read, too
STATIC_LIMIT = 48 * 1024
SMALL_GPU_LIMIT = 99 * 1024  # dynamic, of sm_86, sm_89 and sm_120, where the portable kernels are to run too


def cuobjdump() -> str | None:
    """The disassembler of the toolkit, or the one that Triton brings."""
    import triton

    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return shutil.which("cuobjdump") or (str(bundled) if bundled.exists() else None)


@dataclass(frozen=True)
class Kernel:
    name: str  # mangled
    arch: str
    registers: int
    stack: int
    spills: int  # bytes stored and loaded
    static_shared: int
    sass: str  # empty where it is not read


def compile_source(source: Path, folder: Path) -> list[Kernel]:
    fatbin = folder / f"{source.stem}.fatbin"
    log, sass = fatbin.with_suffix(".log"), fatbin.with_suffix(".sass")
    if not sass.exists():
        flags = [
            f"-gencode=arch=compute_{ptx},code=[{','.join(f'sm_{arch}' for arch in ARCHS if ARCHS[arch] == ptx)}]"
            for ptx in dict.fromkeys(ARCHS.values())
        ]
        command = [BUILD.nvcc(), "-std=c++17", "-O3", "-Xptxas", "-v", *flags, "-fatbin", source, "-o", fatbin]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, BUILD.first_error(done.stdout + done.stderr)
        log.write_text(done.stdout + done.stderr)
        disassemble = [[cuobjdump(), "-sass", "-arch", f"sm_{arch}", fatbin] for arch in READ]
        sass.write_text("".join(subprocess.run(d, capture_output=True, text=True).stdout for d in disassemble))
    return list(parse(log.read_text(), sass.read_text()))


def parse(log: str, sass: str):
    code = {}
    for image in re.split(r"(?=\barch = sm_)", sass):
        arch = re.match(r"arch = sm_(\w+)", image)
        for name, function in aot_sass.functions(image).items():
            code[arch[1], name] = function
    for name, arch, figures in re.findall(r"Compiling entry function '(\S+)' for 'sm_(\w+)'(.*?Used .*?)\n", log, re.S):

        def figure(pattern, figures=figures):
            return sum(int(n) for n in re.findall(pattern, figures))

        yield Kernel(
            name,
            arch,
            figure(r"Used (\d+) registers"),
            figure(r"(\d+) bytes stack frame"),
            figure(r"(\d+) bytes spill"),
            figure(r"(\d+) bytes smem"),
            code.get((arch, name), ""),
        )


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    if BUILD.nvcc() is None or cuobjdump() is None:
        pytest.skip("needs nvcc and cuobjdump")
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in sorted(BUILD.CSRC.rglob("*.cu*")))).hexdigest()[:16]
    folder = host_build.ROOT / "build" / "resources" / digest
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        return [k for found in pool.map(lambda source: compile_source(source, folder), BUILD.KERNELS) for k in found]


def faults(kernel: Kernel) -> list[str]:
    """What is wrong with a kernel, in words."""
    name, found = kernel.name, []
    if kernel.spills:
        found.append(f"spills {kernel.spills} bytes")
    if kernel.stack:
        found.append(f"has {kernel.stack} bytes of local memory")
    if kernel.static_shared > STATIC_LIMIT:
        found.append(f"takes {kernel.static_shared} bytes of static shared memory")
    if not kernel.sass or ("_cluster_kernel" in name and ARCHS[kernel.arch] == "80"):
        return found  # no clusters before sm_90: an empty body
    half = "f16E" in name  # of bf16 too
    multiplies = re.search(r"attention_(fwd|bwd_d)|zero_conv_add_(fwd|bwd_dx|bwd_dweight)_kernel", name)
    if multiplies and half and "HMMA" not in kernel.sass:
        found.append("multiplies without tensor cores")
    if multiplies and not re.search(r"LDGSTS\.E\.\S*128", kernel.sass):
        found.append("copies in less than 16 bytes")
    vector = re.search(r"4SlabI(?:f|NS_\d+b?f16E)Lb[01]ELi(\d+)E", name)
    if vector and vector[1] != "1":
        if not re.search(r"LDG\.E\.\S*128", kernel.sass):
            found.append("loads in less than 16 bytes")
        if re.search("_(apply|cluster)_kernel", name) and not re.search(r"STG\.E\.\S*128", kernel.sass):
            found.append("stores in less than 16 bytes")
    return found


def test_no_kernel_has_a_fault(kernels):
    found = {f"sm_{k.arch} {k.name}": faults(k) for k in kernels if faults(k)}
    assert not found, "\n".join(f"{name}: {', '.join(what)}" for name, what in found.items())


def test_every_kernel_is_there(kernels):
    """The count that dtypes, formats, vector widths and head dimensions make, for every architecture."""
    for arch in ARCHS:
        names = [k.name for k in kernels if k.arch == arch]
        assert sum("group_norm_silu_fwd" in n for n in names) == 30  # 3 dtypes x 2 formats x (2 widths x 2 + cluster)
        assert sum("group_norm_silu_bwd" in n for n in names) == 36  # the same and two sums per dtype
        assert sum("zero_conv_add_fwd_kernel" in n for n in names) == 6  # 3 dtypes x 2 formats
        assert sum("zero_conv_add_fwd_fold" in n for n in names) == 3
        assert sum("zero_conv_add_bwd_d" in n for n in names) == 18  # the products, dbias and dscale
        assert sum("attention_fwd" in n for n in names) == 20  # 2 dtypes x 5 head dimensions x 2 sizes of blocks
        assert sum("attention_bwd" in n for n in names) == 10 * 4 + 6  # delta, dq, dk, dv; dk with dv up to 80


def test_the_rules_see_a_fault(kernels):
    """Each rule, on a kernel doctored to break it."""
    good = next(k for k in kernels if k.sass and "attention_fwd" in k.name)
    assert not faults(good)
    doctored = {
        "spills 8 bytes": {"spills": 8},
        "has 16 bytes of local memory": {"stack": 16},
        "takes 65536 bytes of static shared memory": {"static_shared": 65536},
        "multiplies without tensor cores": {"sass": good.sass.replace("HMMA", "FFMA")},
        "copies in less than 16 bytes": {"sass": re.sub(r"LDGSTS\S*", "LDGSTS.E", good.sass)},
    }
    for fault, change in doctored.items():
        assert fault in faults(Kernel(**{**vars(good), **change}))
    apply = next(k for k in kernels if k.sass and "fwd_apply_kernel" in k.name and "Li8E" in k.name)
    narrow = re.sub(r"(LDG|STG)\.E\S*", r"\1.E.U16", apply.sass)
    found = faults(Kernel(**{**vars(apply), "sass": narrow}))
    assert found == ["loads in less than 16 bytes", "stores in less than 16 bytes"]


@dataclass(frozen=True)
class Bound:
    """The most instructions that one turn of a kernel's inner loop may take."""

    kernel: str  # a regular expression of its mangled name
    units: int  # of work in one turn: fragments of 16 rows x 64 keys, HMMA, or elements
    most: float  # instructions per unit
    tensor: int = 0  # HMMA per turn, exactly: more would be padding
    mufu: int | None = None  # MUFU per turn, at most


_F16 = r"3f16E"
# What a unit cannot do without, and some 15 % for addresses, barriers and the loop: at D = 40 a warp's 16 rows x 64
# keys are 44 HMMA, 34 MUFU, 66 FFMA and FADD, 36 FMNMX, 20 FMUL, 16 conversions and 15 to 27 LDSM.
BOUNDS = {
    "attention forward 40": Bound(rf"attention_fwd_kernel.*Head.*{_F16}Li40ELi4ELi2E", 2, 320, tensor=88, mufu=68),
    "attention forward 64": Bound(rf"attention_fwd_kernel.*Head.*{_F16}Li64ELi4ELi2E", 2, 340, tensor=128, mufu=68),
    "attention forward 80": Bound(rf"attention_fwd_kernel.*Head.*{_F16}Li80ELi8ELi1E", 1, 460, tensor=80, mufu=34),
    "attention dq 40": Bound(rf"attention_bwd_dq_kernel.*{_F16}Li40E", 1, 480, tensor=68, mufu=32),
    "attention dk dv 40": Bound(rf"attention_bwd_dkdv_kernel.*{_F16}Li40E.*Lb1ELb1E", 1, 480, tensor=88, mufu=32),
    # Tiles of 64x64 took 15 and more for an HMMA on their fast path alone.
    "zero_conv_add": Bound(rf"zero_conv_add_fwd_kernel.*{_F16}", 40, 3.5, tensor=40),
    "zero_conv_add dx": Bound(rf"zero_conv_add_bwd_dx_kernel.*{_F16}", 40, 4.0, tensor=40),
    "zero_conv_add dweight": Bound(rf"zero_conv_add_bwd_dweight_kernel.*{_F16}", 40, 3.5, tensor=40),
    # Of an element: unpack, shift, scale, two MUFU and three products for SiLU, half a pack, and 1/8 of two accesses.
    "group norm apply": Bound(rf"group_norm_silu_fwd_apply_kernel.*{_F16}Lb[01]ELi8E", 32, 14, mufu=64),
    # Unpack twice, add, subtract, square; the merge of eight elements of a channel.
    "group norm moments NHWC": Bound(rf"group_norm_silu_fwd_moments_kernel.*{_F16}Lb1ELi8E", 64, 9),
    "group norm moments NCHW": Bound(rf"group_norm_silu_fwd_moments_kernel.*{_F16}Lb0ELi8E", 32, 9),
    # Forward's, and the derivative of SiLU.
    "group norm sums": Bound(rf"group_norm_silu_bwd_sums_kernel.*{_F16}Lb0ELi8E", 32, 20, mufu=64),
}


def excess(kernel: Kernel, bound: Bound) -> list[str]:
    """What of the kernel's inner loop is over the bound, in words."""
    loop = aot_sass.hot_loop(aot_sass.instructions(kernel.sass))
    pipes, found = aot_sass.count(loop), []
    most = bound.most * (1.06 if kernel.arch == "120" else 1.0)  # where the assembler puts NOPs among the products
    if len(loop) > most * bound.units:
        found.append(f"{len(loop) / bound.units:.1f} instructions a unit, the bound is {bound.most}")
    if pipes["tensor"] != bound.tensor:
        found.append(f"{pipes['tensor']} HMMA, not {bound.tensor}")
    if bound.mufu is not None and pipes["mufu"] > bound.mufu:
        found.append(f"{pipes['mufu']} MUFU, the bound is {bound.mufu}")
    return [f"{what} ({dict(pipes)})" for what in found]


@pytest.mark.parametrize("name", BOUNDS)
def test_an_inner_loop_is_lean(kernels, name):
    bound = BOUNDS[name]
    bounded = [k for k in kernels if k.sass and re.search(bound.kernel, k.name)]
    assert {k.arch for k in bounded} == set(READ)
    over = {f"sm_{k.arch} {k.name}": excess(k, bound) for k in bounded if excess(k, bound)}
    assert not over, "\n".join(f"{kernel}: {', '.join(what)}" for kernel, what in over.items())


def test_the_bounds_see_an_excess(kernels):
    """A hundred instructions more in the loop, as the addresses of a few copies once took; products too many or few."""
    bound = BOUNDS["attention forward 40"]
    kernel = next(k for k in kernels if k.sass and re.search(bound.kernel, k.name))
    assert not excess(kernel, bound)
    address = f"/*{aot_sass.hot_loop(aot_sass.instructions(kernel.sass))[1].address:04x}*/"
    place = kernel.sass.index("\n", kernel.sass.index(address))
    padded = kernel.sass[:place] + f"\n        {address} IADD3 R1, R1, R1, RZ ;" * 100 + kernel.sass[place:]
    assert "instructions a unit, the bound is" in excess(replace(kernel, sass=padded), bound)[0]
    assert len(excess(kernel, replace(bound, tensor=96, mufu=60))) == 2


@pytest.mark.skipif(host_build.COMPILER is None, reason="needs a C++ compiler")
def test_dynamic_shared_memory_fits_small_gpus():
    """Read from the launches themselves, on the largest tiles of each op."""
    if extension.why_host_absent():
        extension.load_host(host_build.build())
    cpu, library = torch.device("cpu"), extension.module_for(torch.device("cpu"))
    launched = []
    q = torch.randn(1, 65, 1, 160, dtype=torch.float16, device=cpu)
    out, lse = attention.attention_fwd(q, q, q, 0.1)
    launched += library.launches()
    attention.attention_bwd(out, q, q, q, out, lse, 0.1, (True, True, True))
    launched += library.launches()
    for dtype in (torch.float32, torch.float16):
        x, weight = torch.randn(1, 8, 3, 3).to(dtype), torch.randn(8, 8, 1, 1).to(dtype)
        y = zero_conv_add.zero_conv_add_fwd(x, weight, None, None, 1.0)
        launched += library.launches()
        zero_conv_add.zero_conv_add_bwd(y, x, weight, None, 1.0, (True, True, False, False))
        launched += library.launches()
    assert {name for name, *_ in launched} == {
        "attention_fwd", "attention_bwd", "zero_conv_add_fwd", "zero_conv_add_bwd"
    }  # fmt: skip
    for name, _, _, shared, _ in launched:
        assert shared <= SMALL_GPU_LIMIT, f"{name}: {shared} bytes of shared memory"
