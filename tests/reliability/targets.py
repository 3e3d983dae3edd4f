"""What reads files that nobody vouches for, as functions of bytes: for a fuzzer, and for the corpus that it left.

`attempt(target, data, folder)` gives the bytes to a reader and raises for anything but what it promises: a result that
holds, or an error of its own kind, in bounded time and memory.
"""

import functools
import hashlib
import io
import json
import pickle
import re
import tarfile
import tempfile
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from controlnet.checkpoints import CheckpointError, archive, folders, read, runs, sources
from controlnet.checkpoints.contents import open_contents
from controlnet.data.hints import HintReader
from controlnet.data.images import ImageError
from controlnet.data.samples import BadSample, read_members
from controlnet.data.shards import DataError, index_shard, read_wdinfo
from tests.reliability import checkpoint_files, manifests, shards

SECONDS = 10.0  # of processor time for a file of some kilobytes; what is read takes milliseconds
BYTES = 1 << 26  # of Python's own memory, likewise


class Defect(Exception):
    """A reader broke its promise; the message says how."""


class Target(NamedTuple):
    """A reader to try.

    Attributes:
        run: gives bytes to the reader, in a folder; raises what the reader raises, or Defect.
        refusals: the errors that the reader may raise.
        seeds: good files.
        mend: gives mutated bytes the checksums that they need to get past the first look at them.
        words: what a mutation may put in.
    """

    run: Callable[[bytes, Path], None]
    refusals: tuple[type[Exception], ...]
    seeds: Callable[[], list[bytes]]
    mend: Callable[[bytes], bytes] = bytes
    words: Sequence[bytes] = ()


def attempt(target: Target, data: bytes, folder: Path) -> bool:
    """Gives the bytes to the reader; returns whether it took them, and raises for what it must not do."""
    tracing = tracemalloc.is_tracing()
    if not tracing:
        tracemalloc.start()
    tracemalloc.reset_peak()
    held, begin = tracemalloc.get_traced_memory()[0], time.process_time()
    try:
        target.run(data, folder)
        taken = True
    except target.refusals:
        taken = False
    finally:
        most = tracemalloc.get_traced_memory()[1] - held
        if not tracing:
            tracemalloc.stop()
    if time.process_time() - begin > SECONDS:
        raise Defect(f"it took {time.process_time() - begin:.1f} s")
    if most > BYTES:
        raise Defect(f"it took {most} bytes")
    return taken


def _shard(data: bytes, folder: Path) -> None:
    path = folder / "0.tar"
    path.write_bytes(data)
    index_shard.cache_clear()
    index = index_shard(str(path), shards.EXTENSIONS)
    for sample in index.samples:
        if sorted(sample.members) != ["caption", "hint", "image"]:
            raise Defect(f"{sample} is not whole")
        for at, size in sample.members.values():
            if at < 0 or size < 0 or at + size > len(data):
                raise Defect(f"{sample} lies outside the file")
        try:
            read_members(sample)
        except BadSample:
            continue


def _file(name: str, read_it: Callable[[Path], object], data: bytes, folder: Path) -> None:
    path = folder / name
    path.write_bytes(data)
    read_it(path)


def _archive(path: Path) -> None:
    archive.read_config(path)
    read(path)


def _safetensors(data: bytes, folder: Path) -> None:
    """The bytes are a header's; what is before and behind it is right, as far as it claims some kilobytes."""
    ends = [int(end) for end in re.findall(rb"(\d{1,4})\s*\]", data)]
    _file("x.safetensors", open_contents, len(data).to_bytes(8, "little") + data + bytes(max(ends, default=0)), folder)


