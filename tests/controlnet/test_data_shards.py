"""Which shards are named, and which whole samples a shard holds, however it is damaged."""

import bz2
import gzip
import lzma
import pickle
import struct
import subprocess
import sys
import tarfile
import tracemalloc

import numpy as np
import pytest

from controlnet.data.shards import DataError, index_shard, list_shards
from tests.controlnet.shard_files import members, write_shard, write_tar

EXTENSIONS = (("jpg", "image"), ("txt", "caption"), ("png", "hint"))


def index(path, ignored=()):
    index_shard.cache_clear()
    return index_shard(str(path), EXTENSIONS, ignored)


def reasons(path, ignored=()):
    return [(drop.reason, drop.key) for drop in index(path, ignored).drops]


def content(sample):
    """The bytes of a sample's members by role, read the way `samples.py` reads them."""
    with open(sample.shard, "rb") as file:
        return {role: (file.seek(at), file.read(size))[1] for role, (at, size) in sample.members.items()}


def expected(number):
    return {"image": members(number)["jpg"], "caption": members(number)["txt"], "hint": members(number)["png"]}


@pytest.fixture
def three(tmp_path):
    return [write_shard(tmp_path / f"{i:03d}.tar", [i]) for i in range(3)]


@pytest.mark.parametrize("pattern", ["{000..002}.tar", "*.tar", "0{00,01,02}.tar", "0{00,0[12]}.tar"])
def test_globs_and_brace_lists_name_the_shards(three, tmp_path, pattern):
    paths, count = list_shards([pattern], root=str(tmp_path))
    assert paths == [str(path) for path in three]
    assert count is None


def test_plain_paths_keep_their_order_and_chunk_size_counts_samples(three):
    wanted = [str(three[2]), str(three[0])]
    assert list_shards(wanted, chunk_size=7) == (wanted, 14)
    assert list_shards(wanted[0]).paths == wanted[:1]


def test_wdinfo_names_shards_beside_it_or_under_the_root(three, tmp_path):
    info = {"tar_files": ["001.tar", "002.tar"], "total_key_count": 5, "chunk_size": 3}
    (tmp_path / "wdinfo-a.pkl").write_bytes(pickle.dumps(info))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "wdinfo-b.pkl").write_bytes(pickle.dumps({"tar_files": ["000.tar"], "chunk_size": 9}))
    wanted = [str(three[1]), str(three[2])]
    assert list_shards([str(tmp_path / "wdinfo-a.pkl")]) == (wanted, 5)
    both = list_shards(["wdinfo-a.pkl", "elsewhere/wdinfo-b.pkl"], root=str(tmp_path))
    assert both == ([*wanted, str(three[0])], 14)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ([], "dataset_path is empty"),
        (None, "dataset_path is empty"),
        (["{000..004}.tar"], r"2 of 5 shards are missing: .*003\.tar"),
        (["nothing*.tar"], r"missing: .*nothing\*\.tar"),
        (["000.tar", "*.tar"], r"a shard twice: .*000\.tar"),
        (["wdinfo.pkl"], r"cannot read .*wdinfo\.pkl"),
        (["."], r"\. is a folder; name the tar files in it, as .*\*\.tar"),
        (["https://example.org/0.tar"], "0.tar is an address; .* download the shards"),
        (["s3://bucket/0.tar"], "is an address"),
        (["pipe:curl -s https://example.org/0.tar"], "is an address"),
    ],
)
def test_a_list_that_cannot_be_used_is_one_error(three, tmp_path, patterns, message):
    with pytest.raises(DataError, match=message):
        list_shards(patterns, root=str(tmp_path))


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_a_pickle_that_would_run_code_is_refused_unrun(tmp_path):
    trace = tmp_path / "trace"
    payload = {"tar_files": ["a.tar"], "total_key_count": 1, "chunk_size": 1, "more": Attack(str(trace))}
    (tmp_path / "wdinfo.pkl").write_bytes(pickle.dumps(payload))
    with pytest.raises(DataError, match=r"wdinfo\.pkl is refused: it asks for .*open"):
        list_shards(["wdinfo.pkl"], root=str(tmp_path))
    assert not trace.exists()


