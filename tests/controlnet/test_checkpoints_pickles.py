"""Pickles as people have them: objects beside the tensors, dictionaries without end, files that are something else."""

import argparse
import collections
import datetime
import functools
import pathlib
import pickle
import subprocess
import sys
import types
import zipfile

import numpy as np
import pytest
import torch

import controlnet
from controlnet import CheckpointError, checkpoints
from controlnet.checkpoints import weights
from controlnet.model.unet import UNet
from tests.controlnet import formats
from tests.controlnet.formats import PREFIXES, original, save

# what stands beside the tensors


class Settings:
    """A class of a package that the reader does not have."""

    def __init__(self):
        self.rate, self.inner = 0.1, {"a": [1]}


class AttrDict(dict):
    pass


class AttrList(list):
    pass


BESIDE = {
    "argparse": argparse.Namespace(lr=1e-5),
    "array": np.arange(6, dtype=np.float32).reshape(2, 3),
    "number": np.float64(0.5),
    "big-endian array": np.arange(3, dtype=">i4"),
    "torch version": torch.__version__,
    "set": {1, 2},
    "path": pathlib.Path("/a"),
    "pure path": pathlib.PurePosixPath("/a"),
    "date": datetime.datetime(2026, 1, 1),
    "ordered": collections.OrderedDict(a=1),
    "default": collections.defaultdict(list, {"a": [1]}),
    "queue": collections.deque([1, 2]),
    "range": range(3),
    "object": Settings(),
    "dictionary class": AttrDict(a=1, b=AttrDict(c=2)),
    "list class": AttrList([1, 2]),
    "size": torch.Size([1, 2]),
    "random state": np.random.RandomState(0).get_state(),
    "frozen": frozenset({1}),
    "simple": types.SimpleNamespace(a=1),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", BESIDE)
def test_objects_beside_the_tensors_are_read_over(tmp_path, name, zipped, monkeypatch):
    content = {"state_dict": {"a": torch.ones(2)}, "hyper_parameters": BESIDE[name], "epoch": 3}
    torch.save(content, tmp_path / "x.ckpt", _use_new_zipfile_serialization=zipped)
    for cls in (Settings, AttrDict, AttrList):
        monkeypatch.delattr(sys.modules[__name__], cls.__name__)  # nothing is imported or looked up
    assert list(checkpoints.read(tmp_path / "x.ckpt")) == ["a"]


class Call:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("call", [
    Call(eval, "1"), Call(getattr, "a", "upper"), Call(subprocess.getoutput, "true"), Call(functools.partial, "x"),
    Call(pickle.loads, b"N."), Call(torch.load, "x"), Call(np.load, "x"), Call(sys.exit, 1),
], ids=lambda call: call.call[0].__name__)  # fmt: skip
def test_functions_beside_the_tensors_are_refused_by_name(tmp_path, call, zipped):
    content = {"state_dict": {"a": torch.ones(2)}, "extra": call}
    torch.save(content, tmp_path / "x.ckpt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=rf"asks to load \S*{call.call[0].__name__}.*can run code"):
        checkpoints.read(tmp_path / "x.ckpt")


def test_a_whole_model_saved_as_an_object(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"an object of the class Linear, saved whole; expected a dictionary"):
        checkpoints.read(tmp_path / "x.pth")


def nested(depth):
    content = {"w": torch.zeros(1)}
    for _ in range(depth):
        content = {"a": content}
    return content


def many(levels):
    """Each dictionary names the next one twice: 2^levels entries in a small file."""
    content = {"w": torch.zeros(1)}
    for _ in range(levels):
        content = {"a": content, "b": content}
    return content


@pytest.mark.parametrize("content", [nested(50_000), {"state_dict": nested(100)}, many(60), many(22)])
def test_dictionaries_without_end(tmp_path, content):
    torch.save({"w": torch.zeros(1)}, tmp_path / "x.ckpt")  # the pickle itself: torch.save would recurse
    data = b"\x80\x02" + deep_pickle(content) + b"."
    rewrite(tmp_path / "x.ckpt", "data.pkl", data)
    with pytest.raises(CheckpointError, match="contain themselves, or lie 64 deep|entries in its dictionaries"):
        checkpoints.read(tmp_path / "x.ckpt")


def deep_pickle(content):
    """Protocol 2 of nested dictionaries without recursion; a dictionary named twice is written once."""
    order, seen, waiting = [], {}, [content]
    while waiting:
        node = waiting.pop()
        if id(node) not in seen:
            seen[id(node)] = len(seen)
            order.append(node)
            waiting += [value for value in node.values() if isinstance(value, dict)]
    out = b""
    for node in reversed(order):  # leaves first, each into the memo
        number = seen[id(node)].to_bytes(4, "little")
        out += b"}r" + number
        for key, value in node.items():
            if isinstance(value, dict):
                out += b"X" + len(key).to_bytes(4, "little") + key.encode()
                out += b"j" + seen[id(value)].to_bytes(4, "little") + b"s"
    return out


def rewrite(path, ending, data, compression=zipfile.ZIP_STORED):
    """The archive with one entry replaced, or (data None) with all of them packed anew."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, data if data is not None and name.endswith(ending) else content)


def test_an_archive_packed_again(tmp_path):
    """A compressed entry that is mapped into memory would be read as noise."""
    torch.save({"a": torch.zeros(1000)}, tmp_path / "x.ckpt")
    rewrite(tmp_path / "x.ckpt", "", None, zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match=r"compressed entries .*expected them stored, as torch\.save writes"):
        checkpoints.read(tmp_path / "x.ckpt")
    rewrite(tmp_path / "x.ckpt", "", None)
    assert not checkpoints.read(tmp_path / "x.ckpt")["a"].any()


def test_a_small_archive_of_a_huge_pickle(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "x.ckpt")
    rewrite(tmp_path / "x.ckpt", "data.pkl", b"\x80\x02" + b"]0" * 50_000_000, zipfile.ZIP_DEFLATED)
    assert (tmp_path / "x.ckpt").stat().st_size < 1 << 18
    with pytest.raises(CheckpointError, match="compressed entries"):
        checkpoints.read(tmp_path / "x.ckpt")


def test_a_tensor_larger_than_what_is_stored(tmp_path):
    torch.save({"a": torch.ones(1).expand(1 << 40)}, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match=r"a is \[1099511627776\], larger than what is stored"):
        checkpoints.read(tmp_path / "x.ckpt")


# files that are something else


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt", "pth", "nemo"])
def test_a_git_lfs_pointer(tmp_path, suffix):
    (tmp_path / f"x.{suffix}").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError, match=r"x\.\w+ is a Git LFS pointer"):
        controlnet.load(tmp_path / f"x.{suffix}")


def test_files_under_another_kinds_name(tmp_path):
    tensors = original("control", folder=tmp_path)
    save(tensors, tmp_path / "x.safetensors").rename(tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match=r"x\.ckpt is a safetensors file by its content; .*\.safetensors"):
        controlnet.load(tmp_path / "x.ckpt")
    torch.save(tensors, tmp_path / "y.safetensors")
    with pytest.raises(CheckpointError, match=r"y\.safetensors is a PyTorch checkpoint .*by its content; .*\.ckpt"):
        controlnet.load(tmp_path / "y.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_that_are_not_finite_are_named(tmp_path, value, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in original("unet", folder=tmp_path).items()}
    name = "middle_block.0.in_layers.2.weight"
    tensors[PREFIXES["unet"] + name][3, 1, 0, 2] = value
    source = save(tensors, tmp_path / "base.safetensors")
    for use in (
        lambda: controlnet.load(source),
        lambda: weights.load_unet(UNet(**formats.BASE, out_channels=4), source),
    ):
        with pytest.raises(CheckpointError, match=rf"base\.safetensors.* not finite .*in 1 of \d+ tensors: {name}"):
            use()
    controlnet.convert(source, tmp_path / "y.safetensors", "nemo")  # bit for bit, whatever the bits