def _pickle(data: bytes, folder: Path) -> None:
    """The bytes are the pickle in a zip archive; the rest of the archive is right."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in {"data.pkl": data, "byteorder": b"little", "version": b"3\n"}.items():
            file.writestr(f"x/{name}", content)
        for number in range(4):
            file.writestr(f"x/data/{number}", bytes(24))
    _file("x.ckpt", read, buffer.getvalue(), folder)


def _folder(data: bytes, folder: Path) -> None:
    """The bytes are config.json and, after a zero byte, the index.json of a diffusers folder."""
    config, _, index = data.partition(b"\0")
    path = folder / "model"
    path.mkdir(exist_ok=True)
    (path / "config.json").write_bytes(config)
    (path / "diffusion_pytorch_model.safetensors.index.json").write_bytes(index)
    for number in (1, 2):
        (path / f"{number}.safetensors").touch()
    for file in sources.resolve(path).files[""]:
        if file.parent != path:
            raise Defect(f"{file} lies outside the folder")
    found = folders.heads(folders.read_config(path), str(path))
    if not found or not all(isinstance(number, int) and number > 0 for number in found.values()):
        raise Defect(f"{found} are no heads")


def _manifest(data: bytes, folder: Path) -> None:
    path = folder / "step-00000001"
    path.mkdir(exist_ok=True)
    (path / "x").write_text("abc")
    (path / runs.MANIFEST).write_bytes(data)
    problem = runs.fault(path)
    if problem is None and b'"x"' not in data:
        raise Defect("complete without its file")
    if problem is not None:
        raise ValueError(problem)


def _run(data: bytes, folder: Path) -> None:
    """The bytes are the config.yaml of a run's checkpoint."""
    path = folder / "step-00000001"
    path.mkdir(exist_ok=True)
    files = {runs.CONTROL: _control_file(), runs.CONFIG: data}
    facts = {}
    for name, content in files.items():
        (path / name).write_bytes(content)
        facts[name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    runs._write_manifest(path / runs.MANIFEST, {"format": runs.FORMAT, "step": 1, "files": facts})
    stated = open_contents(path).stated["control"]
    if not all(isinstance(number, int) for number in stated.values()):
        raise Defect(f"{stated} are no heads")


@functools.cache
def _control_file() -> bytes:
    """The file of a ControlNet of one tensor."""
    from safetensors.torch import save

    return save({"control_model.zero_convs.0.0.weight": torch.zeros(1)})


def _hint(data: bytes, folder: Path) -> None:
    reader = HintReader(5)
    pixels = reader.decode(reader.open(data))
    if pixels.ndim != 3 or pixels.shape[2] != 5 or not np.isfinite(pixels).all():
        raise Defect(f"a hint of shape {pixels.shape}")


def with_checksums(data: bytes) -> bytes:
    """A tar whose headers have the checksums that their content asks for."""
    content = bytearray(data)
    for at in range(0, len(content) - 511, 512):
        if content[at + 257 : at + 262] == b"ustar":
            total = sum(content[at : at + 148]) + 8 * 32 + sum(content[at + 156 : at + 512])
            content[at + 148 : at + 156] = b"%06o\0 " % (total % 0o1000000)
    return bytes(content)


def with_digest(data: bytes) -> bytes:
    """A manifest that ends with its own digest, where it ends with one."""
    own = runs._OWN_DIGEST.search(data)
    if own is None:
        return data
    zeroed = data[: own.start(1)] + runs._NO_DIGEST + data[own.end(1) :]
    return data[: own.start(1)] + hashlib.sha256(zeroed).hexdigest().encode() + data[own.end(1) :]


def _good_files(*suffixes: str) -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        good = checkpoint_files.seeds(Path(folder))
    return [data for name, data in good.items() if name.endswith(suffixes)]


def _good_shards() -> list[bytes]:
    """Of each format one, with short names and long ones, folders, links and two archives in a row."""
    goods = []
    for archive_format in shards.FORMATS:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=archive_format) as file:
            for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.GNUTYPE_SPARSE):
                other = tarfile.TarInfo("a/b.jpg")
                other.type, other.linkname = kind, "c"
                file.addfile(other)
            for name in ("a" if archive_format == tarfile.USTAR_FORMAT else "a" * 120, "\xe4"):
                for extension, _ in shards.EXTENSIONS:
                    header = tarfile.TarInfo(f"{name}.{extension}")
                    header.size = 3
                    file.addfile(header, io.BytesIO(b"abc"))
        goods.append(buffer.getvalue().rstrip(b"\0") + bytes(1536))
    goods = [good + bytes(-len(good) % 512) for good in goods]
    return [*goods, goods[0] + goods[1]]


def _good_headers() -> list[bytes]:
    (file,) = _good_files(".safetensors")
    size = int.from_bytes(file[:8], "little")
    stated = {"__metadata__": {"controlnet.heads": '{"control":{"num_heads":8}}'}}
    entry = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
    return [file[8 : 8 + size], json.dumps({**stated, "control_model.zero_convs.0.0.weight": entry}).encode()]


