"""Helpers for command lines: help with examples, shipped configurations, `key=value` settings, the last message."""

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        fail(f"{self.prog}: error: {message}", 2)


def fail(message: str, status: int = 1) -> NoReturn:
    """Ends the process with a message on standard error.

    Of the ranks of a job, torchrun prints a traceback of its own after that message, and as its last words what the
    first rank to fail left in the file TORCHELASTIC_ERROR_FILE: the message once more.
    """
    leave(message)
    if status == 1:
        sys.exit(message)  # which prints it
    print(message, file=sys.stderr, flush=True)
    sys.exit(status)


def leave(message: str) -> None:
    """Leaves the message for torchrun, in the form of its own `record`; does nothing without torchrun."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError):  # it was said; the file is a courtesy
            Path(file).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}), encoding="utf-8")


def shipped() -> list[str]:
    """Returns the paths of the configurations that come with the package, for --config."""
    folder = Path(__file__).parents[1] / "configs"
    here = Path.cwd()
    inside = folder.is_relative_to(here)
    return [str(path.relative_to(here) if inside else path) for path in sorted(folder.glob("*.yaml"))]


def parser(module: str, description: str, examples: str) -> argparse.ArgumentParser:
    """Makes a parser whose --help ends with the examples, not rewrapped."""
    return _Parser(
        prog=f"python -m {module}",
        description=description,
        epilog="examples:\n" + "\n".join("  " + line for line in examples.strip().splitlines()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Adds `key=value ...`, which is `overrides` of the result."""
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings that replace the file's, such as trainer.precision=bf16 (python -m controlnet.config lists all)",
    )


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the arguments; settings may stand between options. Exits with a message for a word that is neither."""
    arguments, rest = parser.parse_known_args(argv)
    for word in rest:
        name = word.partition("=")[0]
        if word.startswith("-") and "." in name:
            parser.error(f"{word} is a setting of the configuration; write {word.lstrip('-')}, without dashes")
        if word.startswith("-"):
            parser.error(f"{word} is not known; expected an option of --help, or a setting key=value")
    arguments.overrides = [*arguments.overrides, *rest]
    for word in arguments.overrides:
        if "=" not in word:
            parser.error(f"{word} is not known; expected a setting key=value")
    return arguments
