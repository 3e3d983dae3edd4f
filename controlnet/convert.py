"""`python -m controlnet.convert SRC DST --format FORMAT`: one checkpoint format into another, bit for bit.

`controlnet.convert(src, dst, format)` is the same as a function; importing this module leaves that name callable.
"""

import argparse
import sys
from types import ModuleType
from typing import Any

from controlnet.checkpoints.convert import Conversion, convert
from controlnet.checkpoints.errors import CheckpointError
from controlnet.checkpoints.write import FORMATS


class _Callable(ModuleType):
    """A module that is called like the function of its name, since importing it hides that one in the package."""

    def __call__(self, *args: Any, **kwargs: Any) -> Conversion:
        return convert(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m controlnet.convert",
        description="Converts a ControlNet or Stable Diffusion checkpoint between the original's, diffusers' and NeMo's"
        " formats. What the source is, its keys tell.",
    )
    parser.add_argument("src", help="a checkpoint file, or a diffusers folder")
    parser.add_argument("dst", help="a .safetensors file (.ckpt or .nemo where wanted); for diffusers a new folder")
    parser.add_argument("--format", required=True, choices=FORMATS, help="nemo-1.23: the names of NeMo 1.23.0")
    heads = parser.add_mutually_exclusive_group()
    heads.add_argument("--num-heads", type=int, help="attention heads, where neither family nor config.json tells")
    heads.add_argument("--num-head-channels", type=int, help="channels of a head, likewise")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = parser().parse_args(arguments)
    named = {"num_heads": options.num_heads, "num_head_channels": options.num_head_channels}
    heads = {name: value for name, value in named.items() if value is not None}
    try:
        print(convert(options.src, options.dst, options.format, **heads))
    except (CheckpointError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
