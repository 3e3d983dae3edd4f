"""Counts memory and FLOPs of a training step by recipe: `python -m benchmarks.training_memory [--model sdxl]`.

Counted on fake tensors, without a device: SD 1.5 at 512x512 or SDXL at 1024x1024, bfloat16, the U-Net locked. Weights
(with autocast's copies), gradients, state of the optimizer, average, frozen stages, and what autograd keeps for the
backward pass. Not counted: workspaces of single operations, the allocator's rounding, and the CUDA context, together 1
to 2 GB. The last line is what encoded shards (`python -m controlnet.encode`) leave of the FLOPs of a step.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.device_free import MODELS, Model, fake_networks, flops, ours, saved_bytes
from cnkernels.progress import say
from controlnet.common.command import parser as command_parser

GB = 1e9
# Weights of the text encoders: CLIP ViT-L/14's, for SDXL with OpenCLIP ViT-bigG/14's beside it.
TEXT_ENCODERS = {"sd15": 123_060_480, "sdxl": 123_060_480 + 694_659_840}
BACKWARD = 2  # of a product's FLOPs forward, for both gradients; the locked encoder has none, the decoder one


@dataclass(frozen=True)
class Recipe:
    """A way to train a ControlNet, on one GPU of `ranks`."""

    name: str
    batch: int
    checkpointing: bool = False
    average: bool = True
    state_bytes: float = 8.0  # of the optimizer, a weight
    ranks_of_zero: int = 1
    encoded: bool = False


RECIPES = (
    Recipe("batch 1, checkpointing, 8-bit AdamW, no average, encoded shards", 1, True, False, 2.0, 1, True),
    Recipe("batch 1, checkpointing, no average, encoded shards", 1, True, False, encoded=True),
    Recipe("batch 4, checkpointing", 4, True),
    Recipe("batch 4", 4),
    Recipe("batch 8", 8),
    Recipe("batch 32", 32),
    Recipe("batch 32, ZeRO-1 over 8 GPUs", 32, ranks_of_zero=8),
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


def measure(name: str) -> dict[str, object]:
    """Counts everything in the table of one of `MODELS`."""
    model: Model = MODELS[name]
    found: dict[str, object] = {"text": TEXT_ENCODERS[name]}
    for checkpointing in (False, True):
        say(f"counting a training step {'with' if checkpointing else 'without'} activation checkpointing")
        with fake_networks(lambda: ours(model, use_checkpoint=checkpointing)) as built:  # noqa: B023
            (controlled,) = built.modules
            found["locked"], found["trained"] = count(controlled.unet), count(controlled.control)
            found[f"saved, checkpointing {checkpointing}"] = saved_bytes(built)
            if not checkpointing:
                unet, control = (flops(network, 1, model) for network in (built.unet, built.control))
    encoder, decoder, encoding = first_stage(8 * model.side)
    found |= {"encoder": encoder, "decoder": decoder, "TFLOP, encoding": encoding / 1e12}
    found |= {"TFLOP, U-Net": unet / 1e12, "TFLOP, ControlNet": control / 1e12}
    return found


def bytes_of(recipe: Recipe, found: dict[str, object]) -> dict[str, float]:
    trained, locked = found["trained"], found["locked"]
    stages = found["decoder"] * 4 + (0 if recipe.encoded else found["encoder"] * 2)
    return {
        "weights": 2 * locked + (4 + 2) * trained,  # autocast keeps a copy of the trained ones in bfloat16
        "gradients": 4 * trained,
        "optimizer": recipe.state_bytes * trained / recipe.ranks_of_zero,
        "average": 4 * trained if recipe.average else 0,
        "stages": stages + 2 * found["text"],
        "activations": recipe.batch * found[f"saved, checkpointing {recipe.checkpointing}"],
    }


def table(found: dict[str, object]) -> str:
    parts = ("weights", "gradients", "optimizer", "average", "stages", "activations")
    lines = ["| recipe | " + " | ".join(parts) + " | GB in all |", "|" + " --- |" * (len(parts) + 2)]
    for recipe in RECIPES:
        sizes = bytes_of(recipe, found)
        cells = [f"{sizes[part] / GB:.2f}" for part in parts]
        lines.append(f"| {recipe.name} | " + " | ".join(cells) + f" | {sum(sizes.values()) / GB:.1f} |")
    return "\n".join(lines)


def share_of_encoded(found: dict[str, object]) -> float:
    """Returns the FLOPs of a step on encoded shards, divided by those of a step on images."""
    # Forward: U-Net and ControlNet. Backward: both gradients of the ControlNet, that of the activations in the decoder,
    # which is somewhat more than half of the U-Net.
    decoder = 0.55 * found["TFLOP, U-Net"]
    step = found["TFLOP, U-Net"] + (1 + BACKWARD) * found["TFLOP, ControlNet"] + decoder
    return step / (step + found["TFLOP, encoding"])


EXAMPLES = """
python -m benchmarks.training_memory --json memory.json
python -m benchmarks.training_memory --model sdxl
"""


def main(arguments: Iterable[str] | None = None) -> None:
    parser = command_parser("benchmarks.training_memory", __doc__, EXAMPLES)
    parser.add_argument("--model", choices=list(MODELS), default="sd15")
    parser.add_argument("--json", type=Path, help="file for what was counted")
    options = parser.parse_args(arguments)
    found = measure(options.model)
    print(table(found))
    print(f"\nFLOPs of a step on encoded shards: {share_of_encoded(found):.2f} of one on images")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
