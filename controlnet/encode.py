"""Turns shards of images into shards of latents and text, so that training computes neither again.

    python -m controlnet.encode --config FILE --output FOLDER [--text tokens|states] key=value ...
    torchrun --nproc_per_node N -m controlnet.encode ...

Reads data.train of the configuration. Afterwards data.train.dataset_path=FOLDER/{...}.tar trains on what was encoded.
The same command goes on after an interruption: a shard is whole or not there. A random crop cannot be encoded.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import record

from controlnet.common import command
from controlnet.common.extras import quiet_libraries
from controlnet.training.encoding import encode

EXAMPLES = """
python -m controlnet.encode --config controlnet/configs/sd15_seg.yaml --output encoded \\
    data.train.dataset_path=[shards/wdinfo.pkl]
torchrun --nproc_per_node 2 -m controlnet.encode --config controlnet/configs/sd15_seg.yaml --output encoded
python -m controlnet.train --config controlnet/configs/sd15_seg.yaml data.train.dataset_path='encoded/*.tar'
"""


@record
def main(argv: Sequence[str] | None = None) -> None:
    parser = command.parser("controlnet.encode", __doc__.split("\n")[0], EXAMPLES)
    parser.add_argument("--config", required=True, help=f"YAML file; shipped are {', '.join(command.shipped())}")
    parser.add_argument("--output", required=True, type=Path, help="folder of the encoded shards")
    parser.add_argument("--text", choices=("tokens", "states"), default="tokens", help="how captions are stored")
    command.add_overrides(parser)
    arguments = command.parse(parser, argv)
    quiet_libraries()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    encode(arguments.config, arguments.output, arguments.overrides, states=arguments.text == "states")


if __name__ == "__main__":
    main()
