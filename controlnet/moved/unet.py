"""The former name of `controlnet.model.unet`."""

from controlnet.model.unet import *  # noqa: F403
