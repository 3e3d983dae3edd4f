"""The ControlNet, by its former path; it is `controlnet.model.controlnet`."""

from controlnet.model.controlnet import *  # noqa: F403
