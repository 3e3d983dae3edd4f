"""Shards of latents and text, made by `python -m controlnet.encode`: their manifest, and how a sample of them is read.

A folder of such shards holds `manifest.json` and tars of

    KEY.moments.npy    float16 [2, C, h, w]: mean and standard deviation of the first stage's posterior, not scaled;
                       [1, C, h, w] of a first stage without a posterior
    KEY.flipped.npy    the same of the mirrored image, only where flips are on
    KEY.hint.png|npy   the hint, cropped as the image was
    KEY.txt            the caption
    KEY.tokens.npy     int32 [T], the caption's token numbers, or KEY.states.npy, float16 [T, D], its context
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from controlnet.data import images
from controlnet.data.arrays import MAGIC, read_npy
from controlnet.data.hints import unit
from controlnet.data.images import ImageError
from controlnet.data.samples import BadSample, read_members
from controlnet.data.shards import DataError, Sample

FORMAT = 1
MANIFEST = "manifest.json"
KIND = "latents and text of controlnet.encode"
EXTENSIONS = (
    ("moments.npy", "moments"),
    ("flipped.npy", "flipped"),
    ("hint.png", "hint"),
    ("hint.npy", "hint"),
    ("txt", "caption"),
    ("tokens.npy", "text"),
    ("states.npy", "text"),
)
TOLERANCE = 2e-3  # of a fingerprint: what storing the weights in bfloat16 changes, and training does not


def fingerprint(module: nn.Module, tensors: int = 16) -> list[float]:
    """Numbers by which weights are known again, in whatever precision they are stored; empty without weights.

    Of up to `tensors` weights, evenly chosen: the norm over the square root of the count, and the mean over the norm.
    """
    weights = [parameter.detach() for _, parameter in sorted(module.named_parameters())]
    found = []
    for weight in weights[:: max(1, len(weights) // tensors)][:tensors]:
        weight = weight.double().flatten()
        norm = weight.norm().item()
        found += [norm / math.sqrt(len(weight)), weight.sum().item() / (norm * math.sqrt(len(weight)) or 1.0)]
    return found


def settings(cfg: Any, conditioning: Any) -> dict[str, Any]:
    """What makes encoded shards fit a configuration, by name: a comparison of these is `mismatch`."""
    augmentations = cfg.data.train.augmentations
    first, text = conditioning.first_stage, conditioning.cond_stage
    return {
        "first stage": type(first).__name__,
        "weights of the first stage": fingerprint(getattr(getattr(first, "vae", first), "encoder", first)),
        "text encoder": type(text).__name__,
        "length of the text": text.max_length,
        "weights of the text encoder": fingerprint(text),
        "scale_factor": cfg.model.scale_factor,
        "crop": str(augmentations.center_crop_h_w),
        "resize_smallest_side": augmentations.resize_smallest_side,
        "hint channels": cfg.model.control_stage_config.get("hint_channels", 3),
    }


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder of encoded shards; None when it is a folder of another kind.

    Raises:
        DataError: the manifest is damaged, or encoding has not come to its end.
    """
    path = folder / MANIFEST
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}; encode the shards again") from error
    if not isinstance(tree, dict) or tree.get("kind") != KIND:
        return None
    if tree.get("format") != FORMAT or not isinstance(tree.get("settings"), dict):
        raise DataError(f"{path} has format {tree.get('format')!r}; expected {FORMAT}: encode the shards again")
    if tree.get("complete") is not True:
        raise DataError(f"{folder} is half written: start the same python -m controlnet.encode again to finish it")
    return tree


