"""Trains a small ControlNet on a CPU in minutes and measures whether it follows its hints.

    python -m controlnet.quickstart [--output quickstart] [key=value ...]

Draws scenes into shards, scores the untrained ControlNet, trains by `controlnet.train` with configs/quickstart.yaml,
and scores again. The exit status is 1 if the ControlNet has not learnt to follow them.
"""

import itertools
import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from controlnet import build, config
from controlnet.common import command
from controlnet.common.extras import quiet_libraries, require
from controlnet.inference.images import grid, to_uint8
from controlnet.inference.sampling import ddim
from controlnet.quickstart.make_base import BASE, CONFIG
from controlnet.quickstart.plot import loss_curve
from controlnet.quickstart.scenes import caption_score, control_score
from controlnet.quickstart.shards import Scenes, held_out, write_shards
from controlnet.training import checkpoint
from controlnet.training.run import run as train

logger = logging.getLogger("controlnet")

# The control score of a working installation is at least this.
LEAST_SCORE, LEAST_GAIN = 0.50, 2.5
SHOWN = 10  # scenes in the picture, of those that are scored
SAMPLE_STEPS, GUIDANCE, SAMPLE_SEED, BATCH = 20, 2.0, 0, 16


@torch.no_grad()
def draw(cfg: Mapping[str, Any], scenes: Scenes, control: Path | None) -> Tensor:
    """Draws samples for the captions and hints of scenes: uint8 [N, 3, H, W].

    Args:
        cfg: the quickstart's configuration.
        scenes: what to draw.
        control: safetensors file of the ControlNet; None for the untrained one.
    """
    node = cfg.model.copy()
    node.control_stage_config.from_pretrained = None if control is None else str(control)
    model, conditioning = build.build_model(node).eval(), build.build_conditioning(node)
    schedule = build.build_schedule(node)
    generator = torch.Generator().manual_seed(SAMPLE_SEED)
    drawn = []
    for hint, first in zip(scenes.hints.split(BATCH), range(0, len(scenes.captions), BATCH), strict=True):
        captions = scenes.captions[first : first + BATCH]
        latents = ddim(
            model,
            schedule,
            (len(captions), conditioning.latent_channels, *(side // conditioning.factor for side in hint.shape[2:])),
            conditioning.context(captions),
            uncond_context=conditioning.context([""] * len(captions)),
            hint=hint,
            guidance_scale=GUIDANCE,
            steps=SAMPLE_STEPS,
            generator=generator,
        )
        drawn.append(to_uint8(conditioning.images(latents)))
    return torch.cat(drawn)


def scores(scenes: Scenes, images: Tensor) -> dict[str, float]:
    """Returns the control score and the caption score of images uint8 [N, 3, H, W]; see `scenes`."""
    pixels = images.permute(0, 2, 3, 1).numpy()
    control = control_score(scenes.labels, pixels)
    return {"control": control, "caption": caption_score(scenes.labels, scenes.captions, pixels)}


def verdict(before: float, after: float) -> str | None:
    """Returns the fault of the control scores before and after training, or None."""
    if not after >= LEAST_SCORE:  # NaN included
        return f"the control score after training is {after:.3f}; expected at least {LEAST_SCORE:.2f}"
    if after < LEAST_GAIN * before:
        return (
            f"the control score rose from {before:.3f} to {after:.3f}; expected {LEAST_GAIN} times the first at least"
        )
    return None


def picture(scenes: Scenes, before: Tensor, after: Tensor) -> Image.Image:
    """Draws the first scenes: hint, original, and the samples of both ControlNets, at twice their size."""
    rows = {
        "hint": to_uint8(scenes.hints, low=0.0),
        "the scene it was made from": scenes.images,
        "untrained ControlNet": before,
        "trained ControlNet": after,
    }
    return grid({label: F.interpolate(row[:SHOWN].float(), scale_factor=2).byte() for label, row in rows.items()})


def run(
    output: Path, overrides: Sequence[str] = (), scene_count: int = 48, shard_sizes: Sequence[int] = (512,) * 4
) -> int:
    """Runs the whole quickstart; returns the exit status.

    Args:
        output: folder for shards, runs, pictures and scores.
        overrides: of the configuration, `key=value`.
        scene_count: held-out scenes that are scored.
        shard_sizes: scenes in each training shard.
    """
    begin = time.monotonic()
    shards = write_shards(output / "shards", shard_sizes)
    folder = next(path for number in itertools.count(1) if not (path := output / f"run-{number}").exists())
    settings = {
        "model.unet_config.from_pretrained": str(BASE),
        "model.cond_stage_config.from_pretrained": str(BASE),
        "exp_manager.explicit_log_dir": str(folder),
        "data.train.dataset_path": [str(shard) for shard in shards],
    }
    overrides = [*(f"{key}={json.dumps(value)}" for key, value in settings.items()), *overrides]
    cfg = config.load(CONFIG, overrides)
    scenes = held_out(scene_count)
    logger.info(
        "drew %d scenes in %.0f s; scoring the untrained ControlNet", sum(shard_sizes), time.monotonic() - begin
    )
    before = draw(cfg, scenes, None)

    train(CONFIG, overrides)
    _, newest = checkpoint.checkpoints(folder / checkpoint.CHECKPOINTS)[-1]
    after = draw(cfg, scenes, newest / ("ema.safetensors" if cfg.exp_manager.ema.enable else "control.safetensors"))

    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row.get("loss")]
    loss_curve([row["step"] for row in rows], [row["loss"] for row in rows]).save(output / "loss.png")
    picture(scenes, before, after).save(output / "samples.png")
    result = {"before": scores(scenes, before), "after": scores(scenes, after), "seconds": time.monotonic() - begin}
    (output / "scores.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return _report(output, result, scene_count)


def _report(output: Path, result: dict, scene_count: int) -> int:
    before, after = result["before"], result["after"]
    print(f"control score (mean IoU of hint and re-segmented samples, {scene_count} held-out scenes):")
    print(f"  untrained ControlNet {before['control']:.3f}, trained {after['control']:.3f}")
    print("caption score (share of things that look as the caption says):")
    print(f"  untrained ControlNet {before['caption']:.3f}, trained {after['caption']:.3f}")
    print(f"samples: {output / 'samples.png'}   loss curve: {output / 'loss.png'}   in {result['seconds']:.0f} s")
    problem = verdict(before["control"], after["control"])
    if problem is not None:
        print(f"error: {problem}", file=sys.stderr)
    return 0 if problem is None else 1


EXAMPLES = """
python -m controlnet.quickstart
python -m controlnet.quickstart --output /tmp/quickstart trainer.max_steps=1600 optim.lr=1e-3
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = command.parser("controlnet.quickstart", __doc__.split("\n")[0], EXAMPLES)
    parser.add_argument("--output", type=Path, default=Path("quickstart"), help="folder for everything that is made")
    command.add_overrides(parser)
    arguments = command.parse(parser, argv)
    quiet_libraries()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # One thread gives the same scores on any machine; layers this small gain little from more.
    torch.set_num_threads(1)
    try:
        needed = ("omegaconf", "tqdm", "tensorboard", "webdataset")
        require(*needed, extra="train", wanted_by="the quickstart writes shards and trains on them")
        return run(arguments.output, arguments.overrides)
    except (config.ConfigError, ImportError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    sys.exit(main())
