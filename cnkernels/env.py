"""The report `python -m cnkernels.env`: what is installed, what each op would use here, and why."""

import argparse
import collections
import platform
import statistics

from cnkernels.machine import version
from cnkernels.register import dtype_name

PACKAGES = ("torch", "triton", "numpy", "safetensors", "omegaconf", "webdataset", "diffusers", "transformers")


def _devices() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return ["gpu          none (torch.cuda.is_available() is False)"]
    lines = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        lines.append(
            f"gpu {index}        {properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{properties.multi_processor_count} multiprocessors, {properties.total_memory / 2**30:.0f} GiB"
        )
    return lines


def _choices() -> list[str]:
    """What each op would use here, why, and what can be done about it."""
    import torch

    from cnkernels import cache, dispatch, findings, machine

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record = findings.record(device)
    checked = record["checked"]
    lines = [f"cache        {cache.path(machine.identity(device))}"]
    lines.append(f"checked      {checked['date'] if checked else 'never on this machine: python -m cnkernels.check'}")
    lines += [
        f"wrong        {f['op']}, {f['backend']}, {f['dtype']}: {f['fault']} ({f['case']})" for f in record["faults"]
    ]
    if not record["choices"]:
        lines.append("measured     nothing on this machine: python -m cnkernels.tune")
    reasons: dict[str, None] = {}  # an ordered set: one reason holds for many ops and dtypes
    for op in dispatch.OPS:
        dtypes: dict[str, list[str]] = {}
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            name = dtype_name(dtype)
            chosen, why = dispatch.select(op, device, dtype), _measured(record, op, name)
            served = [b for b in dispatch.BACKENDS if dispatch.why_not(op, b, device, dtype) is None]
            why = why or ("the only choice" if len(served) == 1 else f"by rule, of {', '.join(served)}")
            dtypes.setdefault(f"{chosen} ({why})", []).append(name)
            for backend in dispatch.BACKENDS:
                reason = dispatch.why_not(op, backend, device, dtype)
                if backend != chosen and reason:
                    reasons[f"not {backend:<8} {reason}"] = None
        lines += [f"{op:<16} {device.type} {', '.join(names)}: {what}" for what, names in dtypes.items()]
    return lines + list(reasons)


def _measured(record: dict, op: str, dtype: str) -> str | None:
    """Where the op was measured in this dtype: how often each backend was the fastest, by how much, and when."""
    entries = [entry for entry in record["choices"].get(op, []) if entry["dtype"] == dtype]
    if not entries:
        return None
    wins = collections.Counter(entry["backend"] for entry in entries)
    gains = [sorted(entry["seconds"].values()) for entry in entries if len(entry["seconds"]) > 1]
    by = f", {statistics.median(g[1] / g[0] for g in gains):.2f} times as fast as the next" if gains else ""
    launches = sum(entry["backend"] in entry.get("configurations", {}) for entry in entries)
    by += f", {launches} of them launched as measured" if launches else ""
    which = ", ".join(f"{backend} for {count}" for backend, count in wins.most_common())
    return f"measured for {len(entries)} calls: {which}{by}; {max(entry['date'] for entry in entries)[:10]}"


def report() -> str:
    """The text that `python -m cnkernels.env` prints; made to be pasted into a bug report."""
    from cnkernels import dispatch, extension, variables

    lines = [f"python       {platform.python_version()} on {platform.platform()}"]
    lines += [f"{package:<12} {version(package) or 'not installed'}" for package in PACKAGES]
    lines += _devices()
    lines.append(f"extension    {extension.status()}")
    lines += [f"{name}={variables.read(name) or ''}  # {meaning}" for name, meaning in variables.VARIABLES.items()]
    lines.append(f"backend      {dispatch.current()} (in force)")
    return "\n".join(lines + _choices())


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m cnkernels.env",
        description="Reports what is installed, what each op would use on this machine and why. Paste it into a bug"
        " report.",
        epilog="example:\n  python -m cnkernels.env > environment.txt",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args()
    print(report())


if __name__ == "__main__":
    main()
