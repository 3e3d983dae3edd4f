"""Small models and pipelines of diffusers with random weights, none of them zero."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import diffusers
import torch
from torch import Tensor, nn

import cnkernels
from cnkernels import recompute

CONTEXT = 24
GAINS = {"attn2": 2.0, "controlnet_": 2.0}  # more of these, and 20 steps make chaos of rounding errors
VARIANTS = {
    "sd15": {"attention_head_dim": 4},
    "sd21": {"attention_head_dim": [2, 4, 4, 4], "use_linear_projection": True},
    "two blocks deep": {"attention_head_dim": 4, "transformer_layers_per_block": 2, "layers_per_block": 1},
    "scale and shift": {"attention_head_dim": 4, "resnet_time_scale_shift": "scale_shift"},
    "sdxl": {
        "attention_head_dim": [2, 4, 8],
        "use_linear_projection": True,
        "block_out_channels": (32, 64, 64),
        "transformer_layers_per_block": [1, 2, 3],
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 16,
    },
}


def randomized(module: nn.Module, seed: int) -> nn.Module:
    """All parameters drawn so that every layer, and the prompt above all, is seen in the result."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.dim() == 1:
            value = 0.2 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        else:
            gain = next((gain for part, gain in GAINS.items() if part in name), 1.0)
            value = gain * noise * parameter[0].numel() ** -0.5
        parameter.data.copy_(value)
    return module.eval()


# A U-Net with one of each kind of block, for what takes long at every layer, such as compilation.
SMALL = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


def unet(variant: str = "sd15", seed: int = 0, **config) -> diffusers.UNet2DConditionModel:
    common = {"sample_size": 8, "block_out_channels": (32, 64, 64, 64), "cross_attention_dim": CONTEXT}
    return randomized(diffusers.UNet2DConditionModel(**common | VARIANTS[variant] | config), seed)


def added_conditions(batch: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a U-Net of SDXL is conditioned on besides the prompt's states."""
    generator = torch.Generator().manual_seed(4)
    pooled = torch.randn(batch, 16, generator=generator).to(dtype)
    return {"text_embeds": pooled, "time_ids": torch.arange(6.0).repeat(batch, 1).to(dtype)}


@contextmanager
def fused() -> Iterator[Counter]:
    """Counts the calls of this library's operations."""
    counts: Counter = Counter()

    def counted(owner, name):
        function = getattr(owner, name)
        return lambda *args, **kwargs: counts.update([name]) or function(*args, **kwargs)

    names = [(cnkernels, name) for name in ("attention", "group_norm_silu", "geglu", "zero_conv_add_group")]
    grad = torch.is_grad_enabled()
    names += [(recompute, name) for name in ("group_norm_silu", "geglu") if grad]  # without, they call the others
    with contextlib.ExitStack() as stack:
        for owner, name in names:
            stack.enter_context(mock.patch.object(owner, name, counted(owner, name)))
        yield counts


def controlnet(base: nn.Module, seed: int = 1) -> diffusers.ControlNetModel:
    return randomized(diffusers.ControlNetModel.from_unet(base), seed)


def vae(seed: int = 2) -> diffusers.AutoencoderKL:
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    return randomized(
        diffusers.AutoencoderKL(block_out_channels=(32, 32, 64, 64), latent_channels=4, sample_size=64, **blocks), seed
    )


def pipeline(kind: str = "StableDiffusionControlNetPipeline", controls: int = 1, **unet_config):
    """A pipeline without text encoder: it is called with prompt_embeds."""
    base = unet(**unet_config)
    parts = {"vae": vae(), "unet": base, "scheduler": diffusers.DDIMScheduler(clip_sample=False)}
    if "ControlNet" in kind:
        nets = [controlnet(base, seed=10 + i) for i in range(controls)]
        parts["controlnet"] = nets[0] if controls == 1 else nets
    parts |= dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipe = getattr(diffusers, kind)(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompt(batch: int = 1, seed: int = 5, **options) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    embeds = (torch.randn(batch, 7, CONTEXT, generator=generator) for _ in range(2))
    return dict(zip(("prompt_embeds", "negative_prompt_embeds"), embeds, strict=True)) | options


def image(batch: int = 1, height: int = 64, width: int = 64, seed: int = 6) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def draw(pipe, seed: int = 7, **arguments):
    """The images [N, H, W, 3] in [0, 1] of a call, as a tensor."""
    generator = torch.Generator().manual_seed(seed)
    return torch.from_numpy(pipe(generator=generator, output_type="np", **arguments).images)
