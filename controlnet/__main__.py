"""Lists the commands of the package and the shipped configurations: `python -m controlnet`."""

import importlib.util
import sys

from controlnet.common.command import parser, shipped

ENTRIES = {
    "train": "train a ControlNet on shards of images, hints and captions",
    "generate": "draw images with a trained ControlNet",
    "convert": "one checkpoint format into another: original, diffusers, NeMo",
    "shards": "a folder of images into shards",
    "encode": "compute latents and text states of shards ahead of training",
    "config": "every key of a configuration; or check a file",
    "quickstart": "train a small ControlNet on a CPU in minutes, and see whether it obeys",
}
KERNELS = {
    "env": "what is installed, and which kernels run here",
    "check": "whether the kernels are right on this machine",
    "tune": "which kernels are fastest on this machine",
}
EXAMPLES = """
python -m controlnet.train --help
python -m controlnet.quickstart
python -m cnkernels.env
"""


def text() -> str:
    there = {name: what for name, what in ENTRIES.items() if importlib.util.find_spec(f"controlnet.{name}")}
    lines = [f"  python -m controlnet.{name:<11} {what}" for name, what in there.items()]
    lines += [f"  python -m cnkernels.{name:<12} {what}" for name, what in KERNELS.items()]
    files = [f"  {path}" for path in shipped()]
    return "\n".join(["Commands; each has --help:", *lines, "", "Configurations to start from:", *files])


def main() -> int:
    help_of = parser("controlnet", text(), EXAMPLES)
    help_of.parse_args()
    help_of.print_help()
    return 0


if __name__ == "__main__":
    sys.exit(main())
