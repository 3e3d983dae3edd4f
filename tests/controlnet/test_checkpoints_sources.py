"""One look-up for every kind of path, and files as people have them: variants, shards, runs, objects beside tensors."""

import functools
import importlib
import inspect
import json
import subprocess
import sys

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from safetensors.torch import save_file

import controlnet
from controlnet import CheckpointError, checkpoints
from controlnet.checkpoints import runs
from controlnet.checkpoints.write import heads_metadata
from tests.controlnet import formats
from tests.controlnet.formats import PREFIXES, assert_equal, original, save, state

TINY = {"block_out_channels": (32, 64), "layers_per_block": 1, "cross_attention_dim": 16, "attention_head_dim": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}  # fmt: skip


def their_unet():
    return UNet2DConditionModel(**TINY, up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))


def their_control():
    return ControlNetModel(**TINY, conditioning_embedding_out_channels=(8, 16))


# folders


@pytest.mark.parametrize("options", [
    {}, {"variant": "fp16"}, {"variant": "ema_only"}, {"max_shard_size": "300KB"},
    {"max_shard_size": "300KB", "variant": "fp16"}, {"safe_serialization": False},
    {"safe_serialization": False, "variant": "fp16"},
], ids=str)  # fmt: skip
def test_whatever_diffusers_writes(tmp_path, options):
    theirs = their_control()
    theirs.save_pretrained(tmp_path / "c", **options)
    assert checkpoints.resolve(tmp_path / "c").kind == "model"
    found = controlnet.load(tmp_path / "c").control.state_dict()
    assert torch.equal(found["input_blocks.0.0.weight"], theirs.state_dict()["conv_in.weight"])
    assert len(found) == len(theirs.state_dict())


def test_the_whole_precision_before_a_variant_and_safetensors_before_pickles(tmp_path):
    for name in ("model.fp16.safetensors", "model.safetensors", "pytorch_model.bin", "notes.txt"):
        (tmp_path / name).touch()
    files = [path.name for path in checkpoints.resolve(tmp_path).files[""]]
    assert files == ["model.safetensors"]
    (tmp_path / "model.safetensors").unlink()
    assert checkpoints.resolve(tmp_path).files[""][0].name == "model.fp16.safetensors"


def test_a_folder_with_one_other_file_is_that_file(tmp_path):
    save(original("control", folder=tmp_path), tmp_path / "my_control.safetensors")
    assert_equal(state(controlnet.load(tmp_path).control), state(formats.control()))


@pytest.mark.parametrize(("index", "pattern"), [
    ("[]", "damaged"), ('{"weight_map": {"a": "../x.safetensors"}}', "names of files beside it"),
    ('{"weight_map": {"a": "gone-1.safetensors"}}', r"names 1 files, of which 1 are missing: gone-1"),
    (json.dumps({"weight_map": {"a": 300 * "x"}}), "names 1 files, of which 1 are missing: xxx"),
    (json.dumps({"weight_map": {"a": "\ud800"}}), "names 1 files, of which 1 are missing: "),
    ('{"weight_map": {}}', "names of files beside it"), ("[" * 100_000, "damaged"),
    ('{"weight_map": {"a": 1}}', "damaged"),
])  # fmt: skip
def test_an_index_that_leads_nowhere(tmp_path, index, pattern):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=pattern):
        checkpoints.resolve(tmp_path)


def test_a_tensor_in_two_shards(tmp_path):
    for i in (1, 2):
        save_file({"a": torch.ones(1) * i}, tmp_path / f"model-{i}.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model-2\.safetensors has a once more"):
        checkpoints.read(tmp_path)


def test_a_pipeline_names_its_parts_and_foreign_ones_are_named(tmp_path):
    their_unet().save_pretrained(tmp_path / "p" / "unet", variant="fp16")
    their_control().save_pretrained(tmp_path / "p" / "controlnet", max_shard_size="300KB")
    source = checkpoints.resolve(tmp_path / "p")
    assert source.kind == "pipeline" and list(source.files) == ["unet", "control"]
    assert list(checkpoints.resolve(tmp_path / "p", "unet").files) == ["unet"]
    loaded = controlnet.load(tmp_path / "p")
    assert loaded.unet is not None and loaded.control is not None
    (tmp_path / "flux" / "transformer").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="diffusion transformer"):
        checkpoints.resolve(tmp_path / "flux")


