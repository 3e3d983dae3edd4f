"""Memory and FLOPs of a training step by recipe, counted: `python -m benchmarks.training_memory [--json FILE]`.

Counted on fake tensors for the sizes of Stable Diffusion 1.5 (512x512) and XL (1024x1024), in bfloat16, the U-Net
locked. Weights (with autocast's copies), gradients, state of the optimizer, average, frozen stages, and what autograd
keeps for the backward pass. Not counted: workspaces of single operations, the allocator's rounding, and the CUDA
context, together 1 to 2 GB. The last lines are what encoded shards (`python -m controlnet.encode`) leave of the FLOPs.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.device_free import MODELS, Model, fake_networks, flops, ours, saved_bytes
from cnkernels.progress import say
from controlnet.common.command import parser as command_parser

GB = 1e9
BACKWARD = 2  # of a product's FLOPs forward, for both gradients; the locked encoder has none, the decoder one

# The text encoders of each model, by CLIP's configuration: ViT-L/14, and for SDXL OpenCLIP's ViT-bigG/14 beside it.
VIT_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
BIG_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "projection_dim": 1280}
TEXT_ENCODERS = {"SD 1.5": (VIT_L,), "SDXL": (VIT_L, BIG_G)}


@dataclass(frozen=True)
class Recipe:
    """How a ControlNet is trained on one GPU of `ranks_of_zero`, or on one of several without ZeRO-1."""

    base: str  # name of the model
    name: str
    batch: int
    checkpointing: bool = False
    average: bool = True
    state_bytes: float = 8.0  # of the optimizer, a weight
    ranks_of_zero: int = 1


EIGHT_BIT = 2.0
RECIPES = (
    Recipe("SD 1.5", "batch 1, checkpointing, 8-bit AdamW, no average", 1, True, False, EIGHT_BIT),
    Recipe("SD 1.5", "batch 1, checkpointing, no average", 1, True, False),
    Recipe("SD 1.5", "batch 4, checkpointing, ZeRO-1 over 4 GPUs, no average", 4, True, False, ranks_of_zero=4),
    Recipe("SD 1.5", "batch 4, checkpointing", 4, True),
    Recipe("SD 1.5", "batch 4", 4),
    Recipe("SD 1.5", "batch 8", 8),
    Recipe("SD 1.5", "batch 32", 32),
    Recipe("SD 1.5", "batch 32, ZeRO-1 over 8 GPUs", 32, ranks_of_zero=8),
    Recipe("SDXL", "batch 1, checkpointing, 8-bit AdamW, no average", 1, True, False, EIGHT_BIT),
    Recipe("SDXL", "batch 1, checkpointing, ZeRO-1 over 8 GPUs, no average", 1, True, False, ranks_of_zero=8),
    Recipe("SDXL", "batch 1, checkpointing, no average", 1, True, False),
    Recipe("SDXL", "batch 4, checkpointing", 4, True),
    Recipe("SDXL", "batch 4, checkpointing, ZeRO-1 over 8 GPUs", 4, True, ranks_of_zero=8),
    Recipe("SDXL", "batch 4", 4),
)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def first_stage(side: int) -> tuple[int, int, float]:
    """Counts the weights of encoder and decoder, and the FLOPs of encoding one image of `side` pixels."""
    from diffusers import AutoencoderKL

    levels = 4
    with FakeTensorMode():
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            latent_channels=4,
        )
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            vae.encoder(torch.zeros(1, 3, side, side))
    return count(vae.encoder), count(vae.decoder), counter.get_total_flops()


def text_encoder(sizes: dict[str, int]) -> tuple[int, float]:
    """Weights of a CLIP text encoder, and the FLOPs of one caption."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    settings = CLIPTextConfig(**sizes, num_attention_heads=sizes["hidden_size"] // 64, attn_implementation="sdpa")
    with torch.device("meta"):
        model = (CLIPTextModelWithProjection if "projection_dim" in sizes else CLIPTextModel)(settings)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(input_ids=torch.zeros(1, 77, dtype=torch.int64))
    return count(model), counter.get_total_flops()


