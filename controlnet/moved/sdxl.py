"""The former name of `controlnet.conditioning.sdxl`."""

from controlnet.conditioning.sdxl import *  # noqa: F403
