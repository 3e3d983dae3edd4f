"""`benchmarks.drop_in` with a stand-in for `controlnet.accelerate`: it reports changed times and changed results."""

import json

import pytest
import torch

import controlnet
from benchmarks import drop_in

pytest.importorskip("diffusers")


def figures(monkeypatch, path, accelerate):
    monkeypatch.setattr(controlnet, "accelerate", accelerate, raising=False)
    drop_in.main(["--width", "small", "--dtype", "fp32", "--repeats", "2", "--output", str(path)])
    (row,) = json.loads(path.read_text())["rows"]
    return row


def test_modules_that_nothing_was_done_to_are_equal(monkeypatch, tmp_path):
    row = figures(monkeypatch, tmp_path / "figures.json", lambda module: module)
    assert row["difference"] == 0 and row["largest"] > 0
    assert 0.5 < row["ratio"]["p20"] <= row["ratio"]["median"] <= row["ratio"]["p80"] < 2


def test_a_change_of_the_control_alone_is_seen(monkeypatch, tmp_path):
    """The ControlNet's outputs reach the result; and patching one side leaves the other as it is."""

    def accelerate(module):
        if hasattr(module, "controlnet_mid_block"):
            forward = module.forward
            module.forward = lambda *a, **k: [x.mul(1.5) if torch.is_tensor(x) else x for x in forward(*a, **k)]

    row = figures(monkeypatch, tmp_path / "figures.json", accelerate)
    assert row["difference"] > 1e-3


def test_both_sides_hold_the_same_memory():
    params = drop_in.WIDTHS["small"][0]
    unet, _ = drop_in.pair(params, torch.device("cpu"), torch.bfloat16, torch.channels_last)
    other = drop_in.twin(unet)
    tensors, others = ({n: t.data_ptr() for n, t in m.state_dict().items()} for m in (unet, other))
    assert tensors == others and other is not unet
    other.conv_in.weight.data = other.conv_in.weight.data.contiguous()
    assert unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert not any(t.is_meta for t in (*other.parameters(), *other.buffers()))
