"""Checkpoint files: every layout loads bit for bit, what is wrong is one clear error, and nothing in a file is run."""

import os
import pickle
import re
import sys
import types
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from controlnet import checkpoints
from controlnet.checkpoints import CheckpointError, layouts, load_control, load_unet, nemo, weights
from controlnet.model.controlnet import ControlNet
from controlnet.model.unet import UNet
from tests.controlnet.tiny import randomised

SMALL = {
    "in_channels": 4,
    "model_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": [1, 2],
    "channel_mult": [1, 2],
    "num_heads": 2,
    "use_spatial_transformer": True,
    "context_dim": 8,
    "legacy": False,
}
CONTROL_ONLY = ("zero_convs.", "input_hint_block.", "middle_block_out.")


def unet(seed: int = 0, **params) -> UNet:
    return randomised(UNet(**SMALL | params, out_channels=4), seed)


def control(seed: int = 0, **params) -> ControlNet:
    return randomised(ControlNet(**SMALL | params, hint_channels=3, hint_block_channels=(8, 16)), seed)


def prefixed(prefix: str, model: nn.Module, rename=lambda name: name) -> dict[str, torch.Tensor]:
    return {prefix + rename(name): tensor for name, tensor in model.state_dict().items()}


def assert_same(model: nn.Module, expected: nn.Module, names=None) -> None:
    ours, theirs = model.state_dict(), expected.state_dict()
    for name in ours if names is None else names:
        assert torch.equal(ours[name], theirs[name]), name


# Files


@pytest.mark.parametrize("suffix", ["ckpt", "pth", "pt", "bin", "safetensors"])
@pytest.mark.parametrize("nested", [True, False])
def test_every_suffix_is_read(tmp_path, suffix, nested):
    tensors, path = {"a.b": torch.arange(3.0), "c": torch.ones(2, 2, dtype=torch.float16)}, tmp_path / f"x.{suffix}"
    if suffix == "safetensors":
        save_file(tensors, path)
    else:
        content = {"state_dict": OrderedDict(tensors), "epoch": 3, "lr": [0.1]} if nested else tensors
        torch.save(content, path, _use_new_zipfile_serialization=suffix != "pt")
    found = checkpoints.read(path)
    assert found.keys() == tensors.keys() and all(torch.equal(found[k], tensors[k]) for k in tensors)


def test_a_folder_is_read_by_diffusers_file_names(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "diffusion_pytorch_model.safetensors")
    assert list(checkpoints.read(tmp_path)) == ["a"]


