"""ControlNets stored relative to a base: a difference, and a Control-LoRA."""

import pytest
import torch

import controlnet
from controlnet import CheckpointError, checkpoints
from tests.controlnet import formats
from tests.controlnet.formats import PREFIXES, assert_equal, save, state

# relative to a base


def difference(control, base):
    return {name: tensor - base[name] if name in base else tensor for name, tensor in control.items()}


@pytest.fixture
def models(tmp_path):
    control, base = state(formats.control()), state(formats.unet())
    save({PREFIXES["unet"] + name: tensor for name, tensor in base.items()}, tmp_path / "base.safetensors")
    return control, base


@pytest.mark.parametrize("prefix", ["control_model.", ""])
def test_a_difference_is_refused_by_name_and_added_to_its_base(tmp_path, models, prefix):
    control, base = models
    tensors = {prefix + name: tensor for name, tensor in difference(control, base).items()}
    source = save(tensors | {"difference": torch.ones(1)}, tmp_path / "d.safetensors")
    with pytest.raises(CheckpointError, match=r"a 'difference' ControlNet.*load\(path, base=UNET\).*--base UNET"):
        controlnet.load(source)
    with pytest.raises(CheckpointError, match="a 'difference' ControlNet"):
        checkpoints.load_control(formats.control(), source)
    loaded = controlnet.load(source, base=tmp_path / "base.safetensors")
    found = loaded.control.state_dict()
    for name, tensor in control.items():
        formats.twins.assert_same(found[name], tensor, 1e-6)
    assert loaded.report.unused == []
    controlnet.convert(source, tmp_path / "x.safetensors", "original", base=tmp_path / "base.safetensors")
    assert_equal(state(controlnet.load(tmp_path / "x.safetensors").control), found)
    with pytest.raises(CheckpointError, match="holds no U-Net"):
        controlnet.load(source, base=tmp_path / "x.safetensors")


def test_a_difference_is_transferred_from_its_base_to_another(tmp_path, models):
    control, base = models
    source = save(difference(control, base) | {"difference": torch.ones(1)}, tmp_path / "d.safetensors")
    other = state(formats.unet(seed=9))
    new = save({PREFIXES["unet"] + name: tensor for name, tensor in other.items()}, tmp_path / "new.safetensors")
    found = controlnet.transfer(source, tmp_path / "base.safetensors", new).control.state_dict()
    for name, tensor in control.items():
        want = tensor - base[name] + other[name] if name in base else tensor
        formats.twins.assert_same(found[name], want, 1e-6)


def control_lora(control, base, rank=3):
    """As Control-LoRAs are published: factors of the changed weights, all else of the ControlNet's own in full."""
    generator = torch.Generator().manual_seed(5)
    tensors, want = {"lora_controlnet": torch.tensor([])}, {}
    for name, tensor in control.items():
        module, _, kind = name.rpartition(".")
        if name not in base:
            tensors[name] = want[name] = tensor
        elif kind == "weight" and tensor.dim() > 1:
            up = torch.randn(tensor.shape[0], rank, *[1] * (tensor.dim() - 2), generator=generator)
            down = torch.randn(rank, *tensor.shape[1:], generator=generator)
            tensors[f"{module}.up"], tensors[f"{module}.down"] = up, down
            change = up.double().flatten(1) @ down.double().flatten(1)
            want[name] = (base[name].double() + change.view(tensor.shape)).float()
        elif "norm" in module:
            want[name] = base[name]  # what the file lacks is the base's
        else:
            tensors[name] = want[name] = tensor
    return tensors, want


def test_a_control_lora_is_its_base_and_low_rank_changes(tmp_path, models):
    tensors, want = control_lora(*models)
    source = save(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match=r"a Control-LoRA: low-rank changes to a base"):
        controlnet.load(source)
    with pytest.raises(CheckpointError, match=r"a Control-LoRA"):
        checkpoints.load_control(formats.control(), source)
    found = controlnet.load(source, base=tmp_path / "base.safetensors").control.state_dict()
    assert found.keys() == want.keys()
    for name, tensor in want.items():
        formats.twins.assert_same(found[name], tensor, 1e-5)


@pytest.mark.parametrize(("change", "pattern"), [
    (lambda t: t.pop("input_blocks.0.0.down"), r"has input_blocks\.0\.0\.up without input_blocks\.0\.0\.down"),
    (lambda t: t.pop("input_blocks.0.0.up"), r"has input_blocks\.0\.0\.down without input_blocks\.0\.0\.up"),
    (lambda t: t.update({"input_blocks.0.0.up": torch.ones(32, 2)}), r"has factors \[32, 2\] and \[3, 36\]"),
    (lambda t: t.update({"input_blocks.77.0.up": torch.ones(1, 3), "input_blocks.77.0.down": torch.ones(3, 1)}),
     r"input_blocks\.77\.0\.up without input_blocks\.77\.0\.weight in its base"),
])  # fmt: skip
def test_a_damaged_control_lora(tmp_path, models, change, pattern):
    tensors, _ = control_lora(*models)
    change(tensors)
    with pytest.raises(CheckpointError, match=pattern):
        controlnet.load(save(tensors, tmp_path / "lora.safetensors"), base=tmp_path / "base.safetensors")