# our own runs


def run_folder(path, *, heads=2, average=False, metadata=True, config=True):
    """A run with two checkpoints, as training writes it; returns the newest one's folder."""
    for step in (1, 2):
        model = formats.control(seed=step, num_heads=heads)
        tensors = {PREFIXES["control"] + name: tensor for name, tensor in state(model).items()}
        stated = heads_metadata({"control": model.arch}) if metadata else None
        writers = {runs.CONTROL: functools.partial(save_file, tensors, metadata=stated)}
        if average:
            averages = {name: tensor + 1 for name, tensor in tensors.items()}
            writers[runs.AVERAGE] = functools.partial(save_file, averages)
        if config:
            section = {"unet_config": {}, "control_stage_config": {"num_heads": heads}}
            text = json.dumps({"model": section})
            writers[runs.CONFIG] = lambda file, text=text: file.write_text(text)
        runs.write(path / runs.CHECKPOINTS, step, writers, {})
    return path / runs.CHECKPOINTS / runs.folder_name(2)


@pytest.mark.parametrize("stated", ["metadata", "config"])
def test_a_run_a_checkpoint_and_its_file_are_the_same(tmp_path, stated):
    step = run_folder(tmp_path / "run", **{"metadata": False, "config": False, stated: True})
    want = state(formats.control(seed=2, num_heads=2))
    for path in (tmp_path / "run", tmp_path / "run" / "checkpoints", step, step / "control.safetensors"):
        control = controlnet.load(path).control
        assert_equal(state(control), want)
        assert control.arch.num_heads == 2, "the heads are those that it was trained with"
    source = checkpoints.resolve(tmp_path / "run")
    assert source.kind == "checkpoint" and source.folder == step and source.config == step / "config.yaml"


def test_a_run_to_diffusers_and_back(tmp_path):
    run_folder(tmp_path / "run")
    controlnet.convert(tmp_path / "run", tmp_path / "out", "diffusers")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["attention_head_dim"] == 2
    controlnet.convert(tmp_path / "out", tmp_path / "back.safetensors", "original")
    want = {PREFIXES["control"] + name: t for name, t in state(formats.control(seed=2, num_heads=2)).items()}
    assert_equal(checkpoints.read(tmp_path / "back.safetensors"), want)
    assert controlnet.load(tmp_path / "back.safetensors").control.arch.num_heads == 2


def test_the_average_is_taken_where_a_run_kept_one(tmp_path):
    run_folder(tmp_path / "run", average=True)
    want = state(formats.control(seed=2, num_heads=2))
    assert_equal(state(controlnet.load(tmp_path / "run", average=False).control), want)
    assert_equal(state(controlnet.load(tmp_path / "run").control), {name: tensor + 1 for name, tensor in want.items()})


def test_an_incomplete_checkpoint_is_passed_over_in_a_run_and_refused_by_itself(tmp_path):
    step = run_folder(tmp_path / "run")
    (step / "control.safetensors").write_bytes(b"half")
    assert checkpoints.resolve(tmp_path / "run").folder.name == "step-00000001"
    with pytest.raises(CheckpointError, match="step-00000002"):
        checkpoints.resolve(step)
    (tmp_path / "new" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="no step was saved"):
        checkpoints.resolve(tmp_path / "new")


# the function and the command of one name


def test_convert_is_a_function_and_a_command_and_no_module():
    with pytest.raises(ImportError, match="a function and a command"):
        importlib.import_module("controlnet.convert")
    assert inspect.signature(controlnet.convert).parameters.keys() >= {"src", "dst", "format"}
    done = subprocess.run([sys.executable, "-m", "controlnet.convert", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "python -m controlnet.convert" in done.stdout