@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps(["a.tar"]),
        pickle.dumps({"tar_files": "a.tar", "total_key_count": 1}),
        pickle.dumps({"tar_files": [1], "total_key_count": 1}),
        pickle.dumps({"tar_files": ["a.tar"], "total_key_count": "1"}),
        pickle.dumps({"tar_files": ["a.tar"], "total_key_count": True}),
        pickle.dumps({"tar_files": ["a.tar"], "total_key_count": 1})[:-9],
        b"",
        b"not a pickle",
    ],
)
def test_a_wdinfo_of_another_content_is_one_error(tmp_path, data):
    (tmp_path / "wdinfo.pkl").write_bytes(data)
    with pytest.raises(DataError, match=r"wdinfo\.pkl .*expected a pickled dict"):
        list_shards(["wdinfo.pkl"], root=str(tmp_path))


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04\x95" + (1 << 40).to_bytes(8, "little") + b"}.",  # a frame
        b"}r" + (1 << 31).to_bytes(4, "little") + b".",  # the memo's number of an entry
        b"}p2147483648\n.",
        b"\x8d" + (1 << 40).to_bytes(8, "little") + b"a.",  # a text
        b"\x96" + (1 << 40).to_bytes(8, "little") + b"a.",  # a bytearray
    ],
)
def test_a_wdinfo_that_claims_more_than_it_holds_takes_no_memory(tmp_path, data):
    (tmp_path / "wdinfo.pkl").write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"wdinfo\.pkl .*expected a pickled dict"):
            list_shards(["wdinfo.pkl"], root=str(tmp_path))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_whole_samples_are_found_in_order(tmp_path):
    found = index(write_shard(tmp_path / "a.tar", [3, 1, 2]))
    assert [sample.key for sample in found.samples] == ["00003", "00001", "00002"]
    assert [content(sample) for sample in found.samples] == [expected(3), expected(1), expected(2)]
    assert found.drops == []


def test_shards_of_webdatasets_writer_are_read(tmp_path):
    wds = pytest.importorskip("webdataset")
    with wds.TarWriter(str(tmp_path / "a.tar"), encoder=False) as writer:
        for number in (1, 2):
            writer.write({"__key__": f"folder.d/{number}", **members(number)})
    found = index(tmp_path / "a.tar")
    assert [sample.key for sample in found.samples] == ["folder.d/1", "folder.d/2"]
    assert [content(sample) for sample in found.samples] == [expected(1), expected(2)]


def test_names_of_any_length_and_case_belong_to_their_sample(tmp_path):
    files = members(5)
    long = "x" * 300 + "/key"  # needs an extended header
    names = [(f"{long}.JPG", files["jpg"]), (f"{long}.txt", files["txt"]), (f"{long}.Png", files["png"])]
    found = index(write_tar(tmp_path / "a.tar", names))
    assert [sample.key for sample in found.samples] == [long]
    assert content(found.samples[0]) == expected(5)


A, B = members(1), members(2)


