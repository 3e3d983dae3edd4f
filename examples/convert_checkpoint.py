"""Converts a random ControlNet to diffusers' format and back, bit for bit: python examples/convert_checkpoint.py"""

import tempfile
from pathlib import Path

import diffusers
import torch

import controlnet

net = diffusers.ControlNetModel(
    block_out_channels=(32, 64),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    cross_attention_dim=24,
)
with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    net.save_pretrained(folder / "diffusers")
    print(controlnet.convert(folder / "diffusers", folder / "original.safetensors", "original"))
    print(controlnet.convert(folder / "original.safetensors", folder / "again", "diffusers"))
    again = diffusers.ControlNetModel.from_pretrained(folder / "again").state_dict()
    print("the same bits:", all(torch.equal(tensor, again[key]) for key, tensor in net.state_dict().items()))
