"""Progress of commands that take long, on standard error, so that standard output stays a table or JSON."""

import sys
import time

SECONDS = 10.0  # between two lines where standard error is no terminal


class Progress:
    """A line "7/40 what, 12 s left": rewritten at each step on a terminal, printed every ten seconds elsewhere.

    Args:
        count: steps in all.
    """

    def __init__(self, count: int):
        self.count = count
        self.begin = self.printed = time.monotonic()

    def __call__(self, done: int, what: object) -> None:
        """Reports `done` finished steps, and what the next one is (or the last was, when all are done)."""
        now = time.monotonic()
        left = f", {(now - self.begin) / done * (self.count - done):.0f} s left" if 0 < done < self.count else ""
        line = f"{done}/{self.count} {what}{left}"
        if sys.stderr.isatty():
            print(f"\r\033[K{line}", end="\n" if done == self.count else "", file=sys.stderr, flush=True)
        elif now - self.printed >= SECONDS:
            self.printed = now
            print(line, file=sys.stderr, flush=True)


def say(what: object) -> None:
    """Prints a line at once: for a command of a few long steps, before each."""
    print(what, file=sys.stderr, flush=True)