def test_lightning_and_nemo_objects_beside_the_tensors_are_read_over(tmp_path, monkeypatch):
    """Real .ckpt files key their callbacks by class and carry an OmegaConf configuration and numpy scores."""
    import numpy
    from omegaconf import OmegaConf

    name = "pytorch_lightning.callbacks.model_checkpoint"
    for i in range(1, 4):
        part = ".".join(name.split(".")[:i])
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    callback = type("ModelCheckpoint", (), {"__module__": name})
    sys.modules[name].ModelCheckpoint = callback
    torch.save(
        {
            "state_dict": {"a": torch.ones(2)},
            "callbacks": {callback: {"best": numpy.float64(0.5), "object": callback()}},
            "hyper_parameters": OmegaConf.create(
                {"lr": 1e-4, "sizes": [1, 2], "name": "x", "on": True, "deep": {"a": None}}
            ),
        },
        tmp_path / "x.ckpt",
    )
    monkeypatch.undo()
    assert list(checkpoints.read(tmp_path / "x.ckpt")) == ["a"]
    assert name not in sys.modules


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["zip", "old", "pickle"])
def test_a_pickle_that_runs_code_is_refused_and_never_retried(tmp_path, monkeypatch, kind):
    path, trap = tmp_path / "x.ckpt", tmp_path / "executed"
    content = {"state_dict": {"a": torch.ones(1)}, "extra": Payload(trap)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Payload(trap), protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    calls, real = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: calls.append(k["weights_only"]) or real(*a, **k))
    with pytest.raises(CheckpointError) as error:
        checkpoints.read(path)
    message = str(error.value)
    assert str(path) in message and "posix.mkdir" in message and "can run code" in message
    assert "weights_only" not in message, "the message must not teach the unsafe way"
    assert False not in calls and not trap.exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.ckpt", b"<html>404</html>", "an HTML page"),
        ("x.ckpt", b"no pickle at all", "no PyTorch checkpoint"),
        ("x.ckpt", b"", "damaged"),
        ("x.safetensors", b" <!DOCTYPE html>", "an HTML page"),
        ("x.safetensors", b"", "no safetensors file"),
        ("x.yaml", b"a: 1", ".yaml"),
    ],
)
def test_foreign_files(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / name))) as error:
        checkpoints.read(tmp_path / name)
    assert words in str(error.value)


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_truncated_files(tmp_path, suffix, share):
    path, tensors = tmp_path / f"x.{suffix}", {"a": torch.ones(1000)}
    save_file(tensors, path) if suffix == "safetensors" else torch.save(tensors, path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoints.read(path)


def test_files_without_tensors(tmp_path):
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    torch.save({"a": 1}, tmp_path / "number.pth")
    for name, words in (("list.pth", "a list"), ("number.pth", "no tensor")):
        with pytest.raises(CheckpointError, match=words):
            checkpoints.read(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        checkpoints.read(tmp_path / "nowhere.ckpt")
    with pytest.raises(CheckpointError, match=r"has list\.pth, number\.pth; name one of the files"):
        checkpoints.read(tmp_path)


# Names

NEMO_PAIRS = [
    ("input_blocks.1.0.in_layers.0.weight", "input_blocks.1.0.in_layers.0.weight"),
    ("input_blocks.1.0.in_layers.2.weight", "input_blocks.1.0.in_layers.1.weight"),
    ("input_blocks.1.0.emb_layers.1.bias", "input_blocks.1.0.emb_layers.1.bias"),
    ("middle_block.0.out_layers.0.bias", "middle_block.0.out_layers.0.bias"),
    ("middle_block.0.out_layers.3.bias", "middle_block.0.out_layers.2.bias"),
    ("out.0.weight", "out.0.weight"),
    ("out.2.weight", "out.1.weight"),
    ("input_blocks.1.1.norm.weight", "input_blocks.1.1.norm.weight"),
    ("input_blocks.1.1.transformer_blocks.0.norm1.weight", "input_blocks.1.1.transformer_blocks.0.attn1.norm.weight"),
    ("input_blocks.1.1.transformer_blocks.1.norm2.bias", "input_blocks.1.1.transformer_blocks.1.attn2.norm.bias"),
    ("input_blocks.1.1.transformer_blocks.0.norm3.bias", "input_blocks.1.1.transformer_blocks.0.ff.net.0.bias"),
    (
        "middle_block.1.transformer_blocks.0.ff.net.0.proj.weight",
        "middle_block.1.transformer_blocks.0.ff.net.1.proj.weight",
    ),
    ("middle_block.1.transformer_blocks.0.ff.net.2.bias", "middle_block.1.transformer_blocks.0.ff.net.3.bias"),
    ("middle_block.1.transformer_blocks.0.attn1.to_q.weight", "middle_block.1.transformer_blocks.0.attn1.to_q.weight"),
    (
        "middle_block.1.transformer_blocks.0.attn2.to_out.0.bias",
        "middle_block.1.transformer_blocks.0.attn2.to_out.0.bias",
    ),
    ("zero_convs.3.0.weight", "zero_convs.3.0.weight"),
    ("input_hint_block.2.weight", "input_hint_block.2.weight"),
    ("middle_block_out.0.bias", "middle_block_out.0.bias"),
    ("time_embed.2.weight", "time_embed.2.weight"),
    ("output_blocks.2.1.conv.weight", "output_blocks.2.1.conv.weight"),
]


def nemo_1_23(name: str) -> str:
    """The names of NeMo 1.23.0: layer norm and query projection in one sequence."""
    name = nemo.from_original(name)
    name = re.sub(r"\.(attn[12])\.norm\.", r".\1.norm_to_q.0.", name)
    return re.sub(r"\.(attn[12])\.to_q\.", r".\1.norm_to_q.1.", name)


@pytest.mark.parametrize(("original", "theirs"), NEMO_PAIRS)
def test_nemo_names(original, theirs):
    assert nemo.from_original(original) == theirs
    assert nemo.to_original(theirs) == original
    assert nemo.to_original(original) == original
    assert nemo.to_original(nemo_1_23(original)) == original


def test_transformer_engine_names_are_refused():
    with pytest.raises(CheckpointError, match="Transformer Engine"):
        nemo.to_original("middle_block.1.transformer_blocks.0.attn1.norm_to_q.layer_norm_weight")


def test_mixed_and_unknown_layouts():
    mixed = prefixed("model.diffusion_model.", unet()) | {"model.diffusion_model.down_blocks.0.x": torch.ones(1)}
    with pytest.raises(CheckpointError, match=r"two layouts.*down_blocks"):
        layouts.sort(mixed, "x")
    with pytest.raises(CheckpointError, match=r"no known layout.*layer4\.conv"):
        layouts.sort({"layer4.conv.weight": torch.ones(1)}, "x")


# U-Net

LAYOUTS = {
    "original, whole file": ("original", "model.diffusion_model.", lambda name: name),
    "original, U-Net alone": ("original", "", lambda name: name),
    "original, diffusion_model": ("original", "diffusion_model.", lambda name: name),
    "original, DDP": ("original", "module.model.diffusion_model.", lambda name: name),
    "NeMo 2": ("nemo", "model.model.diffusion_model.", nemo.from_original),
    "NeMo 1.23": ("nemo", "model.model.diffusion_model.", nemo_1_23),
    "NeMo compiled": ("nemo", "model.model._orig_mod.diffusion_model.", nemo.from_original),
    "NeMo, U-Net alone": ("nemo", "", nemo.from_original),
}


@pytest.mark.parametrize("from_nemo", [True, False, None])
@pytest.mark.parametrize("case", LAYOUTS)
def test_unet_loads_from_every_layout(tmp_path, case, from_nemo):
    layout, prefix, rename = LAYOUTS[case]
    source, target = unet(seed=1), unet(seed=2)
    others = {
        "model_ema.decay": torch.ones(1),
        "first_stage_model.quant_conv.weight": torch.ones(1),
        "betas": torch.ones(3),
    }
    torch.save({"state_dict": prefixed(prefix, source, rename) | others}, tmp_path / "x.ckpt")
    report = load_unet(target, tmp_path / "x.ckpt", from_nemo)
    assert_same(target, source)
    assert report.layout == layout and report.new == []
    assert sorted(report.matched) == sorted(source.state_dict()) and sorted(report.unused) == sorted(others)
    assert f"{len(report.matched)} tensors matched, 0 new, 3 unused (betas 1, first_stage_model 1, model_ema 1)" in str(
        report
    )


def test_the_loaded_model_keeps_its_own_dtype(tmp_path):
    source, target = unet(seed=1), unet(seed=2)
    save_file({k: v.half() for k, v in prefixed("model.diffusion_model.", source).items()}, tmp_path / "x.safetensors")
    load_unet(target, tmp_path / "x.safetensors")
    assert target.dtype == torch.float32
    assert_same(target, source.half().float())


def test_linear_and_1x1_convolution_are_taken_for_each_other(tmp_path):
    source, target = unet(seed=1), unet(seed=2, use_linear_in_transformer=True)
    save_file(prefixed("", source), tmp_path / "x.safetensors")
    load_unet(target, tmp_path / "x.safetensors")
    name = "middle_block.1.proj_in.weight"
    assert torch.equal(target.state_dict()[name], source.state_dict()[name][:, :, 0, 0])


def test_a_missing_tensor_is_an_error_that_lists_it_and_changes_nothing(tmp_path):
    tensors = prefixed("model.diffusion_model.", unet(seed=1))
    gone = "middle_block.0.in_layers.2.weight"
    tensors["model.diffusion_model.middle_block.0.in_layers.2.wieght"] = tensors.pop(f"model.diffusion_model.{gone}")
    save_file(tensors, tmp_path / "x.safetensors")
    target, untouched = unet(seed=2), unet(seed=2)
    with pytest.raises(CheckpointError) as error:
        load_unet(target, tmp_path / "x.safetensors")
    assert f"lacks 1 of {len(tensors)} tensors: {gone} [64, 64, 3, 3]" in str(error.value)
    assert "nearest in the file: middle_block.0.in_layers.2.wieght" in str(error.value)
    assert_same(target, untouched)


def test_another_width_is_an_error_with_both_shapes(tmp_path):
    save_file(prefixed("model.diffusion_model.", unet(model_channels=64)), tmp_path / "x.safetensors")
    target, untouched = unet(seed=2), unet(seed=2)
    with pytest.raises(CheckpointError) as error:
        load_unet(target, tmp_path / "x.safetensors")
    assert "time_embed.0.weight is [256, 64], expected [128, 32]" in str(error.value)
    assert "more" in str(error.value)
    assert_same(target, untouched)


def test_a_file_without_a_unet_says_what_it_holds(tmp_path):
    save_file(prefixed("control_model.", control()), tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"holds control \d+; expected a U-Net"):
        load_unet(unet(), tmp_path / "x.safetensors")


# ControlNet


@pytest.mark.parametrize(
    ("prefix", "rename"),
    [
        ("control_model.", lambda name: name),
        ("", lambda name: name),
        ("", nemo.from_original),
        ("module.", lambda name: name),
        ("model.control_model.", nemo.from_original),
        ("model.control_model._orig_mod.", nemo_1_23),
        ("control_model.module.", lambda name: name),
        ("module.control_model._orig_mod.module.", lambda name: name),
    ],
)
def test_a_trained_control_loads_from_every_layout(tmp_path, prefix, rename):
    source, target = control(seed=1), control(seed=2)
    save_file(prefixed(prefix, source, rename), tmp_path / "x.safetensors")
    report = load_control(target, tmp_path / "x.safetensors")
    assert_same(target, source)
    assert report.new == [] and report.unused == []


def test_a_file_with_both_gives_either(tmp_path):
    trained, base = control(seed=1), unet(seed=2)
    tensors = prefixed("control_model.", trained) | prefixed("model.diffusion_model.", base)
    save_file(tensors, tmp_path / "x.safetensors")
    target = control(seed=3)
    load_control(target, tmp_path / "x.safetensors")
    assert_same(target, trained)
    report = load_control(target, tmp_path / "x.safetensors", source="unet")
    assert_same(target, base, set(target.state_dict()) & set(base.state_dict()))
    assert_same(target, trained, report.new)


@pytest.mark.parametrize("case", LAYOUTS)
@pytest.mark.parametrize("from_nemo", [True, False])
def test_a_control_starts_from_a_unet(tmp_path, case, from_nemo):
    _, prefix, rename = LAYOUTS[case]
    base, target, before = unet(seed=1), control(seed=2), control(seed=2)
    save_file(prefixed(prefix, base, rename), tmp_path / "x.safetensors")
    report = load_control(target, tmp_path / "x.safetensors", from_nemo)
    own = [name for name in target.state_dict() if name.startswith(CONTROL_ONLY)]
    assert report.new == own
    assert_same(target, before, own)
    assert_same(target, base, report.matched)
    decoder = [name for name in base.state_dict() if name.startswith(("output_blocks.", "out."))]
    assert sorted(report.unused) == sorted(prefix + rename(name) for name in decoder)
    assert re.search(r"new \(input_hint_block \d+, middle_block_out 2, zero_convs 8\)", str(report))


def test_a_unet_without_the_trunk_is_an_error(tmp_path):
    tensors = {k: v for k, v in prefixed("model.diffusion_model.", unet()).items() if "middle_block" not in k}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks \d+ of \d+ tensors: middle_block"):
        load_control(control(), tmp_path / "x.safetensors")


def test_a_trained_control_without_a_zero_convolution_is_an_error(tmp_path):
    tensors = prefixed("control_model.", control())
    del tensors["control_model.zero_convs.0.0.bias"]
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"zero_convs\.0\.0\.bias \[32\]"):
        load_control(control(), tmp_path / "x.safetensors")


def test_the_nearest_name_is_looked_for_among_so_many(monkeypatch):
    """Each comparison costs some 20 us, and a damaged file may have a hundred thousand names."""
    compared = []

    def close(name, known, **_):
        compared.extend(known)
        return compared[:1]

    monkeypatch.setattr("difflib.get_close_matches", close)
    assert (
        weights.near("b" * 9, ("a" * (i % 100) for i in range(100_000)), "in the file")
        == " (nearest in the file: aaaaa)"
    )
    assert 100 <= len(compared) <= 2000 and {len(name) for name in compared} == set(range(5, 14))
