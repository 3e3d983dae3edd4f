"""Runs fault-injection campaigns: all, or the given subjects.

    python -m tests.reliability --rounds N --seed S [SUBJECT ...]

A subject is a module of this folder with a function `campaign(rounds, seed)` that makes `rounds` faults from the seed
and returns how often each outcome came: {"survived": 998, ...}. Outcomes named by FAILURES are defects; with one of
them the exit status is 1, and `python -m tests.reliability --rounds N --seed S SUBJECT` makes the same faults again.

    python -m tests.reliability fuzz --seconds N [TARGET ...]

fuzzes the readers of files, guided by coverage: see `fuzz`.
"""

import importlib
import json
import pkgutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from cnkernels.progress import say
from controlnet.common.command import parser as command_parser
from tests.reliability import fuzz

FAILURES = ("lost", "raised", "hung", "accepted damage", "grows")


def subjects() -> dict[str, object]:
    """The modules of this folder that have a campaign, by name."""
    package = __package__ or "tests.reliability"
    names = sorted(module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    modules = {name: importlib.import_module(f"{package}.{name}") for name in names if name != "__main__"}
    return {name: module for name, module in modules.items() if hasattr(module, "campaign")}


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["fuzz"]:
        return fuzz.main(argv[1:])
    parser = command_parser("tests.reliability", __doc__, "python -m tests.reliability --rounds 20 --seed 1 manifests")
    parser.add_argument("--rounds", type=int, default=100, help="faults of each subject")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random")
    parser.add_argument("subjects", nargs="*", metavar="SUBJECT", help="modules of tests/reliability (default: all)")
    arguments = parser.parse_args(argv)
    known = subjects()
    unknown = [name for name in arguments.subjects if name not in known]
    if unknown or arguments.rounds < 1:
        parser.error(f"subjects {unknown} of {', '.join(known)}; rounds {arguments.rounds} of 1 or more")
    failed = False
    for name in arguments.subjects or known:
        begin = time.monotonic()
        say(f"{name}: {arguments.rounds} rounds")
        counts = dict(known[name].campaign(arguments.rounds, arguments.seed))
        row = {"subject": name, "rounds": arguments.rounds, "seed": arguments.seed, "counts": counts}
        print(json.dumps({**row, "seconds": round(time.monotonic() - begin, 1)}), flush=True)
        failed = failed or any(counts.get(kind) for kind in FAILURES)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
