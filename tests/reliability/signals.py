"""Signals to a training run at random moments: what was trained is saved, and the next run goes on with it."""

import collections
import os
import random
import signal
import tempfile
import time
from pathlib import Path

from controlnet.training import checkpoint
from controlnet.training.distributed import StopRequest
from tests.controlnet import tiny_run

LONGEST = 600.0  # seconds that a run may take to end, on a machine that is busy with other work


def _train(folder: Path, report: int) -> None:
    """Trains for ever in this process, and reports the first step and the last."""
    with StopRequest() as stop:
        options = ["trainer.max_steps=100000", "exp_manager.resume_if_exists=True", "trainer.log_every_n_steps=3"]
        drawing = ["model.image_logger.max_images=1", "model.image_logger.batch_frequency=4"]
        every = "exp_manager.checkpoint_callback_params.every_n_train_steps=5"
        run = tiny_run.trainer(tiny_run.configuration(folder, *options, *drawing, every), stop=stop)
        run.resume()
        os.write(report, b"%d\n" % run.step)
        run.fit()
        os.write(report, b"%d\n" % run.step)


def _ends(child: int) -> int | None:
    """The exit status of a child, or None when it does not end."""
    deadline = time.monotonic() + LONGEST
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def campaign(rounds: int, seed: int) -> dict[str, int]:
    counts: collections.Counter[str] = collections.Counter()
    rng, saved = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "run")
        for _ in range(rounds):
            reading, writing = os.pipe()
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    _train(folder, writing)
                    status = 0
                finally:
                    os._exit(status)
            os.close(writing)
            with os.fdopen(reading, "rb") as reports:
                first = int(reports.readline() or -1)
                for _ in range(rng.randrange(1, 4)):  # as a scheduler and a launcher send them
                    time.sleep(rng.uniform(0, 0.3))
                    os.kill(child, signal.SIGTERM)
                status = _ends(child)
                last = int(reports.readline() or -1)
            newest = checkpoint.newest_complete(folder / checkpoint.CHECKPOINTS)
            found = int(newest.name.removeprefix("step-")) if newest else 0
            if status is None:
                counts["hung"] += 1
            else:
                # It went on where the last one ended, and what it reports to have trained is what is saved.
                counts["survived" if status == 0 and first == saved and last == found > first else "lost"] += 1
            saved = found
    return counts
