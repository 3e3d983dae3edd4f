"""Compiles csrc/: the extension with nvcc, and the same sources with g++ for execution on a CPU.

Used by setup.py and by the tests. Needs ninja and pybind11, never torch.
"""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

CSRC = Path(__file__).resolve().parent
KERNELS = sorted(CSRC.glob("*.cu"))
DEFAULT_ARCHS = "80;90a"
_WARNINGS = ("-Wall", "-Wextra", "-Wno-psabi")
_HOST_FLAGS = ("-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", *_WARNINGS)
_NVCC_FLAGS = ("-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-cudart", "static")


def nvcc() -> str | None:
    """The path of nvcc: of CUDA_HOME, of CUDA_PATH, on PATH, or in /usr/local/cuda; None where there is none."""
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    folders = [os.path.join(root, "bin") for root in roots if root] + [None, "/usr/local/cuda/bin"]
    return next(filter(None, (shutil.which("nvcc", path=folder) for folder in folders)), None)


def advice() -> str | None:
    """What is odd about where nvcc was found or not found, for whoever installs; None where nothing is."""
    found, lines = nvcc(), []
    for name in ("CUDA_HOME", "CUDA_PATH"):
        root = os.environ.get(name)
        if root and not shutil.which("nvcc", path=os.path.join(root, "bin")):
            lines.append(f"{name}={root} has no bin/nvcc; {f'{found} is used' if found else 'no other was found'}")
    if not found:
        lines.append("without nvcc cnkernels is installed without its CUDA kernels: Triton's and PyTorch's serve")
    return "\n".join(lines) or None


def architectures(requested: str | None) -> list[str]:
    """What to compile for, such as ["80", "90a"]: what is asked for, else the GPUs present, else those two."""
    archs = [a for a in (requested or _present() or DEFAULT_ARCHS).replace(",", ";").split(";") if a]
    for arch in archs:
        if not re.fullmatch(r"\d{2,3}[af]?", arch) or int(arch.rstrip("af")) < 80:
            raise ValueError(f"CNKERNELS_ARCHS: expected such as 80;90a, at least 80, got {arch!r}")
    return sorted(set(archs), key=lambda a: int(a.rstrip("af")))


def _present() -> str | None:
    """What CUDA's own tool says of the GPUs in this machine."""
    compiler = nvcc()
    query = Path(compiler).resolve().parent / "__nvcc_device_query" if compiler else None
    if query is None or not query.exists():
        return None
    found = subprocess.run([query], capture_output=True, text=True).stdout.split(",")
    numbers = [int(a) for a in found if a.strip().isdigit() and int(a) >= 80]
    return ";".join(f"{n}a" if n == 90 else str(n) for n in numbers) or None


def architecture_flags(archs: list[str]) -> list[str]:
    """Machine code for each architecture, and PTX of the newest for GPUs that come after."""
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    newest = archs[-1].rstrip("af")
    return [*flags, f"-gencode=arch=compute_{newest},code=compute_{newest}"]


def build_extension(module: Path, work: Path, archs: list[str]) -> None:
    """Compiles cnkernels._C to `module` with nvcc, incrementally in `work`."""
    quoted = ";".join(archs)
    flags = [*_NVCC_FLAGS, *architecture_flags(archs), *_include_flags()]
    bindings = [*_HOST_FLAGS, *_include_flags(), "-DCNK_MODULE=_C", f'-DCNK_ARCHITECTURES="{quoted}"']
    objects = [(source, "cuda") for source in KERNELS] + [(CSRC / "bindings.cpp", "cpp")]
    rules = {
        "cuda": f"{shlex.quote(nvcc())} {_words(flags)} -MD -MF $out.d -c $in -o $out",
        "cpp": f"c++ {_words(bindings)} -MD -MF $out.d -c $in -o $out",
        "link": f"{shlex.quote(nvcc())} -cudart static -shared $in -o $out",
    }
    try:
        _ninja(module, work, objects, rules)
    except RuntimeError as error:
        raise RuntimeError(
            f"{error}\n\nThe CUDA kernels did not compile (nvcc is {nvcc()}, for {quoted}). CNKERNELS_BUILD=0 installs "
            "without them, on Triton's kernels and PyTorch's; CNKERNELS_ARCHS, such as 80;90a, chooses the GPUs"
        ) from None


