"""What a training run reports: metrics.jsonl, TensorBoard, and whether the model listens to its hint."""

import contextlib
import json
import logging
import os
import resource
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from controlnet.model.controlled import ControlledUNet
from controlnet.training.distributed import World

logger = logging.getLogger(__name__)


class MetricLog:
    """Rows of numbers by optimizer step, appended to metrics.jsonl and to TensorBoard's event files.

    Arguments:
        folder: of the run; holds metrics.jsonl and tensorboard/.
        resumed_step: rows of later steps, left by a run that went on after its last checkpoint, are dropped.
        tensorboard: whether to write event files (needs the tensorboard package).
    """

    def __init__(self, folder: Path, resumed_step: int = 0, tensorboard: bool = True):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        self._drop_after(resumed_step)
        self._board = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError(
                    "exp_manager.create_tensorboard_logger is true but TensorBoard is not installed:"
                    " pip install tensorboard, or set exp_manager.create_tensorboard_logger=False"
                ) from error
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_step + 1)

    def _drop_after(self, step: int) -> None:
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # a line that was being written when the machine stopped
                continue
            if row["step"] <= step:
                kept.append(line + "\n")
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, self.path)

    def write(self, row: Mapping[str, float]) -> None:
        """Appends a row; `step` is its key."""
        # JSON has no NaN; a metric that is not finite is null, which every reader takes.
        finite = {key: value if value == value and abs(value) != float("inf") else None for key, value in row.items()}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(finite) + "\n")
        if self._board is not None:
            for key, value in row.items():
                if key != "step":
                    self._board.add_scalar(key, value, int(row["step"]))

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        """Shows a picture in TensorBoard."""
        if self._board is not None:
            self._board.add_image(name, np.asarray(picture), step, dataformats="HWC")

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


class Reporter:
    """Progress, metrics and pictures of a run: a context manager on every rank, which writes on rank 0.

    Arguments:
        folder: of the run.
        world: this rank.
        cfg: the whole configuration.
        step, images_seen: where the run starts or is taken up.
    """

    def __init__(self, folder: Path, world: World, cfg: Mapping[str, Any], step: int, images_seen: int):
        self.folder, self.world = folder, world
        self._log = None
        if world.is_first:
            self._log = MetricLog(folder, step, cfg["exp_manager"]["create_tensorboard_logger"])
        self._shown = world.is_first and cfg["trainer"]["enable_progress_bar"]
        from tqdm import tqdm  # an optional package

        total = cfg["trainer"]["max_steps"]
        # disable=None: a bar on a terminal, lines (see `row`) in a log file.
        self._bar = tqdm(
            total=total if total >= 0 else None, initial=step, unit="step", disable=None if self._shown else True
        )
        self._start_window(images_seen)

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        if self._log is not None:
            self._log.close()

    def _start_window(self, images_seen: int) -> None:
        self._window_start, self._window_images, self._paused = time.monotonic(), images_seen, 0.0

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leaves the time spent within it out of samples_per_second."""
        start = time.monotonic()
        yield
        self._paused += time.monotonic() - start

    def advance(self) -> None:
        """One step on the progress bar."""
        self._bar.update(1)

    def row(self, step: int, images_seen: int, values: Mapping[str, float]) -> None:
        """Writes metrics, with the speed since the last row and the peak memory."""
        seconds = max(time.monotonic() - self._window_start - self._paused, 1e-9)
        speed = (images_seen - self._window_images) / seconds
        memory = peak_memory_gib(self.world.device)
        if self._log is not None:
            self._log.write(
                {
                    "step": step,
                    "images_seen": images_seen,
                    **values,
                    "samples_per_second": speed,
                    "peak_memory_gib": memory,
                }
            )
            shown = {key: f"{values[key]:.4g}" for key in ("loss", "lr", "control_sensitivity")}
            self._bar.set_postfix(shown)
            if self._bar.disable and self._shown:
                text = " ".join(f"{key} {value}" for key, value in shown.items())
                logger.info("step %d: %s samples_per_second %.4g", step, text, speed)
        self._start_window(images_seen)

    def picture(self, step: int, picture: Image.Image, problem: str | None) -> None:
        """Writes a grid of samples to images/, and a warning when they show nothing."""
        if self._log is None:
            return
        path = self.folder / "images" / f"step-{step:08d}.png"
        path.parent.mkdir(exist_ok=True)
        picture.save(path)
        self._log.picture("samples", picture, step)
        if problem is not None:
            logger.warning("step %d: %s (%s)", step, problem, path)


@torch.no_grad()
def control_sensitivity(model: ControlledUNet, x: Tensor, timesteps: Tensor, context: Tensor, hint: Tensor) -> Tensor:
    """How much the prediction changes when the hint is removed: 0 is a model that ignores its control.

    |prediction(hint) - prediction(none)| / |prediction(none)|, Frobenius norms over the batch; a float32 scalar.
    It is exactly 0 before the first update, since the zero convolutions are, and for a U-Net that predicts nothing.
    """
    training = model.training
    model.eval()
    free = model(x, timesteps, context).float()
    controlled = model(x, timesteps, context, hint).float()
    model.train(training)
    return (controlled - free).norm() / free.norm().clamp_min(torch.finfo(torch.float32).tiny)


def peak_memory_gib(device: torch.device) -> float:
    """The most memory used so far: of the GPU by PyTorch's allocator, on a CPU resident in the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux reports KiB
