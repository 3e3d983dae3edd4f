"""Bounds on the saved bytes of a training step and the operations of a forward pass, relative to diffusers."""

import json

import pytest

from benchmarks import device_free

pytest.importorskip("diffusers")


# Of diffusers 0.42, so that the yardstick does not move: saved MB, operations. Then the most that ours may be of it.
# What SDXL saves is nine tenths transformer blocks, where only products could be computed again to save less.
EXPECTED = {"sd15": (909, 1100, 0.62, 0.6), "sdxl": (6383, 2809, 0.65, 0.6)}


@pytest.fixture(scope="module", params=list(EXPECTED))
def model(request):
    return request.param


@pytest.fixture(scope="module")
def rows(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("figures") / "device_free.json"
    device_free.main(["--model", model, "--json", str(path)])
    return json.loads(path.read_text())


def test_saved_bytes(rows, model):
    row, (saved, _, most, _) = rows["saved for backward, MB"], EXPECTED[model]
    assert row["diffusers"] == pytest.approx(saved, rel=0.05)
    assert row["ratio"] <= most


def test_operations(rows, model):
    row, (_, count, _, most) = rows["operations of one forward"], EXPECTED[model]
    assert row["diffusers"] == pytest.approx(count, rel=0.05)
    assert row["ratio"] <= most


def test_the_work_is_the_same(rows):
    """Nothing was saved by leaving out a product; packing and fusing change none."""
    for network in ("U-Net", "ControlNet", "denoise step with guidance"):
        assert rows[f"TFLOP, {network}"]["ratio"] == pytest.approx(1, abs=1e-6)


def test_what_is_counted():
    """The counter counts work, not views or allocations; the meter storages, once each, without parameters."""
    import torch

    with device_free.OperationCounter() as counter:
        x = torch.empty(4, 4)
        x.fill_(1).view(2, 8).transpose(0, 1).expand(8, 2).detach().add(1).mul_(2)
    assert counter.counts == {"aten.fill_.Scalar": 1, "aten.add.Tensor": 1, "aten.mul_.Tensor": 1}

    layer = torch.nn.Linear(16, 16, bias=False).to(device_free.DTYPE)
    network = device_free.Networks([layer], lambda x, *_: layer(layer(x.flatten(1)[:, :16])).exp(), None, None)
    # The input's storage (all of x), the first layer's output, exp's result, and of the loss the float32 copy.
    x_bytes = 2 * 4 * 64 * 64
    assert device_free.saved_bytes(network) == x_bytes + 2 * 16 + 2 * 16 + 4 * 16


def test_the_flops_of_a_group_are_those_of_its_layers():
    """A product inside an op of ours is counted, whether it runs alone or in a group."""
    import torch

    import cnkernels

    def layers(x, *_):
        xs = [x.expand(-1, 4, -1, -1), x[..., :32]]
        return xs, [torch.zeros(8, 4, 1, 1, dtype=x.dtype), torch.zeros(16, 4, 1, 1, dtype=x.dtype)]

    def alone(*inputs):
        return [cnkernels.zero_conv_add(x, weight) for x, weight in zip(*layers(*inputs), strict=True)]

    def group(*inputs):
        return cnkernels.zero_conv_add_group(*layers(*inputs))

    expected = 2 * 4 * (64 * 64 * 8 + 64 * 32 * 16)
    assert device_free.flops(alone, 1) == device_free.flops(group, 1) == expected
