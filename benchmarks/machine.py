"""Describes the machine of a run: names, versions, and measured peaks of bandwidth and arithmetic."""

import datetime
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from cnkernels import machine as here
from cnkernels import timing
from cnkernels.machine import version

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def describe(device: torch.device) -> dict[str, Any]:
    """Returns the facts that a comparable row needs: device, driver, versions, commit, date."""
    cuda = device.type == "cuda"
    commit, changed = _output("git", "rev-parse", "HEAD"), _output("git", "status", "--porcelain")
    return {
        "device": torch.cuda.get_device_name(device) if cuda else f"CPU, {torch.get_num_threads()} threads",
        "processor": here.processor(),
        "driver": here.driver() if cuda else None,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "triton", "diffusers", "xformers", "flash-attn", "liger-kernel")},
        "commit": commit,
        "uncommitted_changes": bool(changed),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def folder_name(device: torch.device) -> str:
    """The folder of results of this device: "nvidia-h100-80gb-hbm3", or "cpu"."""
    return torch.cuda.get_device_name(device).lower().replace(" ", "-") if device.type == "cuda" else "cpu"


def clocks() -> str | None:
    """Reads the current SM and memory clocks, in MHz."""
    return _output("nvidia-smi", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader")


def ceilings(device: torch.device, dtypes: list[torch.dtype]) -> dict[str, Any]:
    """Measures bytes per second of a large copy, counting both directions, and FLOP/s of a large matmul."""
    count, side = (2**28, 8192) if device.type == "cuda" else (2**24, 768)
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    copy = timing.time_one(lambda i: target.copy_(source), device)
    result: dict[str, Any] = {"copy_bytes_per_s": 2 * source.nbytes / copy.median, "clocks": clocks()}
    for dtype in dtypes:
        a = torch.randn(side, side, device=device, dtype=dtype)
        matmul = timing.time_one(lambda i, a=a: a @ a, device)
        result[f"matmul_flops_per_s_{str(dtype).removeprefix('torch.')}"] = 2 * side**3 / matmul.median
    return result
