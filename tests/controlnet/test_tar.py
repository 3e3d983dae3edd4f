"""The walk over the headers of a tar: the members that tarfile has, in memory and time bounded by the file's size."""

import io
import os
import tarfile
import tracemalloc

import pytest

from controlnet.common.tar import MAX_EXTENSION_BYTES, MAX_EXTENSIONS, TarDamage, members

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def walk(path, content):
    """The members in front of the damage, and the damage."""
    path.write_bytes(content)
    found = []
    with open(path, "rb") as file:
        try:
            for member in members(file):
                found.append(member)
        except TarDamage as damage:
            return found, str(damage)
    return found, None


def archive(kind, names, **options):
    """A tar of files whose content is their number, with a folder, a link and a hard link between them."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=FORMATS[kind], **options) as tar:
        for number, (name, size) in enumerate(names):
            header = tarfile.TarInfo(name)
            header.size = size
            tar.addfile(header, io.BytesIO(bytes([number]) * size))
        for name, type_ in (("folder", tarfile.DIRTYPE), ("link", tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE)):
            header = tarfile.TarInfo(name)
            header.type, header.linkname = type_, names[0][0] if type_ != tarfile.DIRTYPE else ""
            tar.addfile(header)
        header = tarfile.TarInfo("last.txt")
        header.size = 700
        tar.addfile(header, io.BytesIO(b"z" * 700))
    return buffer.getvalue()


NAMES = [("a.jpg", 3), ("x" * 90 + "/b.jpg", 600), ("\u00fc/\u00e9.txt", 0), ("c.png", 512)]
LONG = [*NAMES, ("y" * 300 + "/d.txt", 1), ("e.txt", 513)]


@pytest.mark.parametrize(
    ("kind", "names", "options"),
    [
        ("ustar", NAMES, {}),
        ("gnu", LONG, {}),
        ("pax", LONG, {}),
        ("pax", LONG, {"pax_headers": {"comment": "of all members"}}),
    ],
)
def test_the_members_are_those_of_tarfile(tmp_path, kind, names, options):
    content = archive(kind, names, **options)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        expected = [(member.name, member.offset_data, member.size, member.isreg()) for member in tar]
    found, damage = walk(tmp_path / "a.tar", content)
    assert [(member.name, member.offset, member.size, member.regular) for member in found] == expected
    assert damage is None
    twice, damage = walk(tmp_path / "a.tar", content + content)
    assert [member.name for member in twice] == [name for name, *_ in expected] * 2
    assert damage is None


def test_a_global_header_ends_with_its_archive(tmp_path):
    renamed = archive("pax", NAMES[:1], pax_headers={"path": "everything"})
    found, _ = walk(tmp_path / "a.tar", renamed + archive("gnu", NAMES[:1]))
    assert [member.name for member in found][0] == "everything"
    assert [member.name for member in found][5:] == ["a.jpg", "folder", "link", "hard", "last.txt"]


def header(type_, size, name="a.jpg"):
    info = tarfile.TarInfo(name)
    info.type, info.size = type_, size
    return info.tobuf(tarfile.GNU_FORMAT)


def block(content):
    return content + bytes(-len(content) % 512)


PAX, GLOBAL, LONG_NAME, LONG_LINK = tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK
END = bytes(1024)
FIRST = header(tarfile.REGTYPE, 3) + block(b"abc")


def long_name(text):
    return header(LONG_NAME, len(text) + 1) + block(text.encode() + b"\0")


@pytest.mark.parametrize("type_", [PAX, GLOBAL, LONG_NAME, LONG_LINK])
@pytest.mark.parametrize("size", [MAX_EXTENSION_BYTES + 1, 1 << 33, 1 << 45, 1 << 62, 1 << 80])
def test_an_extension_header_that_claims_much_is_damage_and_costs_nothing(tmp_path, type_, size):
    content = FIRST + header(type_, size) + bytes(1 << 16)
    tracemalloc.start()
    found, damage = walk(tmp_path / "a.tar", content)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [member.name for member in found] == ["a.jpg"]
    assert damage == f"an extension header claims {size} bytes"
    assert peak < 1 << 20


@pytest.mark.parametrize("one", [header(PAX, 11) + block(b"11 foo=bar\n"), long_name("abcd"), header(LONG_LINK, 0)])
def test_extension_headers_in_a_row_are_few(tmp_path, one):
    last = header(tarfile.REGTYPE, 0, "b.jpg") + END
    found, damage = walk(tmp_path / "a.tar", FIRST + one * MAX_EXTENSIONS + last)
    assert len(found) == 2 and damage is None
    for count in (MAX_EXTENSIONS + 1, 3000):
        found, damage = walk(tmp_path / "a.tar", FIRST + one * count + last)
        assert len(found) == 1
        assert damage == f"more than {MAX_EXTENSIONS} extension headers in a row"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (b"5 a=b\n", "no KEY=VALUE"),
        (b"999 a=b\n", "a wrong length"),
        (b"0 a=b\n", "a wrong length"),
        (b"-6 a=b\n", "a wrong length"),
        (b"6 abc\n", "no KEY=VALUE"),
        (b"16 size=-123456\n", "claims a size of '-123456'"),
        (b"32 size=99999999999999999999999\n", "claims a size"),
    ],
)
def test_a_pax_record_that_is_none_is_damage(tmp_path, record, reason):
    found, damage = walk(tmp_path / "a.tar", FIRST + header(PAX, len(record)) + block(record) + FIRST + END)
    assert len(found) == 1
    assert reason in damage


def test_a_pax_size_replaces_that_of_the_header(tmp_path):
    """Sizes from 8 GiB on stand there."""
    record = b"10 size=5\n"
    big = header(PAX, len(record)) + block(record) + header(tarfile.REGTYPE, 0, "b.jpg") + block(b"12345")
    found, damage = walk(tmp_path / "a.tar", big + FIRST + END)
    assert [(member.name, member.size) for member in found] == [("b.jpg", 5), ("a.jpg", 3)]
    assert damage is None


def test_sparse_members_are_named_so_and_skipped_by_what_they_hold(tmp_path):
    old = bytearray(header(tarfile.GNUTYPE_SPARSE, 512, "old.ckpt"))
    old[482] = 1  # a further block lists more holes
    old[483:495] = b"\x80" + (1 << 40).to_bytes(11, "big")
    old[148:156] = b" " * 8
    old[148:156] = b"%06o\0 " % sum(old)
    record = b"22 GNU.sparse.major=1\n"
    new = header(PAX, len(record)) + block(record) + header(tarfile.REGTYPE, 512, "new.ckpt") + bytes(512)
    found, damage = walk(tmp_path / "a.tar", bytes(old) + bytes(512) + b"\1" * 512 + new + FIRST + END)
    assert [(m.name, m.size, m.sparse, m.regular) for m in found] == [
        ("old.ckpt", 512, True, False),
        ("new.ckpt", 512, True, False),
        ("a.jpg", 3, False, True),
    ]
    assert damage is None


def test_a_header_that_points_backwards_or_far_away_ends_the_walk(tmp_path):
    negative = bytearray(header(tarfile.REGTYPE, 0))
    negative[124:136] = b"\xff" * 10 + b"\xfe\x00"
    negative[148:156] = b" " * 8
    negative[148:156] = b"%06o\0 " % sum(negative)
    found, damage = walk(tmp_path / "a.tar", FIRST + bytes(negative) + END)
    assert len(found) == 1 and "claims -512 bytes" in damage
    found, damage = walk(tmp_path / "a.tar", FIRST + header(tarfile.REGTYPE, 1 << 80, "b.jpg") + END)
    assert [member.size for member in found] == [3, 1 << 80]
    assert damage == "it ends without an end mark"


def test_a_million_zeros_after_the_end_are_no_damage(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(FIRST + END)
    os.truncate(path, 3 << 20)
    with open(path, "rb") as file:
        assert len(list(members(file))) == 1
