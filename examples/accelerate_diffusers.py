"""Accelerates a diffusers U-Net and ControlNet of random weights, and compares before and after.

python examples/accelerate_diffusers.py; with real weights, the same line goes after
`pipe = StableDiffusionControlNetPipeline.from_pretrained(...)`.
"""

import diffusers
import torch

import controlnet

torch.manual_seed(0)
unet = diffusers.UNet2DConditionModel(
    sample_size=16,
    block_out_channels=(32, 64),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=24,
).eval()
net = diffusers.ControlNetModel.from_unet(unet).eval()
x, hint, text = torch.randn(2, 4, 16, 16), torch.rand(2, 3, 128, 128), torch.randn(2, 7, 24)


@torch.no_grad()
def step() -> torch.Tensor:
    down, middle = net(x, 10, text, controlnet_cond=hint, return_dict=False)
    return unet(
        x, 10, text, down_block_additional_residuals=down, mid_block_additional_residual=middle, return_dict=False
    )[0]


before = step()
controlnet.accelerate(unet)
controlnet.accelerate(net)
after = step()
print(f"largest difference {(after - before).abs().max():.1e} of {before.abs().max():.1f}")
controlnet.restore(unet)
controlnet.restore(net)
print(f"after restore {(step() - before).abs().max():.1e}")
