"""What a training run reports: progress, rows of metrics, pictures. A failure to write them does not end the run."""

import contextlib
import logging
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image

from controlnet.training.distributed import World
from controlnet.training.loggers import Log, open_logs

if TYPE_CHECKING:
    from omegaconf import DictConfig

logger = logging.getLogger(__name__)


class Reporter:
    """Progress, metrics and pictures of a run: a context manager on every rank, which writes on rank 0.

    What cannot be written is a warning, once for each kind: a run that can still save goes on.

    Args:
        folder: of the run.
        world: this rank.
        cfg: the whole configuration.
        step, images_seen: where the run starts or is taken up.
    """

    def __init__(self, folder: Path, world: World, cfg: "DictConfig", step: int, images_seen: int):
        from omegaconf import OmegaConf  # optional packages
        from tqdm import tqdm

        self.folder, self.world = folder, world
        self._timing = cfg.exp_manager.log_step_timing
        self._logs: list[Log] = []
        self._warned: set[str] = set()
        if world.is_first:
            settings = OmegaConf.to_container(cfg)
            self._try("metrics", lambda: self._logs.extend(open_logs(folder, cfg.exp_manager, settings, step)))
        self._shown = world.is_first and cfg.trainer.enable_progress_bar
        total = cfg.trainer.max_steps
        # disable=None: a bar on a terminal, lines (see `row`) in a log file.
        self._bar = tqdm(
            total=total if total >= 0 else None, initial=step, unit="step", disable=None if self._shown else True
        )
        self._start_window(step, images_seen)

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        for log in self._logs:
            self._try(type(log).__name__, log.close)

    def _try(self, what: str, work: Callable[[], None]) -> None:
        """Calls `work`; an OSError, such as a full disk, becomes a warning, once for each `what`."""
        try:
            work()
        except OSError as error:
            if what not in self._warned:
                self._warned.add(what)
                logger.warning("%s cannot be written, training goes on: %s", what, error)

    def _start_window(self, step: int, images_seen: int) -> None:
        self._window_start, self._paused, self._waited = time.monotonic(), 0.0, 0.0
        self._window_step, self._window_images = step, images_seen

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leaves the time spent within it out of samples_per_second."""
        start = time.monotonic()
        yield
        self._paused += time.monotonic() - start

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Counts the time spent within it as that of the data pipeline."""
        start = time.monotonic()
        yield
        self._waited += time.monotonic() - start

    def advance(self) -> None:
        """One step on the progress bar."""
        self._bar.update(1)

    def record(self, name: str, line: str) -> None:
        """Appends a line to a file of the run; on every rank."""

        def append() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / name, "a", encoding="utf-8") as file:
                file.write(line + "\n")

        self._try(name, append)

    def value(self, step: int, name: str, value: float) -> None:
        """Writes one metric by itself."""
        self._write({"step": step, name: value})
        if self._shown and self._bar.disable:
            logger.info("step %d: %s %.4g", step, name, value)

    def row(self, step: int, images_seen: int, values: Mapping[str, float]) -> None:
        """Writes metrics, with the speed since the last row and the peak memory."""
        seconds = max(time.monotonic() - self._window_start - self._paused, 1e-9)
        speed, steps = (images_seen - self._window_images) / seconds, max(step - self._window_step, 1)
        timing = {"step_seconds": seconds / steps, "data_seconds": self._waited / steps} if self._timing else {}
        measured = {"samples_per_second": speed, **timing, "peak_memory_gib": peak_memory_gib(self.world.device)}
        if self.world.is_first:
            self._write({"step": step, "images_seen": images_seen, **values, **measured})
            names = ("loss", "lr", "control_sensitivity")
            shown = {key: f"{values[key]:.4g}" for key in names if key in values}
            self._bar.set_postfix(shown)
            if self._bar.disable and self._shown:
                text = " ".join(f"{key} {value}" for key, value in shown.items())
                logger.info("step %d: %s samples_per_second %.4g", step, text, speed)
        self._start_window(step, images_seen)

    def _write(self, row: Mapping[str, float]) -> None:
        for log in self._logs:
            self._try(f"metrics ({type(log).__name__})", lambda log=log: log.write(row))

    def picture(self, step: int, picture: Image.Image, problem: str | None) -> None:
        """Writes a grid of samples to images/ and the other logs, and a warning when they show nothing."""
        for log in self._logs:
            self._try(f"pictures ({type(log).__name__})", lambda log=log: log.picture("samples", picture, step))
        if problem is not None and self.world.is_first:
            logger.warning("step %d: %s (%s)", step, problem, self.folder / "images" / f"step-{step:08d}.png")


def peak_memory_gib(device: torch.device) -> float:
    """The most memory used so far: of the GPU by PyTorch's allocator, on a CPU resident in the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux reports KiB
