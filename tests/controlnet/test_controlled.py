"""The exits of the ControlNet: one operation for all of them, masks apart."""

import torch

import cnkernels
from cnkernels.nn import ZeroConv2d
from controlnet.model.scales import controlled

SIZES = [(8, 4, 6), (8, 4, 6), (16, 2, 3), (16, 1, 1)]  # channels, height, width


def layers(n=2):
    torch.manual_seed(0)
    features = [torch.randn(n, *size) for size in SIZES]
    convs = [ZeroConv2d(channels, channels) for channels, *_ in SIZES]
    for conv in convs:
        torch.nn.init.normal_(conv.weight)
        torch.nn.init.normal_(conv.bias)
    return convs, features


def test_all_outputs_are_one_operation(monkeypatch):
    convs, features = layers()
    residuals = [torch.randn_like(features[0]), None, torch.randn_like(features[2]), torch.randn_like(features[3])]
    mask = torch.rand(2, 1, 4, 6)
    scales = [0.5, torch.tensor([1.0, -1.0]), mask, torch.tensor(0.25)]
    want = [
        conv(*layer) for conv, *layer in zip(convs, features, residuals, [*scales[:2], 1.0, scales[3]], strict=True)
    ]
    factor = torch.nn.functional.interpolate(mask, size=(2, 3), mode="area")
    want[2] = torch.addcmul(residuals[2], factor, convs[2](features[2]))
    calls = []
    group = cnkernels.zero_conv_add_group
    monkeypatch.setattr(cnkernels, "zero_conv_add_group", lambda *arguments: calls.append(1) or group(*arguments))
    for output, expected in zip(controlled(convs, features, residuals, scales), want, strict=True):
        assert torch.equal(output, expected)
    assert len(calls) == 1


def test_a_mask_of_one_pixel_is_one_number_for_all_samples():
    convs, features = layers()
    residuals = [None] * len(convs)
    got = controlled(convs, features, residuals, [torch.full((1, 1, 1, 1), 0.25)] * len(convs))
    for output, conv, feature in zip(got, convs, features, strict=True):
        assert torch.equal(output, conv(feature, scale=torch.tensor(0.25)))


def test_a_scale_of_zero_computes_nothing(monkeypatch):
    convs, features = layers()
    residuals = [torch.randn_like(features[0]), None, torch.randn_like(features[2]), None]
    scales = [0, 0.0, 0.5, 0.0]
    with torch.no_grad():
        want = [conv(*rest) for conv, *rest in zip(convs, features, residuals, scales, strict=True)]
    lengths = []
    group = cnkernels.zero_conv_add_group
    monkeypatch.setattr(cnkernels, "zero_conv_add_group", lambda xs, *rest: lengths.append(len(xs)) or group(xs, *rest))
    with torch.no_grad():
        for output, expected in zip(controlled(convs, features, residuals, scales), want, strict=True):
            assert torch.equal(output, expected)
        controlled(convs, features, residuals, [0.0] * len(convs))
    assert lengths == [1]  # and the second call has none


def test_a_trained_convolution_has_a_gradient_at_scale_zero():
    convs, features = layers()
    total = sum(output.sum() for output in controlled(convs, features, [None] * len(convs), [0.0] * len(convs)))
    total.backward()
    for conv in convs:
        assert torch.equal(conv.weight.grad, torch.zeros_like(conv.weight))
