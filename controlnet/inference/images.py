"""Pictures for people: grids of hints and samples, PNG files with settings, and the check for blank images."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torch.nn import functional as F

MARGIN = 4
LABEL_HEIGHT = 14


def to_uint8(images: Tensor, low: float = -1.0) -> Tensor:
    """uint8 [N, 3, H, W] of images in [low, 1]; NaN becomes black.

    Args:
        images: [N, C, H, W]; one channel is repeated, of more than three the first three are taken.
        low: the value that stands for black: -1 for images, 0 for hints.
    """
    images = images.detach().float()
    images = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images[:, :3]
    if images.shape[1] == 2:
        images = F.pad(images, (0, 0, 0, 0, 0, 1), value=low)
    unit = (torch.nan_to_num(images, nan=low) - low) / (1 - low)
    return (unit.clamp(0, 1) * 255).round().to(torch.uint8)


def fault(images: Tensor, latents: Tensor) -> str | None:
    """Returns the reason why decoded images are blank or broken, or None.

    Args:
        images: [N, 3, H, W] decoded from `latents`.
        latents: [N, C, h, w] as the sampler left them.
    """
    if not bool(torch.isfinite(latents).all()):
        return (
            "the sampled latents hold NaN or infinity: the weights have diverged, or fp16 overflows (try bf16 or fp32)"
        )
    if not bool(torch.isfinite(images).all()):
        return "the first stage decodes finite latents to NaN or infinity: run it in float32"
    flat = images.float().flatten(1)
    constant = (flat.amax(dim=1) - flat.amin(dim=1)) < 1 / 255
    if bool(constant.any()):
        which = constant.nonzero()[0].item()
        return (
            f"image {which} is constant, {flat[which, 0].item():.2f} everywhere: the weights have diverged, or the"
            " first stage or scale_factor is not the one that the U-Net was trained with"
        )
    return None


def save_png(image: Image.Image, path: Path, facts: Mapping[str, object]) -> None:
    """Writes a PNG with the facts ("prompt", "seed", ...) as its text metadata, which `Image.text` reads."""
    info = PngInfo()
    for name, fact in facts.items():
        info.add_itxt(name, str(fact))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, "PNG", pnginfo=info)


def picture(image: Tensor) -> Image.Image:
    """Converts uint8 [3, H, W] to a PIL image."""
    return Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy()))


def grid(
    rows: Mapping[str, Tensor] | Sequence[tuple[str, Tensor]],
    *,
    label_height: int = LABEL_HEIGHT,
    ink: str = "black",
    background: str = "white",
) -> Image.Image:
    """Draws one picture with a labelled row of images for each entry.

    Args:
        rows: (label, uint8 [N, 3, H, W]) of each row, or a mapping of them; rows may differ in N and size.
        label_height: pixels of the strip with the label above each row.
        ink: colour of the labels.
        background: colour between the images.
    """
    rows = list(rows.items() if isinstance(rows, Mapping) else rows)
    height = sum(row.shape[2] + label_height + MARGIN for _, row in rows) + MARGIN
    width = max(row.shape[0] * (row.shape[3] + MARGIN) for _, row in rows) + MARGIN
    canvas = Image.new("RGB", (width, height), background)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(label_height - 4)  # Pillow's own
    top = MARGIN
    for label, row in rows:
        draw.text((MARGIN, top), label.encode("ascii", "replace").decode(), fill=ink, font=font)
        top += label_height
        for i, image in enumerate(row):
            canvas.paste(picture(image), (MARGIN + i * (row.shape[3] + MARGIN), top))
        top += row.shape[2] + MARGIN
    return canvas