@pytest.mark.parametrize(
    ("files", "whole", "drops"),
    [
        ([("a.jpg", A["jpg"]), ("a.png", A["png"])], [], [("missing caption", "a")]),
        ([("a.txt", A["txt"]), ("a.png", A["png"])], [], [("missing image", "a")]),
        ([("a.jpg", A["jpg"]), ("a.txt", A["txt"])], [], [("missing hint", "a")]),
        # members not adjacent: webdataset makes half samples of it
        (
            [*((f"a.{e}", A[e]) for e in ("jpg", "txt")), *((f"b.{e}", d) for e, d in B.items()), ("a.png", A["png"])],
            ["b"],
            [("key in two places", "a"), ("key in two places", "a")],
        ),
        # the same key twice in a row, and with another sample between
        ([(f"a.{e}", d) for e, d in [*A.items(), *B.items()]], [], [("duplicate member", "a")]),
        (
            [(f"{k}.{e}", d) for k, s in (("a", A), ("b", B), ("a", A)) for e, d in s.items()],
            ["b"],
            [("key in two places", "a")] * 2,
        ),
        # two versions of an image under one stem: webdataset merges them
        (
            [("a.v2.jpg", A["jpg"]), ("a.v3.jpg", B["jpg"]), ("a.txt", A["txt"]), ("a.png", A["png"])],
            [],
            [("unexpected member", "a")],
        ),
        ([*((f"a.{e}", d) for e, d in A.items()), ("a.json", b"{}")], [], [("unexpected member", "a")]),
        ([*((f"a.{e}", d) for e, d in A.items()), ("a.pkl", b"")], [], [("unexpected member", "a")]),
        # files that are no part of a sample: no extension, hidden
        (
            [("README", b""), ("._a.jpg", b""), *((f"a.{e}", d) for e, d in A.items()), ("d/.txt", b"")],
            ["a"],
            [],
        ),
    ],
)
def test_only_exactly_whole_samples_are_used(tmp_path, files, whole, drops):
    path = write_tar(tmp_path / "a.tar", files)
    assert [sample.key for sample in index(path).samples] == whole
    assert reasons(path) == drops


def test_ignored_extensions_may_be_there(tmp_path):
    files = [*((f"a.{e}", d) for e, d in A.items()), ("a.json", b"{}"), ("b.json", b"{}")]
    path = write_tar(tmp_path / "a.tar", files)
    found = index(path, ("json",))
    assert [content(sample) for sample in found.samples] == [expected(1)]
    assert found.drops == []


@pytest.mark.parametrize(("kind", "target"), [(tarfile.SYMTYPE, "/etc/hostname"), (tarfile.LNKTYPE, "a.jpg")])
def test_a_link_is_followed_nowhere_and_said_to_be_one(tmp_path, kind, target):
    path = tmp_path / "a.tar"
    write_tar(path, [("a.jpg", A["jpg"]), ("a.txt", A["txt"])])
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("a.png")
        link.type, link.linkname = kind, target
        archive.addfile(link)
        folder = tarfile.TarInfo("a.old")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    (drop,) = index(path).drops
    assert (drop.reason, drop.key, drop.detail) == ("member is a link", "a", ".png")


def boundaries(path):
    """Every offset at which a header or the data of a member begins or ends."""
    with tarfile.open(path) as archive:
        ends = [(member.offset, member.offset_data, member.offset_data + member.size) for member in archive]
    return sorted({offset for triple in ends for offset in triple})


