"""The former name of `controlnet.training.checkpoint`."""

from controlnet.training.checkpoint import *  # noqa: F403
