"""`benchmarks.drop_in` with a stand-in for `controlnet.accelerate`: it reports changed times and changed results."""

import json
import os
import signal

import pytest
import torch

import controlnet
from benchmarks import drop_in, jobs

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


def test_an_interrupted_run_keeps_its_turns(monkeypatch, tmp_path, capsys):
    """Ctrl-C in the third turn, of the first of two dtypes."""
    stock, calls = drop_in.seconds, []

    def seconds(*args):
        calls.append(args)
        if len(calls) == 6:  # a turn is two
            os.kill(os.getpid(), signal.SIGINT)
        return stock(*args)

    path = tmp_path / "figures.json"
    monkeypatch.setitem(drop_in.WIDTHS, "small", (jobs.TINY, 8))
    monkeypatch.setattr(controlnet, "accelerate", lambda module: module, raising=False)
    monkeypatch.setattr(drop_in, "seconds", seconds)
    assert drop_in.main(["--width", "small", "--dtype", "fp32", "bf16", "--repeats", "4", "--output", str(path)]) == 130
    result = json.loads(path.read_text())
    (row,) = result["rows"]
    assert (row["turns"], result["stopped"]) == (2, "interrupted")
    out, err = capsys.readouterr()
    assert f"{row['ratio']['median']:.3f}" in out
    assert "turn 2 of 4" in err and "s left" in err and "not begun: bf16" in err


def test_a_run_ends_within_its_budget(monkeypatch, tmp_path, capsys):
    class Two(drop_in.Budget):
        def left(self):
            return 0.0 if len(taken) >= 4 else 1e3

    stock, taken = drop_in.seconds, []
    path = tmp_path / "figures.json"
    monkeypatch.setitem(drop_in.WIDTHS, "small", (jobs.TINY, 8))
    monkeypatch.setattr(controlnet, "accelerate", lambda module: module, raising=False)
    monkeypatch.setattr(drop_in, "seconds", lambda *args: taken.append(args) or stock(*args))
    monkeypatch.setattr(drop_in, "Budget", Two)
    options = ["--width", "small", "--dtype", "fp32", "bf16", "--budget", "1000", "--output", str(path)]
    assert drop_in.main(options) == 0
    result = json.loads(path.read_text())
    assert [row["turns"] for row in result["rows"]] == [2]
    assert "within the budget" in result["stopped"] and "not begun: bf16" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--budget", "0"], ["--repeats", "0"]], ids=str)
def test_options_that_make_no_sense(option, capsys):
    with pytest.raises(SystemExit):
        drop_in.main(option)
    assert option[0] in capsys.readouterr().err


def test_both_sides_hold_the_same_memory():
    params = drop_in.WIDTHS["small"][0]
    unet, _ = drop_in.pair(params, torch.device("cpu"), torch.bfloat16, torch.channels_last)
    other = drop_in.twin(unet)
    tensors, others = ({n: t.data_ptr() for n, t in m.state_dict().items()} for m in (unet, other))
    assert tensors == others and other is not unet
    other.conv_in.weight.data = other.conv_in.weight.data.contiguous()
    assert unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert not any(t.is_meta for t in (*other.parameters(), *other.buffers()))
