"""The former name of `controlnet.model.architecture`."""

from controlnet.model.architecture import *  # noqa: F403
