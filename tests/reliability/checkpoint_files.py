"""Mutated checkpoint files: each is read as tensors or refused by one CheckpointError, in bounded time and memory."""

import collections
import io
import pickle
import random
import tempfile
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from controlnet.checkpoints import CheckpointError, archive, read

_SECONDS = 5.0  # of processor time for a file of a few kilobytes
_BYTES = 1 << 26  # of Python's own memory, likewise
_OPCODES = b"(.0aberstuQRcK]}X\x80\x81\x85\x86\x87\x88\x89\x8aGhjqN)"


def content() -> dict[str, object]:
    """What a training framework saves: tensors that share memory, and plain data beside them."""
    shared = torch.arange(6.0)
    tensors = {"a.weight": torch.ones(3, 4, dtype=torch.float16), "b": shared, "c": shared[2:5], "n": torch.tensor(3)}
    return {"state_dict": tensors, "epoch": 3, "lr": [0.1, 0.2], "callbacks": {"best": 0.5, "path": None}}


def seeds(folder: Path) -> dict[str, bytes]:
    """One good file of each kind that the readers take, by name."""
    tensors = content()["state_dict"]
    torch.save(content(), folder / "new.ckpt")
    torch.save(content(), folder / "old.pt", _use_new_zipfile_serialization=False)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "x.safetensors")
    archive.write(folder / "x.nemo", folder / "new.ckpt", "{}")
    plain = io.BytesIO()
    pickle.dump({"a": 1}, plain, protocol=2)
    (folder / "plain.bin").write_bytes(plain.getvalue())
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def mutated(good: bytes, rng: random.Random) -> bytes:
    """Bits flipped, bytes cut off, repeated, exchanged for opcodes of pickle or for the largest numbers."""
    data = bytearray(good)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        place, kind = rng.randrange(max(len(data), 1)), rng.randrange(6)
        if kind == 0:
            data[place : place + 1] = bytes([data[place] ^ 1 << rng.randrange(8)]) if data else b"\0"
        elif kind == 1:
            data[place : place + 1] = bytes([rng.choice(_OPCODES)])
        elif kind == 2:
            del data[place : place + rng.choice((1, 2, 8, len(data)))]
        elif kind == 3:
            data[place:place] = data[place : place + rng.randrange(1, 64)]
        elif kind == 4:
            size = rng.choice((2, 4, 8))
            data[place : place + size] = rng.choice((b"\xff", b"\x00", b"\x7f")) * (size - 1) + b"\x7f"
        else:
            other = rng.randrange(max(len(data), 1))
            data[place : place + 4] = data[other : other + 4]
    return bytes(data)


def repacked(good: bytes, rng: random.Random) -> bytes:
    """A zip archive whose pickle is mutated and whose checksums are right, so that the pickle's reader sees it."""
    with zipfile.ZipFile(io.BytesIO(good)) as archive_file:
        entries = {entry.filename: archive_file.read(entry) for entry in archive_file.infolist()}
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive_file:
        for name, data in entries.items():
            archive_file.writestr(name, mutated(data, rng) if name.endswith("data.pkl") else data)
    return out.getvalue()


def attempt(path: Path) -> str:
    """What reading a file comes to: "read", "refused", or one of the defects."""
    tracemalloc.reset_peak()
    begin = time.process_time()
    try:
        tensors = read(path)
        outcome = "read" if all(tensor.numel() < 1 << 20 for tensor in tensors.values()) else "accepted damage"
    except CheckpointError as error:
        outcome = "refused" if path.name in str(error) else "raised"
    except Exception:
        outcome = "raised"
    if time.process_time() - begin > _SECONDS:
        return "hung"
    return "raised" if tracemalloc.get_traced_memory()[1] > _BYTES else outcome


def campaign(rounds: int, seed: int) -> dict[str, int]:
    counts: collections.Counter[str] = collections.Counter()
    rng = random.Random(seed)
    tracemalloc.start()
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder)
            good = seeds(path)
            for _ in range(rounds):
                name = rng.choice(sorted(good))
                change: Callable[[bytes, random.Random], bytes] = mutated
                if name == "new.ckpt" and rng.random() < 0.7:
                    change = repacked
                (path / name).write_bytes(change(good[name], rng))
                counts[attempt(path / name)] += 1
    finally:
        tracemalloc.stop()
    return dict(counts)
