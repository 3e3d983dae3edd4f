"""NeMo's .nemo archives: a tar file with `model_config.yaml` and the pickle `model_weights.ckpt`.

Nothing is ever unpacked under a name that the archive chose, and an archive with a name that leaves its folder, a link
or a device in it is refused as a whole.
"""

import bz2
import contextlib
import gzip
import io
import lzma
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from controlnet.checkpoints.errors import CheckpointError

WEIGHTS = "model_weights.ckpt"
CONFIG = "model_config.yaml"


_PACKED = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}  # the compressed archives of older releases
_RATIO = 100  # how much a compressed archive may unpack to, over its size; weights reach 1.1
_ROOM = 1 << 24  # bytes, beyond the ratio: what a small archive of zeros may unpack to
_HEADERS = 1 << 20  # bytes, of one header that extends another: names and times


class _Bounded:
    """A tar archive to read from, which gives no header and no content beyond what an archive of its size can hold.

    tarfile believes what a header claims: it would ask for 2^45 bytes at once, or unpack without end.
    """

    def __init__(self, file: BinaryIO, most: int):
        self.file = file
        self.most = most

    def read(self, size: int) -> bytes:
        if size > _HEADERS or self.file.tell() + size > self.most:
            raise tarfile.ReadError(f"{size} bytes wanted at {self.file.tell()}, of {self.most} at most")
        return self.file.read(size)

    def seek(self, position: int) -> None:
        if position > self.most:
            raise tarfile.ReadError(f"its headers lead to byte {position}, of {self.most} at most")
        self.file.seek(position)

    def tell(self) -> int:
        return self.file.tell()


@contextlib.contextmanager
def weights(path: Path) -> Iterator[Path]:
    """The archive's weights as a temporary file, which is gone afterwards; what was mapped from it stays readable.

    Raises CheckpointError for a damaged or foreign archive, one with path tricks, and one without a single
    model_weights.ckpt (of a model that was saved in several parallel pieces, or distributed).
    """
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / WEIGHTS
        try:
            with _opened(path) as bounded, tarfile.open(fileobj=bounded, mode="r:") as archive:
                member = _weights_member(path, archive)
                source = archive.extractfile(member)
                with open(target, "wb") as file:
                    shutil.copyfileobj(source, file, _HEADERS)
        except (PermissionError, CheckpointError):
            raise
        except (tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is damaged, or no .nemo archive: {error}") from error
        if target.stat().st_size != member.size:
            raise CheckpointError(f"{path} is cut off: {WEIGHTS} has {target.stat().st_size} of {member.size} bytes")
        yield target


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[_Bounded]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        unpack = _PACKED.get(file.read(2))
    with open(path, "rb") if unpack is None else unpack(path) as file:
        yield _Bounded(file, size if unpack is None else _RATIO * size + _ROOM)


def write(path: Path, weights_file: Path, config: str) -> None:
    """Writes an archive of a weights file and the text of model_config.yaml."""
    with tarfile.open(path, "w") as archive:
        content = config.encode()
        header = tarfile.TarInfo(f"./{CONFIG}")
        header.size = len(content)
        archive.addfile(header, io.BytesIO(content))
        header = tarfile.TarInfo(f"./{WEIGHTS}")
        header.size = weights_file.stat().st_size
        with open(weights_file, "rb") as file:
            archive.addfile(header, file)


def _weights_member(path: Path, archive: tarfile.TarFile) -> tarfile.TarInfo:
    members = archive.getmembers()
    for member in members:
        name = PurePosixPath(member.name)
        if name.is_absolute() or ".." in name.parts or "\\" in member.name:
            raise CheckpointError(f"{path} is refused: its member {member.name!r} would leave the archive's folder")
        if not (member.isfile() or member.isdir()):
            raise CheckpointError(f"{path} is refused: its member {member.name!r} is a link or a device, not a file")
        if member.issparse():
            raise CheckpointError(
                f"{path} is refused: its member {member.name!r} is sparse, of bytes that are not there"
            )
    found = [member for member in members if member.isfile() and PurePosixPath(member.name).name == WEIGHTS]
    if len(found) != 1:
        names = ", ".join(member.name for member in members[:6])
        raise CheckpointError(f"{path} has {len(found)} members {WEIGHTS} ({names}); expected one")
    return found[0]
