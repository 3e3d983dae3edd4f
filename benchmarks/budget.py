"""Enforces time limits: of a whole run, and of one provider of one case, whose compilation may take minutes."""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

from cnkernels.timing import Interrupted

NOT_REACHED = "not reached within the budget"
AGAIN = 5.0  # seconds after which a provider that caught the first interruption is interrupted again


class OverBudget(Interrupted):
    """Raised inside a provider that took too long."""


class Budget:
    """The seconds that a run may take, and that one provider may take until its first result."""

    def __init__(self, seconds: float = math.inf, each: float = math.inf):
        self.end = time.monotonic() + seconds
        self.each = each

    def left(self) -> float:
        return self.end - time.monotonic()

    @contextmanager
    def provider(self, each: float | None = None) -> Iterator[None]:
        """Interrupts the block when it takes longer than `each` seconds or than is left; in the main thread only.

        Raises:
            OverBudget: with the reason that goes into the provider's row. It comes when Python's interpreter next has
                control: a single long call of a library is not cut short.
        """
        allowed = min(self.each if each is None else each, self.left())
        if allowed <= 0:
            raise OverBudget(NOT_REACHED)
        if allowed == math.inf:
            yield
            return

        def stop(signum, frame):
            raise OverBudget(f"stopped: not ready within its budget of {allowed:.3g} s")

        before = signal.signal(signal.SIGALRM, stop)
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, allowed, AGAIN)
                yield
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        finally:  # twice, for an alarm that arrives inside the first
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