def build_host(folder: Path, sources: Iterable[Path] = (), name: str = "_C_host") -> Path:
    """Compiles kernels for execution on a CPU into `folder`, once per state of the sources; returns the module.

    Args:
        sources: those of the module `name`; by default the whole of csrc.
    """
    import fcntl  # not on Windows, where there is no such execution

    sources = list(sources) or [*KERNELS, CSRC / "bindings.cpp"]
    target = folder / _digest(sources) / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test processes start together: one builds, the others find it built
        if not target.exists():
            work = target.parent / "work"
            flags = [*_HOST_FLAGS, "-DCNK_HOST", f"-DCNK_MODULE={name}", f"-I{CSRC}", *_include_flags()]
            command = f"c++ {_words(flags)} -MD -MF $out.d -x c++ -c $in -o $out"
            rules = {"cpp": command, "link": "c++ -shared $in -o $out"}
            _ninja(work / target.name, work, [(source, "cpp") for source in sources], rules)
            os.replace(work / target.name, target)
            shutil.rmtree(work)
    return target


def _include_flags() -> list[str]:
    import pybind11

    return [flag for path in (sysconfig.get_path("include"), pybind11.get_include()) for flag in ("-isystem", path)]


def _words(flags: Iterable[str]) -> str:
    """Arguments for a command of ninja, each as the shell must have it."""
    return shlex.join(flags).replace("$", "$$")


def _path(path: Path | str) -> str:
    """A path for a build line of ninja."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def _digest(sources: Iterable[Path]) -> str:
    """Names the state of everything that a host build depends on."""
    digest = hashlib.sha256(f"{sys.version} {_HOST_FLAGS}".encode())
    headers = (path for path in CSRC.rglob("*") if path.suffix in (".cuh", ".h", ".py"))
    for path in (*sorted(headers), *sources):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _ninja(module: Path, work: Path, objects: list[tuple[Path, str]], rules: dict[str, str]) -> None:
    import ninja

    work.mkdir(parents=True, exist_ok=True)
    module.parent.mkdir(parents=True, exist_ok=True)
    lines = ["ninja_required_version = 1.8"]
    for rule, command in rules.items():
        lines += [f"rule {rule}", f"  command = {command}"]
        lines += [] if rule == "link" else ["  depfile = $out.d", "  deps = gcc"]
    outputs = [f"{source.stem}.o" for source, _ in objects]
    lines += [f"build {out}: {rule} {_path(source)}" for out, (source, rule) in zip(outputs, objects, strict=True)]
    lines.append(f"build {_path(module)}: link {' '.join(outputs)}")
    (work / "build.ninja").write_text("\n".join(lines) + "\n")
    jobs = os.environ.get("MAX_JOBS") or str(min(os.cpu_count() or 1, _memory_gib() // 2 or 1))
    command = [Path(ninja.BIN_DIR) / "ninja", "-C", work, "-j", jobs]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{done.stdout}\ncsrc does not compile; the first error is\n{first_error(done.stdout)}")


def first_error(output: str) -> str:
    """The first line in which a compiler reports an error, with what follows it; else the end of the output."""
    lines = output.splitlines()
    for index, line in enumerate(lines):
        if re.search(r"\b(error|fatal)\b", line, re.IGNORECASE):
            return "\n".join(lines[index : index + 5])
    return "\n".join(lines[-5:])


def _memory_gib() -> int:
    if not hasattr(os, "sysconf"):
        return 0
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30
