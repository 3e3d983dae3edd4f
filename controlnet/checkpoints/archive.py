"""NeMo's .nemo archives: a tar file with `model_config.yaml` and the pickle `model_weights.ckpt`.

Nothing is ever unpacked under a name that the archive chose, nor more than an archive of its size can hold; an archive
with a name that leaves its folder is refused as a whole.
"""

import bz2
import contextlib
import gzip
import io
import lzma
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from controlnet.checkpoints.errors import CheckpointError
from controlnet.common import tar

WEIGHTS = "model_weights.ckpt"
CONFIG = "model_config.yaml"
_UNPACK = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}  # the archives of older releases are compressed
_RATIO = 100  # how much a compressed archive may unpack to, over its size; weights reach 1.1
_ROOM = 1 << 24  # bytes beyond the ratio: what a small archive of zeros may unpack to
_CHUNK = 1 << 20
_LARGEST_CONFIG = 1 << 24  # bytes; real ones have some ten thousand


@contextlib.contextmanager
def weights(path: Path) -> Iterator[Path]:
    """The archive's weights as a temporary file, which is gone afterwards; what was mapped from it stays readable.

    Raises:
        CheckpointError: a damaged or foreign archive, one with path tricks or sparse members, and one without a single
            model_weights.ckpt (of a model that was saved in several parallel pieces, or distributed).
    """
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / WEIGHTS
        with open(target, "wb") as file, _member(path, WEIGHTS) as (archive, size):
            _copy(archive, file, size)
        yield target


def read_config(path: Path) -> str:
    """The text of the archive's model_config.yaml.

    Raises:
        CheckpointError: as `weights`; or a configuration that is no text, or larger than any is.
    """
    text = io.BytesIO()
    with _member(path, CONFIG) as (archive, size):
        if size > _LARGEST_CONFIG:
            raise CheckpointError(f"{path} is refused: its {CONFIG} has {size} bytes")
        _copy(archive, text, size)
    try:
        return text.getvalue().decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: its {CONFIG} is not UTF-8: {error}") from error


@contextlib.contextmanager
def _member(path: Path, name: str) -> Iterator[tuple[BinaryIO, int]]:
    """The archive open at its one member of that name, and how many bytes that has."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            with _uncompressed(path, Path(folder)) as archive:
                member = _find(path, list(tar.members(archive)), name)
                end = archive.seek(0, io.SEEK_END)
                if member.offset + member.size > end:
                    raise CheckpointError(
                        f"{path} is cut off: {name} has {max(0, end - member.offset)} of {member.size} bytes"
                    )
                archive.seek(member.offset)
                yield archive, member.size
        except (tar.TarDamage, zlib.error, lzma.LZMAError, EOFError, gzip.BadGzipFile) as error:
            raise CheckpointError(f"{path} is damaged, or no .nemo archive: {error}") from error


@contextlib.contextmanager
def _uncompressed(path: Path, folder: Path) -> Iterator[BinaryIO]:
    """The archive open for reading; a compressed one is unpacked into the folder, within bounds."""
    with open(path, "rb") as file:
        packed = tar.compression(file.read(6))
        if packed is None:
            yield file
            return
    if packed not in _UNPACK:
        raise CheckpointError(f"{path} is compressed by {packed}; expected a tar archive, plain or by gzip, bzip2, xz")
    most = _RATIO * path.stat().st_size + _ROOM
    with _UNPACK[packed](path) as file, tempfile.TemporaryFile(dir=folder) as plain:
        if _copy(file, plain, most + 1) > most:
            raise CheckpointError(f"{path} is refused: it unpacks to more than {_RATIO} times its size")
        plain.flush()
        yield plain


def _copy(source: BinaryIO, target: BinaryIO, size: int) -> int:
    """Copies up to `size` bytes; returns how many there were."""
    copied = 0
    while copied < size and (chunk := source.read(min(_CHUNK, size - copied))):
        target.write(chunk)
        copied += len(chunk)
    return copied


def _find(path: Path, members: list[tar.Member], wanted: str) -> tar.Member:
    for member in members:
        name = PurePosixPath(member.name)
        if name.is_absolute() or ".." in name.parts or "\\" in member.name:
            raise CheckpointError(f"{path} is refused: its member {member.name!r} would leave the archive's folder")
    found = [member for member in members if PurePosixPath(member.name).name == wanted]
    if len(found) != 1:
        names = ", ".join(member.name for member in members[:6])
        raise CheckpointError(f"{path} has {len(found)} members {wanted} ({names}); expected one")
    if found[0].sparse:
        raise CheckpointError(
            f"{path} is refused: its member {found[0].name!r} is sparse: it claims more than it holds"
        )
    if not found[0].regular:
        raise CheckpointError(f"{path} is refused: its member {found[0].name!r} is a link or a device, not a file")
    return found[0]


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
