"""The command line of `python -m controlnet.convert`."""

import argparse
import sys

from controlnet.checkpoints.convert import convert
from controlnet.checkpoints.errors import CheckpointError
from controlnet.checkpoints.write import FORMATS
from controlnet.common import command

EXAMPLES = """
python -m controlnet.convert runs/mine out --format diffusers
python -m controlnet.convert out mine.safetensors --format original
python -m controlnet.convert controlnet.nemo control.safetensors --format original
"""


def parser() -> argparse.ArgumentParser:
    parser = command.parser(
        "controlnet.convert",
        "Converts a ControlNet or Stable Diffusion checkpoint between the original's, diffusers' and NeMo's formats."
        " What the source is, its keys tell.",
        EXAMPLES,
    )
    parser.add_argument("src", help="a checkpoint file, a diffusers folder, or the folder of a training run")
    parser.add_argument("dst", help="a .safetensors file (.ckpt or .nemo where wanted); for diffusers a new folder")
    parser.add_argument("--format", required=True, choices=FORMATS, help="nemo-1.23: the names of NeMo 1.23.0")
    heads = parser.add_mutually_exclusive_group()
    heads.add_argument("--num-heads", type=int, help="attention heads, where neither family nor config.json tells")
    heads.add_argument("--num-head-channels", type=int, help="channels of a head, likewise")
    parser.add_argument("--base", help="checkpoint of the U-Net that a 'difference' ControlNet or Control-LoRA adds to")
    parser.add_argument(
        "--no-average", action="store_true", help="of a run, take the weights themselves, not their average"
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = parser().parse_args(arguments)
    named = {"num_heads": options.num_heads, "num_head_channels": options.num_head_channels}
    heads = {name: value for name, value in named.items() if value is not None}
    try:
        done = convert(
            options.src, options.dst, options.format, base=options.base, average=not options.no_average, **heads
        )
    except (CheckpointError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(done)
    return 0
