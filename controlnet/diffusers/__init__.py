"""For people on diffusers: `accelerate` what you have, `restore` it, `forget` what is kept between steps."""

try:
    from controlnet.diffusers.accelerate import accelerate, restore
    from controlnet.diffusers.memo import forget
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "diffusers":
        raise
    raise ImportError(
        "diffusers is not installed: controlnet.accelerate makes its models faster. pip install diffusers, or, in the"
        " repository, pip install -e '.[diffusers]'"
    ) from error

__all__ = ["accelerate", "forget", "restore"]
