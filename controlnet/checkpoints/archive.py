"""NeMo's .nemo archives: a tar file with `model_config.yaml` and the pickle `model_weights.ckpt`.

Nothing is ever unpacked under a name that the archive chose, and an archive with a name that leaves its folder, a link
or a device in it is refused as a whole.
"""

import contextlib
import io
import lzma
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

WEIGHTS = "model_weights.ckpt"
CONFIG = "model_config.yaml"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: names the file, what it holds and what was expected."""


@contextlib.contextmanager
def weights(path: Path) -> Iterator[Path]:
    """The archive's weights as a temporary file, which is gone afterwards; what was mapped from it stays readable.

    Raises CheckpointError for a damaged or foreign archive, one with path tricks, and one without a single
    model_weights.ckpt (of a model that was saved in several parallel pieces, or distributed).
    """
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / WEIGHTS
        try:
            # "r:*" also takes the compressed archives of older releases
            with tarfile.open(path, "r:*") as archive:
                member = _weights_member(path, archive)
                source = archive.extractfile(member)
                with open(target, "wb") as file:
                    shutil.copyfileobj(source, file)
        except (tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError) as error:
            if isinstance(error, PermissionError):
                raise
            raise CheckpointError(f"{path} is damaged, or no .nemo archive: {error}") from error
        if target.stat().st_size != member.size:
            raise CheckpointError(f"{path} is cut off: {WEIGHTS} has {target.stat().st_size} of {member.size} bytes")
        yield target


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
    found = [member for member in members if member.isfile() and PurePosixPath(member.name).name == WEIGHTS]
    if len(found) != 1:
        names = ", ".join(member.name for member in members[:6])
        raise CheckpointError(f"{path} has {len(found)} members {WEIGHTS} ({names}); expected one")
    return found[0]
