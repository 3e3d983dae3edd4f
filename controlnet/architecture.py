"""Parameters of U-Net and ControlNet, by its former path; it is `controlnet.model.architecture`."""

from controlnet.model.architecture import *  # noqa: F403
