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
from PIL import Image
from safetensors.torch import save_file

from controlnet import build, generate
from controlnet.diffusers import accelerate, restore
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
    """Images by the command, each with its own seed: weights are read, hint and prompt encoded, a PNG is written."""
    cfg = tiny_run.configuration(folder / "run")
    model = build.build_model(cfg.model)
    base, hint = folder / "base.safetensors", folder / "hint.png"
    save_file({f"model.diffusion_model.{name}": tensor for name, tensor in model.unet.state_dict().items()}, base)
    tiny_run.trainer(tiny_run.configuration(folder / "run", f"model.unet_config.from_pretrained={base}")).fit()
    Image.fromarray((tiny_run.sample(0)[1] * 255).byte().permute(1, 2, 0).numpy()).save(hint)
    words = ["--checkpoint", str(folder / "run"), "--hint", str(hint), "--prompt", "red", "--steps", "2"]
    for seed in itertools.count():
        generate.main([*words, "--seed", str(seed), "--output", str(folder / "out.png")])
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

    Blocks of Python's memory say less: safetensors 0.8 keeps two integers of every tensor that it reads, and the
    interpreter some blocks for each line that has run.
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
LIVES = {steps: (10, 20), images: (3, 5), switches: (2, 10)}


def campaign(rounds: int, seed: int) -> dict[str, int]:
    """`rounds` times the turns of each life: with 200, 2000 steps, 600 images and 400 switches."""
    counts = {"flat": 0, "grows": 0}
    lives = list(LIVES.items())
    random.Random(seed).shuffle(lives)
    for life, (turns, warm_up) in lives:
        grown = grows(life, turns * rounds, warm_up)
        counts["grows"] += sum(grown.values())
        counts["flat"] += len(grown) - sum(grown.values())
    return counts
