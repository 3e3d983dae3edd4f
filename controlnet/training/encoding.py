"""Encodes shards of images into shards of latents and text, so that training computes neither again."""

import io
import itertools
import json
import logging
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from controlnet import build, config
from controlnet.common import command
from controlnet.data import DataError, ImageShards, cached
from controlnet.data.samples import Decoded
from controlnet.training.distributed import RankError, World, start

logger = logging.getLogger("controlnet")


class Encoder:
    """Encodes shards on one rank.

    Args:
        cfg: from `config.load`.
        conditioning: first stage and condition stage, on their device.
        world: this rank.
        output: folder of the encoded shards.
        states: store the text encoder's states instead of token numbers.

    Raises:
        DataError: the data cannot be encoded as configured, or the folder holds what was encoded for another
            configuration.
    """

    def __init__(self, cfg: Any, conditioning: Any, world: World, output: Path, states: bool):
        _check_crop(cfg.data.train)
        self.conditioning, self.world, self.output, self.states = conditioning, world, output, states
        self.batch = cfg.model.micro_batch_size
        self.has_vector = conditioning.vector_channels is not None
        hint_channels = cfg.model.control_stage_config.get("hint_channels", 3)
        self.source = ImageShards(cfg.data, factor=conditioning.factor, hint_channels=hint_channels)
        height, width = self.source.sizes[0]
        example = conditioning.first_stage.moments(torch.zeros(1, 3, height, width, device=conditioning.device))
        text, pooled = self._text([""])
        rows = {"no_caption": text, "no_pooled": pooled}
        self.tree: dict[str, Any] = {
            "kind": cached.KIND,
            "format": cached.FORMAT,
            "complete": False,
            "settings": {
                **cached.settings(cfg.model, cfg.data.train, conditioning),
                "flips": bool(self.source.flip),
                "sizes": [list(size) for size in self.source.sizes],
                "factor": conditioning.factor,
                "moments": list(example.shape[1:3]),
                "text": {"kind": "states" if states else "tokens", "shape": list(text.shape[1:])},
                "pooled vector": conditioning.cond_stage.pooled_dim if self.has_vector else None,
            },
            "empty": {name: row[0].tolist() for name, row in rows.items() if states and row is not None},
        }

    def _text(self, captions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Of N captions, on the CPU: tokens int64 [N, T] or [N, 2, T] and None, or states float32 [N, T, D] and pooled
        vectors [N, P] (None of a text encoder without them)."""
        tokens = self.conditioning.tokenize(list(captions))
        if not self.states:
            return tokens, None
        states, pooled = self.conditioning.text(tokens)
        return states.cpu(), None if pooled is None else pooled.cpu()

    def name(self, number: int) -> str:
        return f"{number:05d}-{Path(self.source.shards[number]).name}"

    def begin(self) -> None:
        """Writes the manifest of a folder that is not complete, or goes on with one; on rank 0."""
        self.output.mkdir(parents=True, exist_ok=True)
        path = self.output / cached.MANIFEST
        if path.exists():
            there = json.loads(path.read_text(encoding="utf-8"))
            problem = cached.mismatch(there.get("settings", {}), self.tree["settings"])
            if problem is not None:
                raise DataError(f"{self.output} was begun with another configuration: {problem}; give another --output")
        self._write_manifest()

    def finish(self) -> int:
        """Completes the manifest, on rank 0; returns the samples encoded."""
        names = [self.name(number) for number in range(len(self.source.shards))]
        extensions = cached.encoded_extensions(self.tree)
        counts = {name: self.source.count(self.output / name, extensions) for name in names}
        self.tree |= {"complete": True, "shards": counts}
        self._write_manifest()
        return sum(counts.values())

    def _write_manifest(self) -> None:
        path = self.output / cached.MANIFEST
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps(self.tree, indent=1) + "\n", encoding="utf-8")
        os.replace(draft, path)

    def run(self) -> None:
        """Encodes this rank's shards, those that are not there yet."""
        for number in range(self.world.rank, len(self.source.shards), self.world.size):
            path = self.output / self.name(number)
            if path.exists():
                continue
            draft = path.with_name(f".{path.name}.tmp-{os.getpid()}")
            count = 0
            with tarfile.open(draft, "w", format=tarfile.GNU_FORMAT) as archive:
                for key, members in self._encoded(number):
                    count += 1
                    for extension, content in members.items():
                        header = tarfile.TarInfo(f"{key}.{extension}")
                        header.size = len(content)
                        archive.addfile(header, io.BytesIO(content))
            with open(draft, "rb") as file:
                os.fsync(file.fileno())
            os.replace(draft, path)
            logger.info("%s: %d samples", path, count)

    def _encoded(self, number: int) -> Iterator[tuple[str, dict[str, bytes]]]:
        """Keys and members of a shard's samples, in their order."""
        samples = self.source.samples(self.source.shards[number])
        while window := list(itertools.islice(samples, self.batch * len(self.source.sizes))):
            found: dict[int, dict[str, bytes]] = {}
            for size in self.source.sizes:  # a batch has one size
                alike = [i for i, (_, sample) in enumerate(window) if sample.size == size]
                for first in range(0, len(alike), self.batch):
                    places = alike[first : first + self.batch]
                    found |= zip(places, self._encode([window[i] for i in places]), strict=True)
            yield from ((key, found[i]) for i, (key, _) in enumerate(window) if found[i])

    @torch.no_grad()
    def _encode(self, samples: Sequence[tuple[str, Decoded]]) -> Iterator[dict[str, bytes]]:
        """The members of samples of one size; none of a sample that is left out."""
        pixels = torch.from_numpy(np.stack([sample.image for _, sample in samples])).permute(0, 3, 1, 2)
        images = pixels.float().div_(127.5).sub_(1).to(self.conditioning.device)
        moments = self.conditioning.first_stage.moments(images).float().cpu()
        mirrored = [None] * len(samples)
        if self.source.flip:
            mirrored = list(self.conditioning.first_stage.moments(images.flip(3)).float().cpu())
        text, pooled = self._text([sample.caption for _, sample in samples])
        vectors = [None] * len(samples) if pooled is None else pooled
        for (key, sample), own, other, words, vector in zip(samples, moments, mirrored, text, vectors, strict=True):
            unusable = [tensor for tensor in (own, other) if tensor is not None and not tensor.half().isfinite().all()]
            if unusable:
                logger.warning("left out: the latents of %s are not finite in float16", key)
                yield {}
                continue
            hint = np.ascontiguousarray(sample.hint)
            yield cached.members(own, other, hint, sample.caption, words, vector, self._time_ids(sample))

    def _time_ids(self, sample: Decoded) -> list[tuple[int, ...]] | None:
        """Those of a sample, and where flips are on of the mirrored one; None for a model that is not told them."""
        if not self.has_vector:
            return None
        flips = (False, True) if self.source.flip else (False,)
        return [sample.placement._replace(flip=flip).time_ids(sample.original) for flip in flips]


def _check_crop(train: Mapping[str, Any]) -> None:
    """Raises DataError for a crop that differs from epoch to epoch: it cannot be encoded once."""
    crop, buckets = train["augmentations"]["random_crop_h_w"], train.get("buckets") or {}
    for name, value, instead in (
        ("augmentations.random_crop_h_w", crop, "center_crop_h_w"),
        ("buckets.random_crop", buckets.get("random_crop"), "false"),
    ):
        if value:
            raise DataError(
                f"data.train.{name} is {value}; expected {instead}: a crop that differs from epoch to epoch cannot be"
                " encoded once"
            )


def encode(config_file: str | Path, output: Path, overrides: Sequence[str] = (), *, states: bool = False) -> None:
    """Encodes the shards of a configuration on this rank, and exits the process with a message when it cannot.

    Args:
        config_file: YAML.
        output: folder of the encoded shards.
        overrides: settings that replace the file's, `key=value`.
        states: store the text encoder's states instead of token numbers.
    """
    try:
        cfg = config.load(config_file, overrides)
        world = start(cfg.trainer.devices, cfg.trainer.num_nodes, cfg.trainer.accelerator, cfg.trainer.rank_timeout)
        conditioning = build.build_conditioning(cfg.model, precision=cfg.trainer.precision).to(world.device)
        encoder = Encoder(cfg, conditioning, world, output, states)
        world.on_first(encoder.begin)
        encoder.run()
        world.gather(None)  # until every rank has written its shards
        count = world.on_first(encoder.finish)
    except (ValueError, OSError, ImportError, RankError) as error:
        command.fail(f"error: {error}")
    if world.is_first:
        _report(encoder.tree, count, output)
    world.close()


def _report(tree: Mapping[str, Any], count: int, output: Path) -> None:
    size = sum(path.stat().st_size for path in output.glob("*.tar"))
    logger.info("%d samples in %s, %.1f kB each", count, output, size / max(count, 1) / 1e3)
