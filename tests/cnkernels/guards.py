"""Asserts that kernels write only inside their outputs, by the guards of `cnkernels.check`."""

from collections.abc import Iterator
from contextlib import contextmanager

from cnkernels.check.guards import guarded


@contextmanager
def guarded_empty() -> Iterator[None]:
    """Inside the block, what torch.empty and torch.empty_like return is guarded; leaving it asserts that it held."""
    with guarded() as faults:
        yield
    assert not faults, faults[0]
