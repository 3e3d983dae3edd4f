"""What a measurement depends on: the device, its driver, and the versions of the software that runs on it."""

import functools
import hashlib
import importlib.util
import os
import platform
import re
from importlib import metadata
from pathlib import Path

import torch

from cnkernels.version import __version__

Identity = dict[str, str | None]


def version(package: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """The CPU's model name."""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def driver() -> str | None:
    """The NVIDIA driver's version, or the CUDA version that it serves where /proc does not tell; None without one."""
    file = Path("/proc/driver/nvidia/version")
    if file.exists():
        found = re.search(r"\s(\d+\.\d+(\.\d+)?)\s", file.read_text())
        if found:
            return found[1]
    return str(torch._C._cuda_getDriverVersion()) if torch.cuda.is_available() else None


def too_old(device: torch.device) -> str | None:
    """What to tell the owner of a GPU that our kernels do not serve; None for any other device."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0):
        return None
    return "this GPU is older than compute capability 8.0: only PyTorch's own kernels (aten) serve it"


@functools.cache
def extension_hash() -> str | None:
    """The first 16 hexadecimal digits of the SHA-256 of the compiled CUDA extension; None where it is not built."""
    spec = importlib.util.find_spec("cnkernels._C")
    if spec is None or spec.origin is None:
        return None
    return hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()[:16]


@functools.cache
def identity(device: torch.device) -> Identity:
    """Names and versions of all that a check or a timing on `device` depends on. No two of them share results."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name, level = torch.cuda.get_device_name(device), f"{major}.{minor}"
    else:
        name, level = processor(), torch.backends.cpu.get_cpu_capability()
        if os.environ.get("TRITON_INTERPRET") == "1":
            level += ", emulated GPU kernels"
    return {
        "device": name,
        "level": level,  # compute capability, or the CPU's instruction set
        "driver": driver() if device.type == "cuda" else None,
        "torch": torch.__version__,
        "triton": version("triton"),
        "cnkernels": __version__,
        "extension": extension_hash() if device.type == "cuda" else None,
    }
