"""Long lives: memory, objects and open files stay as they are over steps, images, and switches to the kernels and back.

The loader's long life is `test_loader_life.py`.
"""

import gc
import itertools
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from controlnet.diffusers import accelerate, restore
from controlnet.inference.drawing import Request, generate
from controlnet.inference.images import fault, grid, save_png, to_uint8
from controlnet.training.metrics import Reporter
from tests.controlnet import diffusers_models, tiny_run

POINTS = 10  # at which a life is measured
MOST_BYTES, MOST_OBJECTS = 2048, 0.5  # a turn; a tensor is an object
ROOM = 8 << 20  # bytes that the allocator of a process takes at some time and keeps


class Forgetful(tiny_run.Loader):
    """The made-up data, without the list of all that was handed out."""

    def __iter__(self):
        for batch in super().__iter__():
            self.handed_out.clear()
            yield batch


def steps(folder: Path, every: int) -> Iterator[None]:
    """Steps of training with an average; every so many of them a picture is drawn and a checkpoint saved."""
    options = ["exp_manager.ema.enable=True", "trainer.log_every_n_steps=5", f"trainer.max_steps={10**9}"]
    drawing = ["model.image_logger.max_images=1", f"model.image_logger.batch_frequency={every}"]
    saving = f"exp_manager.checkpoint_callback_params.every_n_train_steps={every}"
    keep = "exp_manager.checkpoint_callback_params.save_top_k=2"
    cfg = tiny_run.configuration(folder, *options, *drawing, saving, keep)
    run = tiny_run.trainer(cfg, loader=Forgetful)
    run.resume()
    run._batches = run._endless_batches()
    with Reporter(run.folder, run.world, cfg, 0, 0) as run.reporter:
        while True:
            run._advance()
            yield


def images(folder: Path, every: int) -> Iterator[None]:
    """Images as the command draws them, each with its own seed and prompt, and written as PNG files."""
    run = tiny_run.trainer(tiny_run.configuration(folder))
    hint = tiny_run.sample(0)[1][None]
    for seed in itertools.count():
        request = Request(" ".join(tiny_run.WORDS[: seed % 3]), steps=2, seed=seed)
        drawn, latents = generate(run.model, run.conditioning, run.schedule, hint, request, list)
        assert fault(drawn, latents) is None
        save_png(grid({"hint": to_uint8(hint, low=0.0), "image": to_uint8(drawn)}), folder / "out.png", {"seed": seed})
        yield


def switches(folder: Path, every: int) -> Iterator[None]:
    """A U-Net of diffusers is accelerated, used, and restored."""
    unet = diffusers_models.unet()
    sample, context = torch.ones(1, 4, 16, 16), torch.ones(1, 7, diffusers_models.CONTEXT)
    while True:
        with torch.no_grad():
            accelerate(unet)(sample, 1, context)
        restore(unet)
        yield


def measure() -> tuple[int, int, int]:
    """Resident bytes, objects that Python's collector knows, open files.

    Blocks of Python's memory say less: the interpreter takes some for each line that has run.
    """
    gc.collect()
    with open("/proc/self/statm", encoding="ascii") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resident, len(gc.get_objects()), len(os.listdir("/proc/self/fd"))


def slopes(life: Callable[[Path, int], Iterator[None]], turns: int, warm_up: int) -> tuple[float, float, float]:
    """Growth a turn of bytes, objects and open files, by a line through POINTS measurements."""
    every = max(1, turns // POINTS)
    found = []
    gc.collect()
    gc.freeze()  # what is there already is looked at no more, which would take most of the time
    try:
        with tempfile.TemporaryDirectory() as folder:
            lived = life(Path(folder), every)
            for turn in range(warm_up + turns):
                next(lived)
                if turn >= warm_up and (turn - warm_up) % every == 0:
                    found.append((turn, *measure()))
            lived.close()
    finally:
        gc.unfreeze()
    rows = np.array(found, dtype=np.float64)
    return tuple(float(np.polyfit(rows[:, 0], rows[:, i], 1)[0]) for i in (1, 2, 3))


def grows(life: Callable[[Path, int], Iterator[None]], turns: int, warm_up: int) -> dict[str, bool]:
    """Which of "memory", "objects" and "open files" a life takes more of from turn to turn."""
    size, objects, files = slopes(life, turns, warm_up)
    print(f"{life.__name__}, {turns} turns: {size:.0f} bytes, {objects:.2f} objects, {files:.2f} open files a turn")
    memory = size > MOST_BYTES and size * turns > ROOM
    return {"memory": memory, "objects": objects > MOST_OBJECTS, "open files": files > 0.01}


# Turns of a round, and turns before the first measurement.
LIVES = {steps: (10, 20), images: (5, 5), switches: (5, 10)}


def campaign(rounds: int, seed: int) -> dict[str, int]:
    """`rounds` times the turns of each life: with 200, 2000 steps, 1000 images and 1000 switches."""
    counts = {"flat": 0, "grows": 0}
    lives = list(LIVES.items())
    random.Random(seed).shuffle(lives)
    for life, (turns, warm_up) in lives:
        grown = grows(life, turns * rounds, warm_up)
        counts["grows"] += sum(grown.values())
        counts["flat"] += len(grown) - sum(grown.values())
    return counts
