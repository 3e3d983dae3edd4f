"""The former name of `controlnet.model.diffusion`."""

from controlnet.model.controlled import ControlledUNet  # noqa: F401
from controlnet.model.diffusion import *  # noqa: F403
