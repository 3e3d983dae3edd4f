"""The former name of `controlnet.inference.images`."""

from controlnet.inference.images import *  # noqa: F403
