"""For people on diffusers: `accelerate` what you have, or import the classes from here instead of from diffusers."""

try:
    from controlnet.diffusers.accelerate import accelerate, restore
    from controlnet.diffusers.models import ControlNetModel, UNet2DConditionModel
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "diffusers":
        raise
    raise ImportError(
        "diffusers is not installed: controlnet.accelerate makes its models faster. pip install diffusers, or, in the"
        " repository, pip install -e '.[diffusers]'"
    ) from error

__all__ = ["ControlNetModel", "UNet2DConditionModel", "accelerate", "restore"]
