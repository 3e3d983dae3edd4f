"""The former name of `controlnet.model.controlnet`."""

from controlnet.model.controlnet import *  # noqa: F403
