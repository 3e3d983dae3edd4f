"""Walks the headers of a tar that nobody vouches for.

`tarfile` believes what a header claims: an extension header of 2^45 bytes is read into memory, thousands in a row are
read recursively, a sparse member of a few bytes unpacks to gigabytes, and what follows an end mark is not seen. This
walk reads 512 bytes at a time, checks each claim against the file's size, and lists members; nothing is unpacked.
"""

import os
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

BLOCK = tarfile.BLOCKSIZE
MAX_EXTENSION_BYTES = 1 << 20  # real ones hold a path
MAX_EXTENSIONS = 8  # before one member; real ones come in twos: a global and a local one, a long name and a long link
COMPRESSIONS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
}

_SCAN = 1 << 20  # bytes read at a time where only zeros are expected
_EXTENSIONS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
_WITHOUT_DATA = (
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.DIRTYPE,
    tarfile.FIFOTYPE,
)


class TarDamage(Exception):
    """The rest of this tar cannot be read; the message says why."""


class Member(NamedTuple):
    """One entry of a tar.

    Attributes:
        name: with its folders, as it stands in the archive.
        offset: of its bytes in the file.
        size: of its bytes; they may end past the end of a file that was cut.
        regular: a plain file whose bytes stand there as they are; not a folder, link, device or sparse file.
        sparse: a file with holes, whose bytes there are not its content.
        link: a symbolic or hard link, whose bytes are elsewhere.
    """

    name: str
    offset: int
    size: int
    regular: bool
    sparse: bool
    link: bool = False


def compression(start: bytes) -> str | None:
    """What a file that starts with these bytes (at least 6) is compressed with, or None."""
    return next((name for magic, name in COMPRESSIONS.items() if start.startswith(magic)), None)


def members(file: BinaryIO) -> Iterator[Member]:
    """The members of an uncompressed tar, or of several written one after the other (`cat a.tar b.tar`).

    Args:
        file: a real file, open for reading; its position is not used.

    Yields:
        the members in order.

    Raises:
        TarDamage: after the members in front of the damage: a header that is none, an extension header that claims more
            than MAX_EXTENSION_BYTES or than the file holds, more than MAX_EXTENSIONS of them in a row, no end mark.
        OSError: the file cannot be read.
    """
    number, end, at = file.fileno(), os.fstat(file.fileno()).st_size, 0
    shared: dict[str, str] = {}  # of global headers: they hold for all members that follow
    while True:
        member, at = _next_member(number, at, end, shared)
        if member is not None:
            yield member
            continue
        at = _after_zeros(number, at, end)
        if at >= end:
            return
        if at + BLOCK > end:
            raise TarDamage("bytes that are no tar follow its end mark")
        shared = {}


def _next_member(number: int, at: int, end: int, shared: dict[str, str]) -> tuple[Member | None, int]:
    """The member whose headers start at `at` and the offset of what follows it; None, and `at`, at an end mark."""
    local: dict[str, str] = {}
    for _ in range(MAX_EXTENSIONS + 1):
        if at + BLOCK > end:
            raise TarDamage("it ends without an end mark")
        block = os.pread(number, BLOCK, at)
        if block == bytes(BLOCK):
            if local:
                raise TarDamage("an extension header without a member")
            return None, at
        header = _parsed(block)
        if header.type in _EXTENSIONS:
            at = _extend(number, at, end, header, local, shared)
        else:
            return _member(number, at, header, block, {**shared, **local})
    raise TarDamage(f"more than {MAX_EXTENSIONS} extension headers in a row")


def _parsed(block: bytes) -> tarfile.TarInfo:
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise TarDamage(f"a header is damaged ({error})") from error
    if header.size < 0:  # a reader that believes it goes back, and round and round
        raise TarDamage(f"a header claims {header.size} bytes")
    return header


def _extend(
    number: int, at: int, end: int, header: tarfile.TarInfo, local: dict[str, str], shared: dict[str, str]
) -> int:
    """Reads the extension header at `at` into `local` or `shared`; the offset of the next header."""
    if header.size > MAX_EXTENSION_BYTES or at + BLOCK + header.size > end:
        raise TarDamage(f"an extension header claims {header.size} bytes")
    data = os.pread(number, header.size, at + BLOCK)
    if header.type == tarfile.GNUTYPE_LONGNAME:
        local["path"] = data.partition(b"\0")[0].decode("utf-8", "surrogateescape")
    elif header.type == tarfile.XGLTYPE:
        shared.update(_records(data))
    elif header.type != tarfile.GNUTYPE_LONGLINK:
        local.update(_records(data))
    return at + BLOCK + _blocks(header.size)


def _records(data: bytes) -> Iterator[tuple[str, str]]:
    """The "LENGTH KEY=VALUE\\n" records of a pax header."""
    while data.strip(b"\0"):
        length, _, rest = data.partition(b" ")
        if not length.isdigit() or len(length) > 8 or not len(length) + 2 <= int(length) <= len(data):
            raise TarDamage("a pax record has a wrong length")
        record = rest[: int(length) - len(length) - 1]
        key, equals, value = record.partition(b"=")
        if not equals or not value.endswith(b"\n"):
            raise TarDamage("a pax record is no KEY=VALUE")
        yield key.decode("utf-8", "surrogateescape"), value[:-1].decode("utf-8", "surrogateescape")
        data = data[int(length) :]


def _member(
    number: int, at: int, header: tarfile.TarInfo, block: bytes, extended: dict[str, str]
) -> tuple[Member, int]:
    """The member of the header at `at`, and the offset of the next header."""
    size = header.size
    if "size" in extended:
        if not extended["size"].isdecimal() or len(extended["size"]) > 18:
            raise TarDamage(f"a pax header claims a size of {extended['size'][:20]!r}")
        size = int(extended["size"])
    at += BLOCK
    sparse = header.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse.") for key in extended)
    if header.type == tarfile.GNUTYPE_SPARSE:
        more, offset_of_flag = block[482], 504
        while more:  # blocks that go on with the list of holes
            block = os.pread(number, BLOCK, at)
            if len(block) < BLOCK:
                raise TarDamage("it ends inside a header")
            more, at = block[offset_of_flag], at + BLOCK
    name = extended.get("GNU.sparse.name", extended.get("path", header.name))
    link = header.type in (tarfile.LNKTYPE, tarfile.SYMTYPE)
    member = Member(name, at, size, header.isreg() and not sparse, sparse, link)
    return member, at if header.type in _WITHOUT_DATA else at + _blocks(size)


def _blocks(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _after_zeros(number: int, at: int, end: int) -> int:
    """The offset of the block with the first byte that is not zero, from `at` on; `end` where there is none."""
    while at < end:
        chunk = os.pread(number, _SCAN, at)
        if not chunk:
            return end
        if chunk.count(0) < len(chunk):
            first = len(chunk) - len(chunk.lstrip(b"\0"))
            return at + first // BLOCK * BLOCK
        at += len(chunk)
    return end
