"""The report `python -m cnkernels.env`: what is installed, what each op would use here, and why."""

import platform
from importlib import metadata

PACKAGES = ("torch", "triton", "numpy", "safetensors", "omegaconf", "webdataset", "diffusers", "transformers")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


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
    import torch

    from cnkernels import dispatch, tuning

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines = []
    if device.type == "cuda":
        gpu = torch.cuda.get_device_name(device)
        file = tuning.file_name(gpu)
        found = "is used" if tuning.table(gpu) else "is not there: the first backend below that can serve a call does"
        lines.append(f"measured     cnkernels/tuning/{file} {found}")
    reasons: dict[str, None] = {}  # an ordered set: one reason holds for many ops and dtypes
    for op in dispatch.OPS:
        dtypes: dict[str, list[str]] = {}
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            chosen = dispatch.select(op, device, dtype)
            dtypes.setdefault(chosen, []).append(str(dtype).removeprefix("torch."))
            for backend in dispatch.BACKENDS:
                reason = dispatch.why_not(op, backend, device, dtype)
                if backend != chosen and reason:
                    reasons[f"not {backend:<8} {reason}"] = None
        lines += [f"{op:<16} {device.type} -> {chosen:<10} {', '.join(names)}" for chosen, names in dtypes.items()]
    return lines + list(reasons)


def report() -> str:
    """The text that `python -m cnkernels.env` prints; made to be pasted into a bug report."""
    from cnkernels import dispatch, extension, variables

    lines = [f"python       {platform.python_version()} on {platform.platform()}"]
    lines += [f"{package:<12} {_version(package)}" for package in PACKAGES]
    lines += _devices()
    lines.append(f"extension    {extension.status()}")
    lines += [f"{name}={variables.read(name) or ''}  # {meaning}" for name, meaning in variables.VARIABLES.items()]
    lines.append(f"backend      {dispatch.current()} (in force)")
    return "\n".join(lines + _choices())


if __name__ == "__main__":
    print(report())
