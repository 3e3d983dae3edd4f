"""The frozen models around the U-Net: first stage (image <-> latent) and condition stage (captions -> context)."""

from controlnet.conditioning.conditioning import Conditioning
from controlnet.conditioning.first_stage import AutoencoderKL, SpaceToDepth
from controlnet.conditioning.sdxl import TextEncoders
from controlnet.conditioning.text import CLIPTextEncoder, WordEmbedder

__all__ = ["AutoencoderKL", "CLIPTextEncoder", "Conditioning", "SpaceToDepth", "TextEncoders", "WordEmbedder"]
