"""Makes the pages' pictures of a quickstart, light and dark: `python docs/images/quickstart.py FOLDER`.

FOLDER is what `python -m controlnet.quickstart --output FOLDER` wrote: samples.png, of which some columns and rows are
shown with larger labels, and run-1/metrics.jsonl, of which the loss is plotted.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from controlnet.inference.images import LABEL_HEIGHT, MARGIN, grid
from controlnet.quickstart.plot import loss_curve

THEMES = {
    "light": {"ink": "#1f2328", "background": "#ffffff"},
    "dark": {"ink": "#e6edf3", "background": "#0d1117"},
}
ROWS = {"hint": 0, "untrained ControlNet": 2, "trained ControlNet": 3}  # of samples.png
SIDE = 128  # of a sample in samples.png
COLUMNS = 6  # side by side on a phone


def samples(path: Path) -> dict[str, Tensor]:
    """Label -> uint8 [COLUMNS, 3, SIDE, SIDE], cut out of samples.png."""
    pixels = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)
    found = {}
    for label, row in ROWS.items():
        top = MARGIN + LABEL_HEIGHT + row * (SIDE + LABEL_HEIGHT + MARGIN)
        lefts = [MARGIN + column * (SIDE + MARGIN) for column in range(COLUMNS)]
        found[label] = torch.stack([pixels[:, top : top + SIDE, left : left + SIDE] for left in lefts])
    return found


def main(folder: Path, output: Path = Path(__file__).parent) -> None:
    rows = samples(folder / "samples.png")
    logged = map(json.loads, (folder / "run-1" / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    losses = {row["step"]: row["loss"] for row in logged if row.get("loss")}
    for name, theme in THEMES.items():
        grid(rows, label_height=30, **theme).save(output / f"quickstart-{name}.png", optimize=True)
        loss_curve(list(losses), list(losses.values()), **theme).save(output / f"loss-{name}.png", optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
