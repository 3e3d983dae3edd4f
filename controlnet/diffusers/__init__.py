"""For people on diffusers: `accelerate` what you have, or import the classes from here instead of from diffusers."""

from controlnet.diffusers.accelerate import accelerate, restore
from controlnet.diffusers.models import ControlNetModel, UNet2DConditionModel

__all__ = ["ControlNetModel", "UNet2DConditionModel", "accelerate", "restore"]
