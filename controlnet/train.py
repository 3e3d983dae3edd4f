"""Trains a ControlNet.

    python -m controlnet.train --config FILE key=value ...
    torchrun --nproc_per_node N -m controlnet.train --config FILE key=value ...

The run itself is in `training/run.py`.
"""

import argparse
import logging
import os
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.errors import record

from controlnet.common import command
from controlnet.common.extras import quiet_libraries
from controlnet.training.run import run

EXAMPLES = """
one process:    python -m controlnet.train --config controlnet/configs/sd15_seg.yaml trainer.devices=auto \\
                    model.unet_config.from_pretrained=v1-5-pruned.ckpt data.train.dataset_path=[shards/wdinfo.pkl]
two processes:  torchrun --nproc_per_node 2 -m controlnet.train --config controlnet/configs/sd15_seg.yaml
on a CPU, now:  python -m controlnet.quickstart
"""


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command.parser("controlnet.train", "Trains a ControlNet.", EXAMPLES)
    parser.add_argument("--config", required=True, help=f"YAML file; shipped are {', '.join(command.shipped())}")
    command.add_overrides(parser)
    return command.parse(parser, argv)


@record
def main(argv: Sequence[str] | None = None) -> None:
    arguments = _arguments(argv)
    quiet_libraries()
    first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if first else logging.WARNING, format="%(message)s")
    run(arguments.config, arguments.overrides)


if __name__ == "__main__":
    main()