def test_a_tar_cut_anywhere_gives_its_first_samples_whole_and_says_so(tmp_path):
    whole = write_shard(tmp_path / "whole.tar", [1, 2, 3])
    data, cut = whole.read_bytes(), tmp_path / "cut.tar"
    ends = [max(at + size for at, size in sample.members.values()) for sample in index(whole).samples]
    end_of_archive = -(-ends[-1] // 512) * 512 + 512
    near = {offset + d for offset in boundaries(whole) for d in (-1, 0, 1)} | {end_of_archive - 1, end_of_archive}
    offsets = sorted(near | set(range(0, len(data), 173)))
    assert len([offset for offset in offsets if 0 <= offset < ends[-1]]) > 80
    for offset in offsets:
        if not 0 <= offset < len(data):
            continue
        cut.write_bytes(data[:offset])
        found = index(cut)
        held = sum(end <= offset for end in ends)
        assert [content(sample) for sample in found.samples] == [expected(n) for n in (1, 2, 3)[:held]], offset
        damaged = [drop for drop in found.drops if drop.key == ""]
        assert len(damaged) == (0 if offset >= end_of_archive else 1), offset


def test_damaged_bytes_never_raise_or_reach_outside_the_file(tmp_path):
    data = bytearray(write_shard(tmp_path / "whole.tar", [1, 2]).read_bytes())
    rng, path = np.random.default_rng(0), tmp_path / "damaged.tar"
    for _ in range(150):
        damaged = bytearray(data)
        for at in rng.integers(0, len(data), size=8):
            damaged[at] = rng.integers(256)
        path.write_bytes(damaged)
        for sample in index(path).samples:
            assert all(at >= 0 and at + size <= len(data) for at, size in sample.members.values())


def _with_size_field(header: bytes, field: bytes) -> bytes:
    """A tar header with another size and a right checksum."""
    header = header[:124] + field + header[136:148] + b" " * 8 + header[156:]
    return header[:148] + b"%06o\0 " % sum(header) + header[156:]


def test_a_header_that_points_backwards_ends_the_shard(tmp_path):
    data = write_shard(tmp_path / "whole.tar", [1, 2]).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as archive:
        third = archive.getmembers()[3].offset
    negative = b"\xff" + struct.pack(">q", -third - 512).rjust(11, b"\xff")
    path = tmp_path / "loop.tar"
    path.write_bytes(data[:third] + _with_size_field(data[third : third + 512], negative) + data[third + 512 :])
    found = index(path)
    assert [sample.key for sample in found.samples] == ["00001"]
    assert ("shard damaged", "") in reasons(path)


@pytest.mark.parametrize("data", [b"", b"\0" * 100, b"text", b"text" * 200])
def test_what_is_no_tar_is_one_drop(tmp_path, data):
    (tmp_path / "a.tar").write_bytes(data)
    assert index(tmp_path / "a.tar").samples == []
    assert reasons(tmp_path / "a.tar") == [("shard damaged", "")]


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_a_compressed_tar_is_one_drop_that_says_so(tmp_path, pack):
    whole = write_shard(tmp_path / "whole.tar", [1])
    (tmp_path / "a.tgz").write_bytes(pack(whole.read_bytes()))
    (drop,) = index(tmp_path / "a.tgz").drops
    assert (drop.reason, drop.detail) == (
        "shard compressed",
        pack.__module__.replace("lzma", "xz").replace("bz2", "bzip2"),
    )


def test_shards_written_one_after_the_other_are_read_on(tmp_path):
    parts = [write_shard(tmp_path / f"{n}.tar", numbers).read_bytes() for n, numbers in enumerate([(1, 2), (3,)])]
    (tmp_path / "joined.tar").write_bytes(b"".join(parts))
    found = index(tmp_path / "joined.tar")
    assert [content(sample) for sample in found.samples] == [expected(n) for n in (1, 2, 3)]
    assert found.drops == []
    (tmp_path / "joined.tar").write_bytes(parts[0] + b"no tar" * 100)
    assert [sample.key for sample in index(tmp_path / "joined.tar").samples] == ["00001", "00002"]
    assert reasons(tmp_path / "joined.tar") == [("shard damaged", "")]


def test_a_shard_replaced_under_its_name_is_indexed_anew(tmp_path):
    path = write_shard(tmp_path / "a.tar", [1, 2])
    before = index_shard(str(path), EXTENSIONS)
    assert index_shard(str(path), EXTENSIONS) is before
    write_shard(tmp_path / "b.tar", [3, 4]).replace(path)
    assert [sample.key for sample in index_shard(str(path), EXTENSIONS).samples] == ["00003", "00004"]


def test_a_shard_that_vanished_is_one_drop(tmp_path):
    assert reasons(tmp_path / "gone.tar") == [("shard unreadable (No such file or directory)", "")]


def test_webdataset_is_imported_only_for_brace_lists():
    code = "import sys, controlnet.data; sys.exit('webdataset' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
