"""Lists every key of a configuration, or checks a file and prints all its values: `python -m controlnet.config`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from controlnet import config
from controlnet.common import command
from controlnet.config.reference import markdown

EXAMPLES = """
python -m controlnet.config | less
python -m controlnet.config controlnet/configs/sd15_seg.yaml trainer.precision=bf16
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = command.parser("controlnet.config", "Lists every key of a configuration, or checks a file.", EXAMPLES)
    parser.add_argument("file", nargs="?", type=Path, help=f"YAML file; shipped are {', '.join(command.shipped())}")
    command.add_overrides(parser)
    arguments = command.parse(parser, argv)
    if arguments.file is None:
        print(markdown())
        return 0
    try:
        cfg = config.load(arguments.file, arguments.overrides)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    from omegaconf import OmegaConf

    print(OmegaConf.to_yaml(cfg))
    return 0


if __name__ == "__main__":
    sys.exit(main())
