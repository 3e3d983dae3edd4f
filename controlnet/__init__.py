"""A ControlNet for Stable Diffusion built on fused kernels; the names below are imported when they are first used."""

import importlib
import os
from typing import Any

# `import controlnet.unet` and other names from before the modules moved into folders.
__path__ = [*__path__, os.path.join(__path__[0], "moved")]

_EXPORTS = {
    "CheckpointError": "controlnet.checkpoints.errors",
    "ControlNet": "controlnet.model.controlnet",
    "UNet": "controlnet.model.unet",
    "__version__": "cnkernels.version",
    "accelerate": "controlnet.diffusers",
    "add_control": "controlnet.checkpoints.convert",
    "convert": "controlnet.checkpoints.convert",
    "load": "controlnet.checkpoints.convert",
    "restore": "controlnet.diffusers",
    "transfer": "controlnet.checkpoints.convert",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
