"""A long life: memory, objects and open files of a training run stay as they are."""

import gc
import os
import sys
import tempfile

import numpy as np

from controlnet.training.metrics import Reporter
from tests.controlnet import tiny_run

WARM_UP, POINTS = 20, 10
MOST_BYTES, MOST_OBJECTS = 2048, 1.0  # a step; an activation kept by mistake is 32 KiB


def measure() -> tuple[int, int, int]:
    """Resident bytes, allocated blocks of Python's, open files."""
    gc.collect()
    with open("/proc/self/statm", encoding="ascii") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resident, sys.getallocatedblocks(), len(os.listdir("/proc/self/fd"))


def slopes(steps: int, folder: str) -> tuple[float, float, float]:
    """Growth a step of bytes, blocks and open files, by a line through POINTS measurements."""
    every = max(1, steps // POINTS)
    options = ["exp_manager.ema.enable=True", "trainer.log_every_n_steps=5", f"trainer.max_steps={10**9}"]
    drawing = ["model.image_logger.max_images=1", f"model.image_logger.batch_frequency={every}"]
    saving = f"exp_manager.checkpoint_callback_params.every_n_train_steps={every}"
    keep = "exp_manager.checkpoint_callback_params.save_top_k=2"
    cfg = tiny_run.configuration(folder, *options, *drawing, saving, keep)
    run = tiny_run.trainer(cfg, loader=Forgetful)
    run.resume()
    run._batches = run._endless_batches()
    found = []
    with Reporter(run.folder, run.world, cfg, 0, 0) as run.reporter:
        for step in range(WARM_UP + steps):
            run._advance()
            if step >= WARM_UP and (step - WARM_UP) % every == 0:
                found.append((step, *measure()))
    rows = np.array(found, dtype=np.float64)
    return tuple(float(np.polyfit(rows[:, 0], rows[:, i], 1)[0]) for i in (1, 2, 3))


class Forgetful(tiny_run.Loader):
    """The made-up data, without the list of all that was handed out."""

    def __iter__(self):
        for batch in super().__iter__():
            self.handed_out.clear()
            yield batch


def campaign(rounds: int, seed: int) -> dict[str, int]:
    """`rounds` tens of steps."""
    with tempfile.TemporaryDirectory() as folder:
        size, blocks, files = slopes(10 * rounds, folder)
    grown = {"memory": size > MOST_BYTES, "objects": blocks > MOST_OBJECTS, "open files": files > 0}
    found = [name for name, grows in grown.items() if grows]
    return {"flat": len(grown) - len(found), "grows": len(found), **{f"slope of {name}": 0 for name in found}}
