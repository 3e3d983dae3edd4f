"""The former name of `controlnet.common.command`."""

from controlnet.common.command import *  # noqa: F403
