"""Damage to the newest checkpoint of a run: it is passed over, and the one before is taken up."""

import collections
import random
import shutil
import tempfile
from pathlib import Path

from controlnet.training import checkpoint
from tests.controlnet import tiny_run


def _damage(path: Path, rng: random.Random) -> str:
    """Damages one file of a checkpoint; returns how."""
    file = rng.choice(sorted(path.iterdir()))
    kind = rng.choice(["bit flipped", "cut short", "removed", "grown", "a folder", "a link to nothing"])
    content = bytearray(file.read_bytes())
    if kind == "bit flipped":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "cut short":
        del content[rng.randrange(len(content)) :]
    elif kind == "grown":
        content += rng.randbytes(rng.randrange(1, 100))
    if kind in ("removed", "a folder", "a link to nothing"):
        file.unlink()
        if kind == "a folder":
            file.mkdir()
        elif kind == "a link to nothing":
            file.symlink_to(path / "nothing")
    else:
        file.write_bytes(content)
    return kind


def campaign(rounds: int, seed: int) -> dict[str, int]:
    counts: collections.Counter[str] = collections.Counter()
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        every = "exp_manager.checkpoint_callback_params.every_n_train_steps=1"
        cfg = tiny_run.configuration(f"{name}/run", every, "trainer.max_steps=2", "exp_manager.ema.enable=True")
        tiny_run.trainer(cfg).fit()
        folder = Path(name, "run", "checkpoints")
        (_, older), (_, newest) = checkpoint.checkpoints(folder)
        whole = shutil.copytree(newest, f"{name}/whole")
        cfg.exp_manager.resume_if_exists = True
        for _ in range(rounds):
            kind = _damage(newest, rng)
            try:
                taken = checkpoint.choose(folder, cfg)
            except Exception:
                counts["raised"] += 1
            else:
                counts[f"passed over: {kind}" if taken == older else "accepted damage" if taken else "lost"] += 1
            shutil.rmtree(newest)
            shutil.copytree(whole, newest)
        taken_up = tiny_run.trainer(cfg)
        taken_up.resume()
        counts["survived" if taken_up.step == 2 else "lost"] += 1
    return counts
