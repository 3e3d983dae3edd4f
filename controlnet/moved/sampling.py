"""The former name of `controlnet.inference.sampling`."""

from controlnet.inference.sampling import *  # noqa: F403
