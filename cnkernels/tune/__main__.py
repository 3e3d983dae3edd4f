"""Measures which backend is fastest here: python -m cnkernels.tune [--shapes sd15,sdxl] [--record SCRIPT]

Every backend that serves a call, PyTorch's own kernels among them, forward and backward, on Stable Diffusion's shapes
or on those that a script of yours computes; and other tile sizes and numbers of warps of the Triton kernels, once they
have passed the accuracy rule. Backends that `python -m cnkernels.check` found wrong are left out. The choices are kept
in the cache, keyed by GPU, driver and versions, and `auto` follows them. It can be interrupted.

example: python -m cnkernels.tune --shapes sd15 --dtype float16
"""

import argparse
import json
import logging
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from cnkernels import cache, machine, timing, tuning
from cnkernels.check import emulation
from cnkernels.configurations import Configuration
from cnkernels.progress import Progress
from cnkernels.tune import MODELS, Call, missing, of_model, record, tune

DTYPES = ("float16", "bfloat16", "float32")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cnkernels.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shapes", help=f"models whose shapes to measure, of {', '.join(MODELS)}; default: sd15, --emulated: tiny"
    )
    parser.add_argument("--record", type=Path, metavar="SCRIPT", help="measure the calls of a script instead")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="default: float16 and bfloat16; on a CPU all")
    parser.add_argument("--batch", type=_positive, default=2, help="images in a batch (default 2: one with guidance)")
    parser.add_argument("--training", action="store_true", help="backward passes, too")
    parser.add_argument("--again", action="store_true", help="also what was measured before")
    parser.add_argument("--rounds", type=_positive, default=timing.ROUNDS, help="turns of each backend")
    parser.add_argument("--backends-only", action="store_true", help="launch each backend's kernels by rule alone")
    parser.add_argument(
        "--emulated",
        action="store_true",
        help="try it without a GPU: the GPU kernels on the CPU, one candidate of each rule; kept apart, and of no use",
    )
    parser.add_argument(
        "--ship", type=Path, nargs="?", const=tuning.FOLDER, metavar="FOLDER",
        help="write what was measured as a table to be shipped for this GPU (default folder: the package's own)",
    )  # fmt: skip
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    logging.basicConfig(format="%(message)s")
    options = parser().parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() and not options.emulated else "cpu")
    if options.emulated:
        missing_kernels = emulation.prepare()
        if missing_kernels:
            print(f"the CUDA kernels are left out: {missing_kernels}")
    if machine.too_old(device):
        print(machine.too_old(device))
    most = 0 if options.backends_only else 1 if options.emulated else None
    try:
        calls = _calls(options, device)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    todo = list(calls) if options.again else missing(calls, device, launches=most != 0)
    print(f"{len(calls)} kinds of call, {len(calls) - len(todo)} of them measured before")
    progress = Progress(len(todo))
    try:
        made = tune(
            todo,
            device,
            rounds=options.rounds,
            emulated=options.emulated,
            most=most,
            progress=lambda done, _, call: progress(done, call),
        )
        if todo:
            progress(len(todo), "measured")
    except KeyboardInterrupt:
        print("interrupted: what was measured is kept", file=sys.stderr)
        return 130
    for entry in made:
        best = entry["seconds"][entry["backend"]]
        others = ", ".join(f"{name} {s / best:.2f}" for name, s in entry["seconds"].items() if name != entry["backend"])
        where = f"{entry['op']} {entry['dtype']} {entry['direction']}, {entry['size']} elements"
        print(f"{where}: {entry['backend']} {best * 1e6:.1f} us{f' (times it: {others})' if others else ''}")
        for backend, configuration in entry.get("configurations", {}).items():
            gain = entry["by_rule"][backend] / entry["seconds"][backend]
            print(f"  {backend}, {gain:.2f} times as fast as by rule: {_in_words(configuration)}")
    print(f"kept in {cache.path(machine.identity(device))}")
    if options.ship:
        print(f"table in {ship(device, options.ship)}")
    return 0


def _in_words(configuration: Configuration) -> str:
    rules = (f"{name}: {', '.join(f'{k} {v}' for k, v in fields.items())}" for name, fields in configuration.items())
    return "; ".join(rules)


def _calls(options: argparse.Namespace, device: torch.device) -> Sequence[Call]:
    """Raises ValueError for a model that is not known, and for a script that fails or calls none of the ops."""
    if options.record:
        try:
            with record() as calls:
                runpy.run_path(str(options.record), run_name="__main__")
        except (Exception, SystemExit) as error:
            raise ValueError(f"--record {options.record} raised {type(error).__name__}: {error}") from error
        if not calls:
            raise ValueError(f"--record {options.record} calls none of cnkernels' ops")
        return calls
    names = (options.shapes or ("tiny" if options.emulated else "sd15")).split(",")
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        raise ValueError(f"--shapes {', '.join(unknown)}: expected some of {', '.join(MODELS)}")
    dtypes = options.dtype or (DTYPES[:2] if device.type == "cuda" else DTYPES)
    calls = [
        call
        for name in names
        for dtype in dtypes
        for call in of_model(name, getattr(torch, dtype), options.training, options.batch)
    ]
    return list(dict.fromkeys(calls))


def ship(device: torch.device, folder: Path) -> Path:
    """Writes the choices of the user's cache as a table that the package may ship for this GPU; returns the file."""
    identity = machine.identity(device)
    table = {"identity": identity, "choices": cache.read(identity)["choices"]}
    file = folder / tuning.file_name(identity["device"])
    file.write_text(json.dumps(table, indent=1) + "\n")
    return file


if __name__ == "__main__":
    sys.exit(main())
