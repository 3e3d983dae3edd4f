"""Shards of latents and text, made by `python -m controlnet.encode`: their manifest, and how a sample of them is read.

A folder of such shards holds `manifest.json` and tars of

    KEY.moments.npy    float16 [2, C, h, w]: mean and standard deviation of the first stage's posterior, not scaled;
                       [1, C, h, w] of a first stage without a posterior
    KEY.flipped.npy    the same of the mirrored image, only where flips are on
    KEY.hint.png|npy   the hint, cropped as the image was
    KEY.txt            the caption
    KEY.tokens.npy     int32 [T], the caption's token numbers ([2, T] of two text encoders), or
    KEY.states.npy     float16 [T, D], its context, and of a text encoder with a pooled vector
    KEY.pooled.npy     float16 [P], that vector
    KEY.time_ids.npy   int32 [1, 6], of the image, or [2, 6], of the image and of the mirrored one, for a U-Net that is
                       told of the crop (Stable Diffusion XL)
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
from controlnet.data.buckets import transform_of
from controlnet.data.hints import unit
from controlnet.data.images import ImageError
from controlnet.data.samples import BadSample, read_members
from controlnet.data.shards import DataError, Sample

FORMAT = 2
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
    ("pooled.npy", "pooled"),
    ("time_ids.npy", "time_ids"),
)
TEXT_TYPES = {"tokens": np.int32, "states": np.float16}
TOLERANCE = 2e-3  # of a fingerprint: more than rounding to bfloat16 changes it, less than training does


def fingerprint(module: nn.Module, tensors: int = 16) -> list[float]:
    """Numbers that identify weights whatever precision they are stored in; empty without weights.

    Of up to `tensors` weights, evenly chosen: the norm over the square root of the count, and the mean over the norm.
    """
    weights = [parameter.detach() for _, parameter in sorted(module.named_parameters())]
    found = []
    for weight in weights[:: max(1, len(weights) // tensors)][:tensors]:
        weight = weight.double().flatten()
        norm = weight.norm().item()
        found += [norm / math.sqrt(len(weight)), weight.sum().item() / (norm * math.sqrt(len(weight)) or 1.0)]
    return found


def settings(model: Mapping[str, Any], train: Mapping[str, Any], conditioning: Any) -> dict[str, Any]:
    """What encoded shards must agree on with the run that reads them, by name; `mismatch` compares two of these.

    Args:
        model: the section `model` of a configuration.
        train: the section `data.train`, or `data.validation`.
        conditioning: first stage and condition stage of the model.
    """
    first, text = conditioning.first_stage, conditioning.cond_stage
    transform = transform_of(train, conditioning.factor)
    sizes = ", ".join(f"{height} x {width}" for height, width in transform.sizes)
    return {
        "first stage": type(first).__name__,
        "weights of the first stage": fingerprint(getattr(getattr(first, "vae", first), "encoder", first)),
        "text encoder": type(text).__name__,
        "length of the text": text.max_length,
        "weights of the text encoder": fingerprint(text),
        "zeros for the empty caption": getattr(text, "zeros_for_empty", False),
        "scale_factor": model["scale_factor"],
        "crop": f"{sizes}, {'anywhere' if transform.random_crop else 'in the centre'}",
        "resize_smallest_side": (train.get("augmentations") or {}).get("resize_smallest_side"),
        "hint channels": model["control_stage_config"].get("hint_channels", 3),
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
    settings = manifest["settings"]
    vector = settings.get("pooled vector") is not None
    left_out = {
        "flipped": not settings.get("flips"),
        "pooled": not vector or settings["text"]["kind"] == "tokens",
        "time_ids": not vector,
    }
    return tuple(pair for pair in EXTENSIONS if not left_out.get(pair[1]))


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
        moments: how many moments, and the channels of each.
        factor: image size over latent size.
        sizes: (height, width) that a sample's hint can have.
        kind: "tokens" or "states", how captions are stored.
        text: shape of a caption's tokens, [T] or [2, T], or states, [T, D].
        pooled: channels of the pooled vector; None of a text encoder without one.
        flips: whether mirrored latents are stored.
        flip: probability of the mirrored sample.
        hint_channels: of the ControlNet.
        empty: "no_caption" [1, T, D], the states of the empty caption, and where there are pooled vectors "no_pooled"
            [1, P], its own; empty with tokens.
    """

    moments: tuple[int, int]
    factor: int
    sizes: frozenset[tuple[int, int]]
    kind: str
    text: tuple[int, ...]
    pooled: int | None
    flips: bool
    flip: float
    hint_channels: int
    empty: dict[str, Tensor]

    @classmethod
    def of(cls, folder: Path, manifest: Mapping[str, Any], flip: float, hint_channels: int) -> Cached:
        """The reader of a folder.

        Raises:
            DataError: mirrored latents are wanted and were not stored, or the manifest lacks a setting.
        """
        settings = manifest["settings"]
        if flip and not settings.get("flips"):
            raise DataError(
                "data.train.augmentations.horizontal_flip is set, but the shards were encoded without mirrored latents;"
                " encode them again with it, or leave it out"
            )
        try:
            return cls(
                moments=tuple(settings["moments"]),
                factor=settings["factor"],
                sizes=frozenset((height, width) for height, width in settings["sizes"]),
                kind=settings["text"]["kind"],
                text=tuple(settings["text"]["shape"]),
                pooled=settings["pooled vector"],
                flips=settings["flips"],
                flip=flip,
                hint_channels=hint_channels,
                empty={name: torch.tensor(values).half()[None] for name, values in manifest["empty"].items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{folder / MANIFEST} is damaged ({error!r}); encode the shards again") from error

    def read(self, sample: Sample, rng: np.random.Generator) -> CachedSample:
        """Raises BadSample for members that are not what the manifest says."""
        data = read_members(sample)
        flip = bool(rng.random(3)[2] < self.flip)  # the draw that `samples.Transform.place` takes for it
        hint = _hint(data["hint"])
        if hint.shape[2] != self.hint_channels:
            raise BadSample(f"hint not of {self.hint_channels} channels")
        if hint.shape[:2] not in self.sizes:
            raise BadSample("hint not of the encoded size")
        latent = (*self.moments, *(side // self.factor for side in hint.shape[:2]))
        pooled, time_ids = None, None
        if "pooled" in data:
            pooled = _array(data["pooled"], "pooled vector", (self.pooled,), np.float16)
        if "time_ids" in data:
            time_ids = _array(data["time_ids"], "time ids", (1 + self.flips, 6), np.int32)[int(flip)]
        return CachedSample(
            _array(data["flipped" if flip else "moments"], "latents", latent, np.float16),
            hint[:, ::-1].copy() if flip else hint,
            _array(data["text"], "text", self.text, TEXT_TYPES[self.kind]),
            data["caption"].decode("utf-8", errors="replace"),
            pooled,
            time_ids,
        )

    def collate(self, samples: Sequence[CachedSample]) -> dict[str, Any]:
        """A batch: "moments", "hint", "captions"; "tokens", or "states" with "no_caption", and for Stable Diffusion XL
        "time_ids" and beside states "pooled" with "no_pooled"."""
        text = torch.from_numpy(np.stack([sample.text for sample in samples]))
        batch: dict[str, Any] = {
            "moments": torch.from_numpy(np.stack([sample.moments for sample in samples])),
            "hint": torch.stack([unit(sample.hint) for sample in samples]),
            "captions": [sample.caption for sample in samples],
            self.kind: text.long() if self.kind == "tokens" else text,
            **self.empty,
        }
        for name in ("pooled", "time_ids"):
            rows = [getattr(sample, name) for sample in samples]
            if rows[0] is not None:
                batch[name] = torch.from_numpy(np.stack(rows))
        return batch


class CachedSample(NamedTuple):
    """A sample of an encoded shard."""

    moments: np.ndarray
    hint: np.ndarray
    text: np.ndarray
    caption: str
    pooled: np.ndarray | None = None
    time_ids: np.ndarray | None = None

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


def members(
    moments: Tensor,
    flipped: Tensor | None,
    hint: np.ndarray,
    caption: str,
    text: Tensor,
    pooled: Tensor | None = None,
    time_ids: Sequence[Sequence[int]] | None = None,
) -> dict[str, bytes]:
    """The members of a sample by extension, from tensors on the CPU; None leaves a member out."""
    pictured = hint.dtype == np.uint8 and hint.shape[2] in (1, 3)
    kind = "states" if text.is_floating_point() else "tokens"
    found = {
        "moments.npy": _npy(moments.half().numpy()),
        "flipped.npy": None if flipped is None else _npy(flipped.half().numpy()),
        ("hint.png" if pictured else "hint.npy"): _png(hint) if pictured else _npy(hint),
        "txt": caption.encode(),
        f"{kind}.npy": _npy(text.numpy().astype(TEXT_TYPES[kind])),
        "pooled.npy": None if pooled is None else _npy(pooled.half().numpy()),
        "time_ids.npy": None if time_ids is None else _npy(np.array(time_ids, np.int32)),
    }
    return {extension: content for extension, content in found.items() if content is not None}


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(buffer, "PNG")
    return buffer.getvalue()
