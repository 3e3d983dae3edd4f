"""q, k and v: one parameter in the model, three tensors in every state_dict that is read or written."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from controlnet.model.transformer import CrossAttention
from controlnet.model.unet import UNet
from controlnet.training.optim import ExponentialAverage, trainable_tensors
from tests.controlnet.twins import BASE, randomise

SELF = {"to_q.weight": [8, 8], "to_k.weight": [8, 8], "to_v.weight": [8, 8]}
CROSS = {"to_q.weight": [8, 8], "to_k.weight": [8, 6], "to_v.weight": [8, 6]}
OUT = {"to_out.0.weight": [8, 8], "to_out.0.bias": [8]}
KINDS = {"self": (None, SELF, {"to_qkv"}), "cross": (6, CROSS, {"to_kv", "to_q.weight"})}
each_kind = pytest.mark.parametrize("kind", KINDS)


def attention(kind: str, seed: int = 0) -> CrossAttention:
    return randomise(CrossAttention(8, KINDS[kind][0], 2, use_flash_attention=True), seed)


@each_kind
def test_names_and_views(kind):
    _, shapes, parameters = KINDS[kind]
    module = attention(kind)
    state = module.state_dict()
    assert {name: list(tensor.shape) for name, tensor in state.items()} == shapes | OUT
    assert {name for name, _ in module.named_parameters()} == parameters | set(OUT)
    packed = getattr(module, module.packed)
    assert torch.equal(torch.cat([state[f"{part}.weight"] for part in module.parts]), packed)
    state["to_v.weight"].fill_(7)  # in place, as checkpoints are loaded
    assert (packed[-8:] == 7).all() and not (packed[:-8] == 7).any()


@each_kind
@pytest.mark.parametrize("assign", [False, True])
def test_loads_what_another_saved(kind, assign, tmp_path):
    source, target = attention(kind), attention(kind, seed=1)
    save_file(source.state_dict(), tmp_path / "x.safetensors")  # which refuses tensors that overlap
    optimizer = torch.optim.SGD(target.parameters())
    target.load_state_dict(load_file(tmp_path / "x.safetensors"), assign=assign)
    for (name, ours), theirs in zip(target.named_parameters(), source.parameters(), strict=True):
        assert torch.equal(ours, theirs) and ours.requires_grad, name
    kept = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert assign or kept == {id(p) for p in target.parameters()}


@each_kind
def test_loads_onto_the_meta_device(kind):
    with torch.device("meta"):
        target = CrossAttention(8, KINDS[kind][0], 2, use_flash_attention=True)
    source = attention(kind).half()
    target.load_state_dict(source.state_dict(), assign=True)
    packed = getattr(target, target.packed)
    assert packed.dtype == torch.float16 and torch.equal(packed, getattr(source, source.packed))


@each_kind
def test_a_state_that_does_not_fit(kind):
    module = attention(kind)
    before, state = copy.deepcopy(module), attention(kind, seed=1).state_dict()
    del state["to_k.weight"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "to_k.weight"\.'):
        module.load_state_dict(state)
    found = before.load_state_dict(state | {"to_x.weight": torch.zeros(1)}, strict=False)
    assert found.missing_keys == ["to_k.weight"] and found.unexpected_keys == ["to_x.weight"]
    rows = getattr(module, module.packed).shape[0]
    assert torch.equal(before.state_dict()["to_v.weight"], state["to_v.weight"])
    assert torch.equal(before.state_dict()["to_k.weight"], attention(kind).state_dict()["to_k.weight"])
    with pytest.raises(RuntimeError, match=r"size mismatch for to_v.weight: .*\[8, 5\].*\[8, "):
        module.load_state_dict(state | {"to_k.weight": torch.zeros(8, 8), "to_v.weight": torch.zeros(8, 5)})
    assert getattr(module, module.packed).shape[0] == rows


def test_the_average_has_the_names_of_checkpoints():
    unet = randomise(UNet(**BASE, out_channels=4))
    unet.time_embed.requires_grad_(False)
    names = [name for name in unet.state_dict() if not name.startswith("time_embed")]
    with torch.no_grad():
        assert list(trainable_tensors(unet)) == names
    average = ExponentialAverage(unet, decay=0.5)
    assert list(average.averages) == names
    before = copy.deepcopy(unet.state_dict())
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(1)
    average.update(1)
    changed = average.averages["input_blocks.1.1.transformer_blocks.0.attn1.to_k.weight"]
    old = before["input_blocks.1.1.transformer_blocks.0.attn1.to_k.weight"]
    torch.testing.assert_close(changed, old + (1 - 2 / 11))
    with average.swapped_in():
        held = unet.state_dict()["input_blocks.1.1.transformer_blocks.0.attn1.to_k.weight"]
        assert torch.equal(held, changed)
    torch.testing.assert_close(unet.input_blocks[1][1].transformer_blocks[0].attn1.to_qkv[32:64], old + 1)
