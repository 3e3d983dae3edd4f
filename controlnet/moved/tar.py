"""The former name of `controlnet.common.tar`."""

from controlnet.common.tar import *  # noqa: F403