@dataclass
class Counts:
    """What the table of a model is made of: weights, bytes saved for a backward pass of one image, TFLOP of one."""

    locked: int
    trained: int
    encoder: int
    decoder: int
    text: int
    saved: dict[bool, int]  # by whether activations are checkpointed
    encoding: float  # TFLOP of the first stage
    captions: float
    unet: float
    unet_encoder: float
    control: float

    @property
    def step(self) -> float:
        """TFLOP of a step on encoded shards: forward, and backward of the ControlNet and, to it, of the decoder."""
        return self.unet + (1 + BACKWARD) * self.control + (self.unet - self.unet_encoder)

    @property
    def share_of_encoded(self) -> float:
        """FLOPs of a step on encoded shards, of latents and states, over those of a step on images."""
        return self.step / (self.step + self.encoding + self.captions)


def measure(model: Model) -> Counts:
    saved = {}
    for checkpointing in (True, False):
        say(f"counting a step of {model.name} {'with' if checkpointing else 'without'} activation checkpointing")
        with fake_networks(lambda: ours(model, use_checkpoint=checkpointing)) as built:  # noqa: B023
            (both,) = built.modules
            locked, trained, saved[checkpointing] = count(both.unet), count(both.control), saved_bytes(built)

            def encode(x, timesteps, context, hint, extra, unet=both.unet):
                return unet.encode(x, timesteps, context, **extra[0])

            if not checkpointing:
                parts = (built.unet, encode, built.control)
                unet, unet_encoder, control = (flops(part, 1, model) / 1e12 for part in parts)
    encoder, decoder, encoding = first_stage(8 * model.side)
    texts = [text_encoder(sizes) for sizes in TEXT_ENCODERS[model.name]]
    text, captions = sum(weights for weights, _ in texts), sum(each for _, each in texts) / 1e12
    return Counts(
        locked, trained, encoder, decoder, text, saved, encoding / 1e12, captions, unet, unet_encoder, control
    )


def bytes_of(recipe: Recipe, found: Counts) -> dict[str, float]:
    return {
        "weights": 2 * found.locked + (4 + 2) * found.trained,  # autocast keeps a copy of the trained ones in bfloat16
        "gradients": 4 * found.trained,
        "optimizer": recipe.state_bytes * found.trained / recipe.ranks_of_zero,
        "average": 4 * found.trained if recipe.average else 0,
        "stages": 4 * found.decoder + 2 * found.encoder + 2 * found.text,  # decoding is in float32
        "activations": recipe.batch * found.saved[recipe.checkpointing],
    }


def table(found: dict[str, Counts]) -> str:
    parts = ("weights", "gradients", "optimizer", "average", "stages", "activations")
    lines = ["| recipe | " + " | ".join(parts) + " | GB in all |", "|" + " --- |" * (len(parts) + 2)]
    for recipe in (recipe for recipe in RECIPES if recipe.base in found):
        sizes = bytes_of(recipe, found[recipe.base])
        cells = [f"{sizes[part] / GB:.2f}" for part in parts]
        lines.append(f"| {recipe.base}: {recipe.name} | {' | '.join(cells)} | {sum(sizes.values()) / GB:.1f} |")
    return "\n".join(lines)


EXAMPLES = """
python -m benchmarks.training_memory --json memory.json
python -m benchmarks.training_memory --model sdxl
"""


def main(arguments: Iterable[str] | None = None) -> None:
    parser = command_parser("benchmarks.training_memory", __doc__, EXAMPLES)
    parser.add_argument("--model", choices=list(MODELS), help="count one model alone; by default all")
    parser.add_argument("--json", type=Path, help="file for what was counted")
    options = parser.parse_args(arguments)
    chosen = [MODELS[options.model]] if options.model else MODELS.values()
    found = {model.name: measure(model) for model in chosen}
    print(table(found))
    for name, counts in found.items():
        share = f"{counts.share_of_encoded:.2f}"
        print(f"\n{name}: FLOPs of a step on encoded shards are {share} of those of one on images")
    if options.json:
        counted = {name: asdict(counts) for name, counts in found.items()}
        options.json.write_text(json.dumps(counted, indent=1) + "\n")


if __name__ == "__main__":
    main()
