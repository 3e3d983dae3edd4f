"""The command line of `python -m controlnet.shards`: makes the shards that training reads, and checks shards."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections import Counter
from collections.abc import Sequence

from controlnet.common import command
from controlnet.data.advice import cure
from controlnet.data.hints import HintReader
from controlnet.data.loader import read_extensions
from controlnet.data.samples import BadSample, check_sample
from controlnet.data.shards import DataError, Drop, index_shard, list_shards
from controlnet.data.sources import Wanted, list_source
from controlnet.data.writing import WDINFO, Making, Written, check_making, write, write_wdinfo

DESCRIPTION = "Makes the shards that training reads, and checks shards that are there."
EXAMPLES = """
KEY.jpg, KEY.txt, KEY.png in one folder:   python -m controlnet.shards data shards
hints in another folder, captions in a table:
                                           python -m controlnet.shards images shards --hints maps --table captions.csv
edges of the images as hints:              python -m controlnet.shards images shards --hint canny
maps of class ids, coloured:               python -m controlnet.shards images shards --hints ids --palette ade20k
any program that writes hints:             python -m controlnet.shards images shards \\
                                               --hint-command 'midas --in {image} --out {hint}'
what img2dataset downloaded:               python -m controlnet.shards laion shards --hint canny
what is wrong with shards:                 python -m controlnet.shards --check 'shards/*.tar'
"""


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command.parser(
        "controlnet.shards", "Makes the shards that training reads, and checks shards that are there.", EXAMPLES
    )
    add = parser.add_argument
    add("paths", nargs="+", metavar="PATH", help="a folder of images, or of img2dataset's tars, and the shards' folder")
    add(
        "--table",
        help="CSV, TSV, JSON or JSON lines: image (or file_name, target), caption (text, prompt), hint (source)",
    )
    add("--captions", metavar="FOLDER", help="where KEY.txt is (default: beside the image)")
    add("--caption", metavar="TEXT", help="of images without one, which are left out otherwise; may be empty")
    add("--hints", metavar="FOLDER", help="where the hint KEY.png, .jpg, .webp or .npy is (default: beside the image)")
    add("--hint", choices=("given", "canny"), default="given", help="canny computes edges from the image")
    add(
        "--canny",
        nargs=3,
        type=float,
        metavar=("SIGMA", "LOW", "HIGH"),
        default=(1.4, 0.1, 0.2),
        help="default %(default)s",
    )
    add(
        "--palette",
        metavar="NAME",
        help="hints are maps of class ids: colour them by ade20k, cocostuff, or a JSON or CSV",
    )
    add("--hint-command", metavar="COMMAND", help="writes the hint {hint} of the image {image}, a PNG")
    add("--hint-channels", type=_positive, default=3, metavar="N", help="of the ControlNet (default 3)")
    add("--shard-size", type=_positive, default=1000, metavar="N", help="samples of a shard (default 1000)")
    add("--workers", type=int, default=min(8, os.cpu_count() or 1), metavar="N", help="processes (default %(default)s)")
    add("--check", action="store_true", help="read every sample of the shards PATH ... and say what cannot be used")
    add("--ignored", nargs="+", default=[], metavar="EXT", help="for --check: data.train.ignored_extensions")
    arguments = parser.parse_args(argv)
    if not arguments.check and len(arguments.paths) != 2:
        parser.error(f"got {len(arguments.paths)} paths; expected a folder of images and a folder for the shards")
    if sum((arguments.hint == "canny", arguments.palette is not None, arguments.hint_command is not None)) > 1:
        parser.error("--hint canny, --palette and --hint-command exclude each other")
    return arguments


def _positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def make_shards(arguments: argparse.Namespace) -> int:
    """Writes the shards and says what they hold; the exit status."""
    source, folder = arguments.paths
    computed = arguments.hint == "canny" or arguments.hint_command is not None
    if computed and arguments.hints is not None:
        raise DataError("--hints is a folder of hints, but they are computed; leave one of the two out")
    kind = "canny" if arguments.hint == "canny" else "command" if arguments.hint_command else "given"
    kind = "labels" if arguments.palette is not None else kind
    hint = {"kind": "labels", "palette": arguments.palette} if kind == "labels" else None
    reader = HintReader.from_config(hint, arguments.hint_channels)
    making = Making(kind, reader, *arguments.canny, arguments.hint_command or "")
    check_making(making)
    wanted = Wanted(arguments.captions, arguments.caption, arguments.hints, computed)
    listing = list_source(source, arguments.table, wanted)
    print(f"{source}: {len(listing.items)} samples", flush=True)
    shards: list[Written] = []
    for shard in write(folder, listing.items, making, arguments.shard_size, max(0, arguments.workers)):
        shards.append(shard)
        print(f"{shard.name}: {shard.samples} samples, {len(shard.drops)} left out", flush=True)
    drops = [*listing.drops, *(drop for shard in shards for drop in shard.drops)]
    count = sum(shard.samples for shard in shards)
    print("\n".join(report(count, drops)))
    if not count:
        print(f"error: nothing of {source} can be a sample", file=sys.stderr)
        return 1
    write_wdinfo(folder, shards, arguments.shard_size)
    print(f"\n{os.path.join(folder, WDINFO)} lists the shards. To train on them:\n")
    print(train_command(folder, sum(shard.samples > 0 for shard in shards), arguments.hint_channels))
    return 0


def train_command(folder: str, shards: int, hint_channels: int) -> str:
    """The command that trains on the shards of a folder."""
    config = next(path for path in command.shipped() if path.endswith("sd15_seg.yaml"))
    lines = [
        f"python -m controlnet.train --config {shlex.quote(config)}",
        "data.train.dataset_path=" + shlex.quote(json.dumps([os.path.join(folder, WDINFO)])),
        f"data.webdataset.local_root_path=null data.num_workers={min(4, shards)}",
    ]
    if hint_channels != 3:
        lines.append(f"model.control_stage_config.hint_channels={hint_channels}")
    return " \\\n    ".join(lines)


def check_shards(arguments: argparse.Namespace) -> int:
    """Reads every sample of shards as training does and says what cannot be used; the exit status."""
    extensions, formats = read_extensions(None)
    hint = None if arguments.palette is None else {"kind": "labels", "palette": arguments.palette}
    reader = HintReader.from_config(hint, arguments.hint_channels)
    ignored = tuple(extension.lower().lstrip(".") for extension in arguments.ignored)
    count, drops, notes = 0, [], {}
    for path in list_shards(arguments.paths).paths:
        index = index_shard(path, extensions, ignored)
        drops.extend(index.drops)
        for sample in index.samples:
            of_sample: list[str] = []
            try:
                check_sample(sample, formats, reader, of_sample)
                count += 1
            except BadSample as bad:
                drops.append(Drop(str(bad), path, sample.key))
            for note in of_sample:
                notes.setdefault(note.partition(":")[0], f"{note} (first: {sample.key} in {path})")
    print("\n".join([*report(count, drops), *notes.values()]))
    return 1 if drops or not count else 0


def report(count: int, drops: Sequence[Drop]) -> list[str]:
    """A line for each reason, the commonest first, with an example and its cure."""
    lines = [f"{count} samples can be used, {len(drops)} cannot"]
    for reason, times in Counter(drop.reason for drop in drops).most_common():
        example = next(drop for drop in drops if drop.reason == reason)
        lines.append(f"  {times} x {reason}: for example {example.key or 'the tar itself'} in {example.shard}")
        if example.detail:
            lines[-1] += f" ({example.detail})"
        if cure(example):
            lines.append(f"      {cure(example)}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # names of files need not be text
    arguments = _arguments(argv)
    try:
        return check_shards(arguments) if arguments.check else make_shards(arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on after the last shard", file=sys.stderr)
        return 130
