"""Damaged manifests of checkpoints: each is named as damaged, and none reads as complete."""

import collections
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

from controlnet.training import checkpoint

SHAPES = (
    *(b"", b"[]", b"null", b"1", b'"a"', b"[" * 100_000, b'{"format":1}'),
    *(b'{"format":1,"files":[]}', b'{"format":1,"files":{}}', b'{"format":1,"files":{"x":1}}'),
    *(b'{"format":1,"files":{"x":{}}}', b'{"format":1,"files":{"../x":{"size":3,"sha256":""}}}'),
    b'{"format":1,"files":{"x\\u0000":{"size":3,"sha256":""}}}',
)


def damaged(good: bytes, rounds: int, seed: int) -> Iterator[bytes]:
    """Manifests of another structure, then `rounds` with a bit flipped, bytes cut off, or a piece repeated."""
    yield from SHAPES
    rng = random.Random(seed)
    for _ in range(rounds):
        content, kind = bytearray(good), rng.randrange(4)
        place = rng.randrange(len(content))
        if kind < 2:
            content[place] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del content[place:]
        else:
            content[place:place] = content[place : place + rng.randrange(1, 20)]
        if bytes(content) != good:
            yield bytes(content)


def campaign(rounds: int, seed: int) -> dict[str, int]:
    counts: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        files = {"x": lambda path: path.write_text("abc"), "y": lambda path: path.write_text("abcd")}
        path = checkpoint.write(Path(folder), 1, files, {"world_size": 1})
        manifest = path / checkpoint.MANIFEST
        for content in damaged(manifest.read_bytes(), rounds, seed):
            manifest.write_bytes(content)
            try:
                counts["accepted damage" if checkpoint.fault(path) is None else "named"] += 1
            except Exception:
                counts["raised"] += 1
    return counts
