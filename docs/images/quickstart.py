"""Draws the quickstart's samples and loss curve for the pages: `python docs/images/quickstart.py FOLDER`.

FOLDER is what `python -m controlnet.quickstart --output FOLDER` left; run-1 in it is drawn.
"""

import json
import sys
from pathlib import Path

from torch.nn import functional as F

from controlnet import config
from controlnet.inference.images import grid, to_uint8
from controlnet.quickstart.__main__ import draw
from controlnet.quickstart.make_base import BASE, CONFIG
from controlnet.quickstart.plot import loss_curve
from controlnet.quickstart.shards import held_out
from controlnet.training import checkpoint

THEMES = {
    "light": {"ink": "#1f2328", "background": "#ffffff"},
    "dark": {"ink": "#e6edf3", "background": "#0d1117"},
}
SCENES = 6  # side by side on a phone


def main(folder: Path, output: Path = Path(__file__).parent) -> None:
    run = folder / "run-1"
    weights = {"unet_config": str(BASE), "cond_stage_config": str(BASE)}
    cfg = config.load(CONFIG, [f"model.{part}.from_pretrained={path}" for part, path in weights.items()])
    _, newest = checkpoint.checkpoints(run / checkpoint.CHECKPOINTS)[-1]
    scenes = held_out(SCENES)
    rows = {
        "hint": to_uint8(scenes.hints, low=0.0),
        "untrained ControlNet": draw(cfg, scenes, None),
        "trained ControlNet": draw(cfg, scenes, newest / "ema.safetensors"),
    }
    rows = {label: F.interpolate(row.float(), scale_factor=2).byte() for label, row in rows.items()}
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    logged = [row for row in logged if row.get("loss")]
    steps, losses = [row["step"] for row in logged], [row["loss"] for row in logged]
    for name, theme in THEMES.items():
        grid(rows, label_height=30, **theme).save(output / f"quickstart-{name}.png", optimize=True)
        loss_curve(steps, losses, **theme).save(output / f"loss-{name}.png", optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
