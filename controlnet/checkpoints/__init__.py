"""Checkpoint files of the original repository, NeMo and diffusers, read into this package's models."""

from controlnet.checkpoints.errors import CheckpointError
from controlnet.checkpoints.files import read
from controlnet.checkpoints.sources import Source, resolve
from controlnet.checkpoints.weights import (
    Report,
    fill,
    load_control,
    load_unet,
    part_tensors,
    parts,
    ready_control,
    ready_unet,
)

__all__ = [
    "CheckpointError",
    "Report",
    "Source",
    "fill",
    "load_control",
    "load_unet",
    "part_tensors",
    "parts",
    "read",
    "ready_control",
    "ready_unet",
    "resolve",
]
