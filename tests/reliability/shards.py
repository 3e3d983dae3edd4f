"""Damaged shards: what is found lies inside the file and is one sample, and nothing but drops is said of the rest."""

import collections
import io
import random
import re
import tarfile
import tempfile
import time
from pathlib import Path

from controlnet.data.shards import index_shard

EXTENSIONS = (("jpg", "image"), ("txt", "caption"), ("png", "hint"))
FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
KINDS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.GNUTYPE_SPARSE)
SAMPLES = 6
NAME = re.compile(rb"\A<((?:x+/)?[ab](\d)\2)\|")  # what a member begins with; no bit flip makes one of another
SECONDS = 5  # a shard of some kilobytes takes milliseconds


def whole(archive_format: int, prefix: str) -> bytes:
    """A shard whose members begin with the name of their sample; some names need an extension header."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=archive_format) as archive:
        for number in range(SAMPLES):
            long = "x" * 120 + "/" if archive_format != tarfile.USTAR_FORMAT and number % 2 else ""
            for extension, role in EXTENSIONS:
                content = f"<{long}{prefix}{number}{number}|{role}>".encode() * (1 + 40 * number)
                header = tarfile.TarInfo(f"{long}{prefix}{number}.{extension}")
                header.size = len(content)
                archive.addfile(header, io.BytesIO(content))
    return buffer.getvalue()


def _header(rng: random.Random) -> bytes:
    """A header, right in itself, of any kind and claim."""
    info = tarfile.TarInfo(rng.choice(["a0.jpg", "a1.txt", "b.png", "x"]))
    info.type = rng.choice([*KINDS, tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE, b"Z"])
    few = [] if info.type == tarfile.GNUTYPE_LONGNAME else [1, 511, 512, 513]  # would take the next header for a name
    info.size = rng.choice([0, *few, 1 << 20, 1 << 31, 1 << 33, 1 << 45, 1 << 62, 1 << 80])
    return info.tobuf(tarfile.GNU_FORMAT)


def damage(good: bytes, rng: random.Random, *, only: bool) -> bytes:
    """The shard with one fault; `only` where it has no other.

    A header written over another is one of them: with a second fault that hides the first header's own place, it makes
    a sample of two, and no reader of a tar could tell.
    """
    content, place = bytearray(good), rng.randrange(len(good))
    block = place // 512 * 512
    kind = rng.randrange(7 if only else 6)
    if kind == 0:
        content[place] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del content[place:]
    elif kind == 2:
        content[block:block] = _header(rng) * rng.choice([1, 1, 2, 9, 3000])
    elif kind == 3:
        content[block : block + 512] = bytes(512) * rng.choice([0, 1, 2])
    elif kind == 4:
        content[block : block + 512] = rng.randbytes(512)
    elif kind == 5:
        field = rng.choice([rng.randbytes(12), b"%011o\0" % rng.getrandbits(33), b"\xff" + rng.randbytes(11)])
        content[block + 124 : block + 136] = field
        checked = content[block : block + 148] + b" " * 8 + content[block + 156 : block + 512]
        content[block + 148 : block + 156] = b"%06o\0 " % (sum(checked) % 0o1000000)
    else:
        headers = [at for at in range(0, len(good), 512) if good[at + 257 : at + 262] == b"ustar"]
        if headers:
            block, other = rng.choice(headers), rng.choice(headers)
            content[block : block + 512] = content[other : other + 512]
    return bytes(content)


def judged(path: Path, size: int) -> str:
    """How the index of a shard stands the damage."""
    begin = time.process_time()
    try:
        index = index_shard(str(path), EXTENSIONS)
    except Exception:
        return "raised"
    if time.process_time() - begin > SECONDS:
        return "hung"
    with open(path, "rb") as file:
        for sample in index.samples:
            names = set()
            for at, length in sample.members.values():
                if at < 0 or length < 0 or at + length > size:
                    return "accepted damage"
                file.seek(at)
                names.update(match.group(1) for match in NAME.finditer(file.read(min(length, 200))))
            if len(names) > 1:
                return "accepted damage"  # members of two samples in one
    return "dropped" if index.drops else "whole"


def campaign(rounds: int, seed: int) -> dict[str, int]:
    rng = random.Random(seed)
    counts: collections.Counter[str] = collections.Counter()
    goods = [whole(archive_format, prefix) for archive_format in FORMATS for prefix in ("a", "b")]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard.tar"
        for _ in range(rounds):
            content = rng.choice(goods)
            if rng.random() < 0.2:
                content += rng.choice(goods)
            faults = rng.choice([1, 1, 1, 2, 4])
            for _ in range(faults):
                content = damage(content, rng, only=faults == 1) if content else content
            path.unlink(missing_ok=True)
            path.write_bytes(content)
            index_shard.cache_clear()  # faster than the clock of a file system ticks
            counts[judged(path, len(content))] += 1
    return counts