def encoded_extensions(manifest: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """The extensions of a folder's members, with their roles."""
    flips = manifest["settings"].get("flips")
    return tuple(pair for pair in EXTENSIONS if flips or pair[1] != "flipped")


def mismatch(encoded: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """The first setting in which encoded shards differ from what a configuration wants, or None."""
    for name, value in wanted.items():
        theirs = encoded.get(name)
        if isinstance(value, list) and all(isinstance(number, float) for number in value) and value:
            alike = isinstance(theirs, list) and len(theirs) == len(value)
            alike = alike and all(
                abs(a - b) <= TOLERANCE * max(1.0, abs(b)) for a, b in zip(theirs, value, strict=True)
            )
            if not alike:
                return f"{name}: other weights"
        elif theirs != value:
            return f"{name} was {theirs!r}, is {value!r}"
    return None


class Cached(NamedTuple):
    """How samples of encoded shards are read and batched.

    Attributes:
        moments: shape of the latents' moments.
        text: shape of a caption's tokens [T] or states [T, D].
        flip: probability of the mirrored sample.
        hint_channels: of the ControlNet.
        no_caption: the empty caption's tokens or states.
    """

    moments: tuple[int, ...]
    text: tuple[int, ...]
    flip: float
    hint_channels: int
    no_caption: np.ndarray

    @classmethod
    def of(cls, folder: Path, manifest: Mapping[str, Any], flip: float, hint_channels: int) -> Cached:
        """The reader of a folder.

        Raises:
            DataError: mirrored latents are wanted and were not stored.
        """
        settings = manifest["settings"]
        if flip and not settings.get("flips"):
            raise DataError(
                "data.train.augmentations.horizontal_flip is set, but the shards were encoded without mirrored latents;"
                " encode them again with it, or leave it out"
            )
        no_caption = np.array(manifest["no_caption"], dtype=np.int32 if len(settings["text"]) == 1 else np.float16)
        return cls(tuple(settings["moments"]), tuple(settings["text"]), flip, hint_channels, no_caption)

    def read(self, sample: Sample, rng: np.random.Generator) -> CachedSample:
        """Raises BadSample for members that are not what the manifest says."""
        data = read_members(sample)
        flip = rng.random() < self.flip
        if flip and "flipped" not in data:
            raise BadSample("mirrored latents missing")
        moments = _array(data["flipped" if flip else "moments"], "latents", self.moments, np.float16)
        text = _array(data["text"], "text", self.text, np.int32 if len(self.text) == 1 else np.float16)
        hint = _hint(data["hint"])
        if hint.shape[2] != self.hint_channels:
            raise BadSample(f"hint not of {self.hint_channels} channels")
        caption = data["caption"].decode("utf-8", errors="replace")
        return CachedSample(moments, hint[:, ::-1].copy() if flip else hint, text, caption)

    def collate(self, samples: Sequence[CachedSample]) -> dict[str, Any]:
        """A batch: "moments", "hint", "captions", and "tokens", or "states" with "no_caption"."""
        text = torch.from_numpy(np.stack([sample.text for sample in samples]))
        batch: dict[str, Any] = {
            "moments": torch.from_numpy(np.stack([sample.moments for sample in samples])),
            "hint": torch.stack([unit(sample.hint) for sample in samples]),
            "captions": [sample.caption for sample in samples],
        }
        if len(self.text) == 1:
            return {**batch, "tokens": text.long()}
        return {**batch, "states": text, "no_caption": torch.from_numpy(self.no_caption)}


class CachedSample(NamedTuple):
    """A sample of an encoded shard."""

    moments: np.ndarray
    hint: np.ndarray
    text: np.ndarray
    caption: str

    @property
    def size(self) -> tuple[int, ...]:
        """Samples of one size make a batch."""
        return self.hint.shape[:2]


def _array(data: bytes, what: str, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    try:
        array = read_npy(data, (len(shape),), f"{np.dtype(dtype).name} {list(shape)}")
    except ImageError as error:
        raise BadSample(f"{what} {error}") from error
    if array.shape != shape or array.dtype != dtype:
        raise BadSample(f"{what} not {np.dtype(dtype).name} {list(shape)}")
    if array.dtype == np.float16 and not np.isfinite(array).all():
        raise BadSample(f"{what} not finite")
    return array


def _hint(data: bytes) -> np.ndarray:
    try:
        if data.startswith(MAGIC):
            return read_npy(data, (3,), "[H, W, C]")
        hint = np.asarray(images.upright(images.open_picture(data, "PNG")))
    except ImageError as error:
        raise BadSample(f"hint {error}") from error
    return hint[..., None] if hint.ndim == 2 else hint


def members(moments: Tensor, flipped: Tensor | None, hint: np.ndarray, caption: str, text: Tensor) -> dict[str, bytes]:
    """The members of a sample by extension, from tensors on the CPU."""
    pictured = hint.dtype == np.uint8 and hint.shape[2] in (1, 3)
    kind = "tokens" if text.dim() == 1 else "states"
    return {
        "moments.npy": _npy(moments.half().numpy()),
        **({} if flipped is None else {"flipped.npy": _npy(flipped.half().numpy())}),
        ("hint.png" if pictured else "hint.npy"): _png(hint) if pictured else _npy(hint),
        "txt": caption.encode(),
        f"{kind}.npy": _npy(text.numpy().astype(np.int32 if kind == "tokens" else np.float16)),
    }


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(buffer, "PNG")
    return buffer.getvalue()
