"""The former name of `controlnet.build.opening`."""

from controlnet.build.opening import *  # noqa: F403
