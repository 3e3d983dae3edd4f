"""`model.inductor`: compiles the training step with TorchInductor, and logs the progress of the compilation."""

import contextlib
import logging
import threading
import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)


def compile_parts(*parts: nn.Module, cudagraphs: bool) -> None:
    """Sets modules to be compiled at their first call, in place; `cudagraphs` is Inductor's mode reduce-overhead."""
    for part in parts:
        part.compile(mode="reduce-overhead" if cudagraphs else None)


def mark_sizes(*images: Tensor) -> None:
    """Marks height and width of [N, C, H, W] as varying, so that all aspect buckets share one compilation.

    Without the mark the first size would be compiled as a constant, and everything once more at the second one.
    """
    for image in images:
        torch._dynamo.maybe_mark_dynamic(image, (2, 3))


@contextlib.contextmanager
def announced(every: float = 30.0) -> Iterator[None]:
    """Logs that the work within it compiles the training step: at its start, each `every` seconds, and at its end."""
    begin, ended = time.monotonic(), threading.Event()

    def report() -> None:
        while not ended.wait(every):
            logger.info("still compiling the training step: %.0f s so far", time.monotonic() - begin)

    logger.info("compiling the training step, once, which takes minutes; a signal ends the run at once meanwhile")
    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    logger.info("compiled the training step in %.0f s", time.monotonic() - begin)
