"""Names of diffusers' checkpoints, against diffusers' own models and conversions."""

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from safetensors.torch import save_file

from controlnet import checkpoints
from controlnet.checkpoints import CheckpointError, diffusers, load_control, load_unet, vae
from controlnet.model.controlnet import ControlNet
from controlnet.model.unet import UNet
from tests.controlnet import tiny
from tests.controlnet.twins import BASE, CASES, controlnet_pair, unet_pair

EQUAL_BLOCKS = [name for name, case in CASES.items() if len(set(case.res_blocks)) == 1]


def assert_names_are_both_ways(ours, theirs) -> None:
    names = diffusers.module_names(ours.arch)
    back = {theirs: ours for ours, theirs in names.items()}
    assert len(back) == len(names)
    renamed = {name: diffusers.rename(name, names) for name in ours.state_dict()}
    assert sorted(renamed.values()) == sorted(theirs.state_dict())
    assert all(diffusers.rename(theirs, back) == ours for ours, theirs in renamed.items())


@pytest.mark.parametrize("case", CASES)
def test_unet_folder_loads_bit_for_bit(tmp_path, case):
    """The pair's weights are equal by names that a comparison of outputs proves (test_unet.py)."""
    ours, theirs = unet_pair(CASES[case])
    assert_names_are_both_ways(ours, theirs)
    theirs.save_pretrained(tmp_path / "unet")
    fresh = UNet(**CASES[case].params, out_channels=4).double()
    report = load_unet(fresh, tmp_path, from_nemo=False)
    assert report.layout == "diffusers" and report.unused == []
    assert all(torch.equal(fresh.state_dict()[name], tensor) for name, tensor in ours.state_dict().items())


def test_pipeline_folder_model_folder_and_file_are_the_same(tmp_path):
    _, theirs = unet_pair(CASES["one level, one head"])
    theirs.save_pretrained(tmp_path / "unet")
    paths = (tmp_path, tmp_path / "unet", tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    first, *others = (load_unet(UNet(**CASES["one level, one head"].params, out_channels=4), path) for path in paths)
    assert all(other.matched == first.matched for other in others)


@pytest.mark.parametrize("case", EQUAL_BLOCKS)
def test_controlnet_folder_loads_bit_for_bit(tmp_path, case):
    ours, theirs = controlnet_pair(CASES[case])
    assert_names_are_both_ways(ours, theirs)
    theirs.save_pretrained(tmp_path / "controlnet")
    fresh = ControlNet(**CASES[case].params, hint_channels=3).double()
    report = load_control(fresh, tmp_path)
    assert report.layout == "diffusers" and report.new == [] and report.unused == []
    assert all(torch.equal(fresh.state_dict()[name], tensor) for name, tensor in ours.state_dict().items())


def test_control_starts_from_a_diffusers_unet(tmp_path):
    base, theirs = unet_pair(CASES["sd15"])
    theirs.save_pretrained(tmp_path / "unet")
    fresh = ControlNet(**CASES["sd15"].params, hint_channels=3).double()
    report = load_control(fresh, tmp_path, source="unet")
    assert {name.partition(".")[0] for name in report.new} == {"zero_convs", "input_hint_block", "middle_block_out"}
    assert all(torch.equal(fresh.state_dict()[name], base.state_dict()[name]) for name in report.matched)


def test_architecture_without_transformer_is_refused(tmp_path):
    params = BASE | {"use_spatial_transformer": False, "context_dim": None}
    with pytest.raises(CheckpointError, match="use_spatial_transformer"):
        diffusers.module_names(UNet(**params, out_channels=4).arch)


@pytest.mark.parametrize(("levels", "blocks"), [(1, 1), (2, 1), (4, 2)])
def test_vae_names(levels, blocks):
    model = tiny.vae(levels, blocks)
    original = tiny.original_vae_names(model, blocks)
    found, expected = vae.to_diffusers(original), model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    back = vae.to_original(expected)
    assert back.keys() == original.keys() and all(torch.equal(back[name], original[name]) for name in original)
    same = vae.to_original(original)
    assert same.keys() == original.keys() and all(same[name] is original[name] for name in original)
    theirs = convert_ldm_vae_checkpoint({f"first_stage_model.{k}": v for k, v in original.items()}, dict(model.config))
    assert found.keys() == theirs.keys() and all(torch.equal(found[name], theirs[name]) for name in theirs)


def test_vae_names_of_older_and_present_diffusers():
    model = tiny.vae()
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(name):
        for new, old in older.items():
            name = name.replace(f".{new}.", f".{old}.")
        return name

    tensors = model.state_dict()
    assert vae.to_diffusers(tensors).keys() == tensors.keys()
    assert vae.to_diffusers({rename(name): tensor for name, tensor in tensors.items()}).keys() == tensors.keys()


def test_the_vae_of_a_whole_checkpoint(tmp_path):
    model = tiny.vae()
    tensors = {f"first_stage_model.{name}": t.contiguous() for name, t in tiny.original_vae_names(model, 1).items()}
    save_file(tensors | {"model.diffusion_model.input_blocks.0.0.bias": torch.ones(1)}, tmp_path / "x.safetensors")
    assert checkpoints.parts(tmp_path / "x.safetensors") == ["first_stage", "unet"]
    found = checkpoints.part_tensors(tmp_path / "x.safetensors", "first_stage")
    assert found.keys() == model.state_dict().keys()
    with pytest.raises(CheckpointError, match="expected a cond_stage"):
        checkpoints.part_tensors(tmp_path / "x.safetensors", "cond_stage")
