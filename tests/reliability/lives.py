"""Long lives: memory, objects and open files stay as they are over steps, images, and switches to the kernels and back.

The loader's long life is `test_loader_life.py`.
"""

import gc
import itertools
import os
import random
import sys
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
MOST_BYTES, MOST_OBJECTS = 2048, 1.0  # a turn; an activation kept by mistake is 32 KiB


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
    """Resident bytes, allocated blocks of Python's, open files."""
    gc.collect()
    with open("/proc/self/statm", encoding="ascii") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resident, sys.getallocatedblocks(), len(os.listdir("/proc/self/fd"))


def slopes(life: Callable[[Path, int], Iterator[None]], turns: int, warm_up: int) -> tuple[float, float, float]:
    """Growth a turn of bytes, blocks and open files, by a line through POINTS measurements."""
    every = max(1, turns // POINTS)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        lived = life(Path(folder), every)
        for turn in range(warm_up + turns):
            next(lived)
            if turn >= warm_up and (turn - warm_up) % every == 0:
                found.append((turn, *measure()))
        lived.close()
    rows = np.array(found, dtype=np.float64)
    return tuple(float(np.polyfit(rows[:, 0], rows[:, i], 1)[0]) for i in (1, 2, 3))


# Turns of a round, and turns before the first measurement.
LIVES = {steps: (10, 20), images: (2, 5), switches: (1, 3)}


def campaign(rounds: int, seed: int) -> dict[str, int]:
    """`rounds` times the turns of each life: with 200, two thousand steps."""
    counts = {"flat": 0, "grows": 0}
    lives = list(LIVES.items())
    random.Random(seed).shuffle(lives)
    for life, (turns, warm_up) in lives:
        size, blocks, files = slopes(life, turns * rounds, warm_up)
        grown = {"memory": size > MOST_BYTES, "objects": blocks > MOST_OBJECTS, "open files": files > 0}
        counts["grows"] += sum(grown.values())
        counts["flat"] += len(grown) - sum(grown.values())
        print(f"{life.__name__}, {turns * rounds}: {size:.0f} bytes, {blocks:.2f} blocks, {files:.2f} files a turn")
    return counts
