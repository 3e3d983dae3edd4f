"""The former name of `controlnet.common.extras`."""

from controlnet.common.extras import *  # noqa: F403
