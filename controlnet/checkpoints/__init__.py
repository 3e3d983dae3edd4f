"""Checkpoint files of the original repository, NeMo and diffusers, read into this package's models."""

from controlnet.checkpoints.files import CheckpointError, read
from controlnet.checkpoints.load import Report, fill, load_control, load_unet, part_tensors, parts

__all__ = ["CheckpointError", "Report", "fill", "load_control", "load_unet", "part_tensors", "parts", "read"]
