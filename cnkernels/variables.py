"""The environment variables of cnkernels, and the one place that reads them."""

import os

VARIABLES = {
    "CNKERNELS_BACKEND": "aten, reference, triton, cuda or auto (default): what `cnkernels.backend` starts from",
    "CNKERNELS_ARCHS": "GPU architectures to build for, such as 80;90a (default: the GPUs present, else 80;90a)",
    "CNKERNELS_CACHE": "folder of what `cnkernels.check` and `cnkernels.tune` found (default ~/.cache/cnkernels)",
    "CNKERNELS_BUILD": "0 installs without compiling the extension even where nvcc is present (default 1)",
}


def read(name: str) -> str | None:
    """The value of one of `VARIABLES`, or None when unset or empty."""
    if name not in VARIABLES:
        raise KeyError(f"{name} is not one of the environment variables of cnkernels: {', '.join(VARIABLES)}")
    return os.environ.get(name) or None
