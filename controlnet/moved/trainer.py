"""The former name of `controlnet.training.trainer`."""

from controlnet.training.trainer import *  # noqa: F403
