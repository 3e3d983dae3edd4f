"""Where metrics and pictures go: metrics.jsonl, TensorBoard's event files, Weights & Biases."""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

logger = logging.getLogger(__name__)


class Log(Protocol):
    """One place for metrics. Its methods may raise OSError when the disk does not take them."""

    def write(self, row: Mapping[str, float]) -> None:
        """Takes a row of numbers, whose `step` is its key."""

    def picture(self, name: str, picture: Image.Image, step: int) -> None: ...

    def close(self) -> None: ...


class MetricLog:
    """Rows of numbers by optimizer step, appended to metrics.jsonl.

    Args:
        folder: of the run.
        resumed_step: rows of later steps, left by a run that went on after its last checkpoint, are dropped.
    """

    def __init__(self, folder: Path, resumed_step: int = 0):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        self._drop_after(resumed_step)

    def _drop_after(self, step: int) -> None:
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # a line that was being written when the machine stopped
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int) and row["step"] <= step:
                kept.append(line + "\n")
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, self.path)

    def write(self, row: Mapping[str, float]) -> None:
        # JSON has no NaN: a metric that is not finite is written as null.
        finite = {key: value if value == value and abs(value) != float("inf") else None for key, value in row.items()}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(finite) + "\n")

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        path = self.path.parent / "images" / f"step-{step:08d}.png"
        path.parent.mkdir(exist_ok=True)
        picture.save(path)

    def close(self) -> None:
        pass


class TensorBoardLog:
    """Event files in tensorboard/.

    Raises:
        ImportError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path, resumed_step: int = 0):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "exp_manager.create_tensorboard_logger is true but TensorBoard is not installed:"
                " pip install tensorboard, or set exp_manager.create_tensorboard_logger=False"
            ) from error
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_step + 1)

    def write(self, row: Mapping[str, float]) -> None:
        for key, value in row.items():
            if key != "step":
                self._board.add_scalar(key, value, int(row["step"]))

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        self._board.add_image(name, np.asarray(picture), step, dataformats="HWC")

    def close(self) -> None:
        self._board.close()


class WandbLog:
    """Weights & Biases. Without a login the run is kept offline in wandb/, after one line that says so.

    Args:
        folder: of the run.
        options: `exp_manager.wandb_logger_kwargs`: arguments of `wandb.init` (project, name, entity, mode, ...).
        settings: the configuration that is shown with the run.

    Raises:
        ImportError: wandb is not installed.
    """

    def __init__(self, folder: Path, options: Mapping[str, Any], settings: Mapping[str, Any]):
        wandb = import_wandb()
        options = {"project": "controlnet", "dir": str(folder), "resume": "allow", **options}
        if "mode" not in options and "WANDB_MODE" not in os.environ and not wandb.api.api_key:
            options["mode"] = "offline"
            logger.warning("no login to Weights & Biases: the run is kept offline in %s/wandb (wandb sync)", folder)
        self._wandb = wandb
        self._run = wandb.init(config=dict(settings), **options)

    def write(self, row: Mapping[str, float]) -> None:
        self._run.log({key: value for key, value in row.items() if key != "step"}, step=int(row["step"]))

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        self._run.log({name: self._wandb.Image(picture)}, step=step)

    def close(self) -> None:
        self._run.finish()


def import_wandb() -> Any:
    """The package of Weights & Biases, which no extra of this project brings. Raises ImportError."""
    try:
        import wandb
    except ImportError as error:
        raise ImportError(
            "exp_manager.create_wandb_logger is true but wandb is not installed: pip install wandb, or set"
            " exp_manager.create_wandb_logger=False"
        ) from error
    return wandb


def open_logs(folder: Path, exp_manager: Mapping[str, Any], settings: Mapping[str, Any], step: int) -> list[Log]:
    """The logs that a configuration asks for; `step` is where the run resumes."""
    logs: list[Log] = [MetricLog(folder, step)]
    if exp_manager["create_tensorboard_logger"]:
        logs.append(TensorBoardLog(folder, step))
    if exp_manager["create_wandb_logger"]:
        logs.append(WandbLog(folder, exp_manager["wandb_logger_kwargs"] or {}, settings))
    return logs
