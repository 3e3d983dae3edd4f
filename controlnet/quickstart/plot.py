"""Draws the loss curve of a run with Pillow."""

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 84, 24, 44, 44
TEXT_SIZE = 20  # still readable where a phone shows the picture at half its size


def loss_curve(
    steps: Sequence[int], losses: Sequence[float], *, ink: str = "black", background: str = "white"
) -> Image.Image:
    """Plots loss over step on a logarithmic axis: each value in grey, their running mean in red.

    Args:
        steps: of the optimizer, rising.
        losses: positive, one for each step.
        ink: colour of axes and text.
        background: colour of the picture.
    """
    picture = Image.new("RGB", (WIDTH, HEIGHT), background)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(TEXT_SIZE)
    low, high = math.log10(min(losses)), math.log10(max(losses))
    margin = 0.05 * (high - low) or 0.1
    low, high = low - margin, high + margin

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / max(steps[-1], 1)

    def y(loss: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - math.log10(loss)) / (high - low)

    draw.text((LEFT, 10), "training loss, by optimizer step", fill=ink, font=font)
    for i in range(5):
        loss, step = 10 ** (low + (high - low) * i / 4), steps[-1] * i / 4
        draw.line((LEFT, y(loss), WIDTH - RIGHT, y(loss)), fill="gray")
        draw.text((LEFT - 8, y(loss)), f"{loss:.3g}", fill=ink, font=font, anchor="rm")
        draw.text((x(step), HEIGHT - BOTTOM + 8), f"{step:.0f}", fill=ink, font=font, anchor="mt")
    draw.line((LEFT, TOP, LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM), fill=ink)
    means = [losses[0]]
    for loss in losses[1:]:
        means.append(0.8 * means[-1] + 0.2 * loss)
    for values, colour, width in ((losses, "silver", 1), (means, "red", 2)):
        points = [(x(step), y(value)) for step, value in zip(steps, values, strict=True)]
        draw.line(points if len(points) > 1 else points * 2, fill=colour, width=width)
    return picture