def _good_pickles() -> list[bytes]:
    pickles = []
    for data in _good_files("new.ckpt"):
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            pickles += [file.read(name) for name in file.namelist() if name.endswith("data.pkl")]
    return [*pickles, *(pickle.dumps({"state_dict": {"a": 1, "b": [(2.0, "x")] * 3}}, number) for number in (1, 2, 4))]


def _good_folders() -> list[bytes]:
    config = {"_class_name": "ControlNetModel", "attention_head_dim": [8, 16], "block_out_channels": [32, 64]}
    index = {"metadata": {"total_size": 1}, "weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    return [json.dumps(config).encode() + b"\0" + json.dumps(index).encode(), b"{}\0{}"]


def _good_manifests() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        path = runs.write(Path(folder), 1, {"x": lambda path: path.write_text("abc")}, {"world_size": 1})
        return [(path / runs.MANIFEST).read_bytes(), *(shape for shape in manifests.SHAPES if len(shape) < 200)]


def _good_configs() -> list[bytes]:
    text = b"model:\n  unet_config: {num_heads: 8}\n  control_stage_config:\n    num_heads: &a 8\n    in_channels: *a\n"
    return [text, b"model: {unet_config: {}, control_stage_config: {}}"]


def _good_wdinfos() -> list[bytes]:
    info = {"tar_files": ["0.tar", "1.tar"], "total_key_count": 4, "chunk_size": 2}
    return [pickle.dumps(info, number) for number in (0, 2, 4, 5)]


def _good_arrays() -> list[bytes]:
    found = []
    for array in (np.zeros((2, 3, 5), np.uint8), np.ones((2, 2, 5), np.float16, "F"), np.zeros((1, 1, 5), bool)):
        buffer = io.BytesIO()
        np.save(buffer, array)
        found.append(buffer.getvalue())
    return found


def _file_target(name: str, read_it: Callable[[Path], object]) -> Callable[[bytes, Path], None]:
    return functools.partial(_file, name, read_it)


# What a mutation may put in, one word after the other.
_JSON = rb"""null true [] {} -1 0 1e999 1.5 "" [[ NaN \ud800 \u0000""".split()
_TAR = [b"ustar\x0000", b"ustar  \0", b"../", b"18 size=0000000000\n", b"22 GNU.sparse.size=99\n", b"10 path=a\n"]
_PICKLES = [b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n", b"ccollections\nOrderedDict\n"]
_PICKLES += [b"cos\nsystem\n", b"X\7\0\0\0storage", b"B\xff\xff\xff\x7f", b"state_dict", b"\x8a\x08", b"\x93", b"\x8f"]
_YAML = b"model: unet_config: control_stage_config: num_heads: <<: !!binary .nan [[[[ 2001-01-01 %YAML".split()
_YAML += [b"&a ", b"*a", b"? ", b"\n- ", b"!!int ", b"!!python/object/apply:os.system ", b"\n---\n"]
_CONFIG = rb"""attention_head_dim num_attention_heads block_out_channels weight_map act_fn "../x" """.split()
_MANIFEST = b"files size sha256 format world_size".split()
_HEADER = b"dtype F32 F8_E4M3 shape data_offsets __metadata__ controlnet.heads".split()
_NPY = b"descr fortran_order shape True '|O' '<f8' '|u1' '<M8[s]' \x93NUMPY\x01 \x93NUMPY\x02".split()

TARGETS = {
    "shard": Target(_shard, (), _good_shards, with_checksums, _TAR),
    "nemo": Target(
        _file_target("x.nemo", _archive), (CheckpointError,), lambda: _good_files(".nemo"), with_checksums, _TAR
    ),
    "safetensors": Target(_safetensors, (CheckpointError,), _good_headers, words=_JSON + _HEADER),
    "pickle": Target(_pickle, (CheckpointError,), _good_pickles, words=_PICKLES),
    "checkpoint": Target(
        _file_target("x.ckpt", read), (CheckpointError,), lambda: _good_files(".ckpt", ".pt", ".bin"), words=_PICKLES
    ),
    "folder": Target(_folder, (CheckpointError,), _good_folders, words=_JSON + _CONFIG),
    "manifest": Target(_manifest, (ValueError,), _good_manifests, with_digest, _JSON + _MANIFEST),
    "run": Target(_run, (CheckpointError,), _good_configs, words=_YAML),
    "wdinfo": Target(_file_target("wdinfo.pkl", read_wdinfo), (DataError,), _good_wdinfos, words=_PICKLES),
    "hint": Target(_hint, (ImageError,), _good_arrays, words=_NPY),
}
