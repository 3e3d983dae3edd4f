"""The U-Net, by its former path; it is `controlnet.model.unet`."""

from controlnet.model.unet import *  # noqa: F403
