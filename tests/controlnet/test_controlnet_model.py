"""The ControlNet against diffusers': outputs, gradients, initial zeros, scales, bad input."""

import pytest
import torch

from controlnet.model.controlnet import ControlNet
from controlnet.model.unet import UNet
from tests.controlnet import twins
from tests.controlnet.twins import BASE, CASES, assert_same, randomise

UNIFORM = {name: case for name, case in CASES.items() if len(set(case.res_blocks)) == 1}
CONTROL = BASE | {"hint_channels": 3}
N_OUTPUTS = 5  # of BASE: the first convolution, a block, the downsampling, a block, the middle


def small_inputs(n: int = 2, height: int = 4, width: int = 6) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    x, context = torch.randn(n, 4, height, width), torch.randn(n, 7, 24)
    return x, torch.rand(n, 3, 8 * height, 8 * width), torch.arange(999, 999 - n, -1), context


@pytest.mark.parametrize("case", UNIFORM.values(), ids=UNIFORM)
def test_equals_diffusers(case):
    ours, theirs = twins.controlnet_pair(case)
    x, timesteps, context, hint = twins.inputs(case)
    got = ours(x, hint, timesteps, context)
    upstream = [torch.randn_like(t) for t in got]
    got_grads = torch.autograd.grad(got, [x, context, hint], upstream, retain_graph=True)
    torch.autograd.backward(got, upstream)

    down, mid = theirs(x, timesteps, context, hint, return_dict=False)
    want = [*down, mid]
    want_grads = torch.autograd.grad(want, [x, context, hint], upstream, retain_graph=True)
    torch.autograd.backward(want, upstream)
    for a, b in zip([*got, *got_grads], [*want, *want_grads], strict=True):
        assert_same(a, b)
    twins.assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_controlled_unet_equals_diffusers(name):
    """Both networks together, a strength, and the additions fused into the zero convolutions."""
    case = CASES[name]
    unet, their_unet = twins.unet_pair(case)
    control, their_control = twins.controlnet_pair(case)
    x, timesteps, context, hint = twins.inputs(case)
    down, mid = their_control(x, timesteps, context, hint, conditioning_scale=0.7, return_dict=False)
    want = their_unet(
        x, timesteps, context, down_block_additional_residuals=down, mid_block_additional_residual=mid
    ).sample

    assert_same(unet(x, timesteps, context, control(x, hint, timesteps, context, scales=0.7)), want)
    h, skips = unet.encode(x, timesteps, context)
    *skips, h = control(x, hint, timesteps, context, residuals=[*skips, h], scales=0.7)
    assert_same(unet.decode(h, skips, None, timesteps, context), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_new_controlnet_changes_nothing(dtype, memory_format):
    """At step 0 controlled and uncontrolled output are the same bit for bit, by either way of adding."""
    unet = randomise(UNet(**BASE, out_channels=4)).to(dtype=dtype, memory_format=memory_format)
    control = ControlNet(**CONTROL).to(dtype=dtype, memory_format=memory_format)
    control.copy_from(unet)
    x, hint, timesteps, context = small_inputs()
    uncontrolled = unet(x, timesteps, context)
    residuals = control(x, hint, timesteps, context)
    assert len(residuals) == N_OUTPUTS and not any(t.any() for t in residuals)
    assert torch.equal(unet(x, timesteps, context, residuals), uncontrolled)

    h, skips = unet.encode(x, timesteps, context)
    *controlled, middle = control(x, hint, timesteps, context, residuals=[*skips, h])
    assert torch.equal(unet.decode(middle, controlled, None, timesteps, context), uncontrolled)
    assert uncontrolled.abs().max() > 0.1


def test_gradients_reach_the_trunk_in_three_steps():
    """Step 1 moves the zero convolutions, step 2 the trunk and the hint's last convolution, step 3 everything."""
    control = ControlNet(**CONTROL)
    control.copy_from(randomise(UNet(**BASE, out_channels=4)))
    optimizer = torch.optim.SGD(control.parameters(), lr=0.01)
    x, hint, timesteps, context = small_inputs()
    moved = []
    for _ in range(3):
        optimizer.zero_grad()
        sum((t - 1).square().mean() for t in control(x, hint, timesteps, context)).backward()
        moved.append({name for name, p in control.named_parameters() if p.grad.any()})
        optimizer.step()
    names = {name for name, _ in control.named_parameters()}
    zero_convs = {name for name in names if name.startswith(("zero_convs", "middle_block_out"))}
    hint_encoder = {name for name in names if name.startswith("input_hint_block") and "14" not in name}
    assert moved == [zero_convs, names - hint_encoder, names]


def test_copy_from():
    unet = randomise(UNet(**BASE, out_channels=4))
    control = randomise(ControlNet(**CONTROL), seed=1)
    own = {name: p.clone() for name, p in control.state_dict().items()}
    control.copy_from(unet)
    source = unet.state_dict()
    copied = {name for name, p in control.state_dict().items() if name in source and torch.equal(p, source[name])}
    kept = {name for name, p in control.state_dict().items() if torch.equal(p, own[name])}
    assert copied | kept == set(own) and not copied & kept
    assert {name.split(".")[0] for name in kept} == {"zero_convs", "input_hint_block", "middle_block_out"}
    with torch.no_grad():
        control.input_blocks[0][0].weight.zero_()
    assert unet.input_blocks[0][0].weight.any(), "the copy shares memory with its source"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_resolutions": [2]}, r"unet: input_blocks\.1\.1\.norm\.weight is missing; expected \[32\]"),
        ({"context_dim": 16}, r"unet: .*to_k\.weight is \[32, 16\]; expected \[32, 24\]"),
        ({"use_linear_in_transformer": True}, r"proj_in\.weight is \[32, 32\]; expected \[32, 32, 1, 1\]"),
    ],
)
def test_copy_from_another_architecture(change, message):
    with pytest.raises(ValueError, match=message):
        ControlNet(**CONTROL).copy_from(UNet(**BASE | change, out_channels=4))


def test_scales_and_residuals():
    """A number, a tensor, one per sample, one per output; and residuals that are None for some outputs."""
    control = randomise(ControlNet(**CONTROL).double())
    x, hint, timesteps, context = small_inputs()
    plain = control(x, hint, timesteps, context)
    per_sample = torch.tensor([0.5, -2.0])
    mixed = [0.5, torch.tensor(3.0), per_sample, 0.0, 1]
    by_sample = per_sample.double()[:, None, None, None]
    for scales, factors in [
        (0.25, [0.25] * N_OUTPUTS),
        (torch.tensor(0.25), [0.25] * N_OUTPUTS),
        (per_sample, [by_sample] * N_OUTPUTS),
        (mixed, [0.5, 3.0, by_sample, 0.0, 1.0]),
    ]:
        residuals = [None, *[torch.randn_like(t) for t in plain[1:]]]
        got = control(x, hint, timesteps, context, scales=scales, residuals=residuals)
        for output, unscaled, factor, residual in zip(got, plain, factors, residuals, strict=True):
            assert_same(output, unscaled * factor if residual is None else residual + unscaled * factor, rtol=1e-14)


def test_guided_hint_is_the_encoded_hint():
    control = randomise(ControlNet(**CONTROL, hint_block_channels=(8, 16)))
    x, _, timesteps, context = small_inputs()
    hint = torch.rand(2, 3, 8, 12)  # one halving: twice the latent's size
    guided_hint = control.encode_hint(hint)
    assert guided_hint.shape == (2, 32, 4, 6)
    got = control(x, None, timesteps, context, guided_hint=guided_hint)
    for a, b in zip(got, control(x, hint, timesteps, context), strict=True):
        assert torch.equal(a, b)
    other = control(x, 1 - hint, timesteps, context)
    assert all((a - b).abs().max() > 0.01 for a, b in zip(got, other, strict=True))


@torch.no_grad()
def test_prepared_inputs_change_nothing():
    case = CASES["sd15"]
    ours, _ = twins.controlnet_pair(case)
    x, timesteps, context, hint = twins.inputs(case)
    got = ours(x, None, timesteps, ours.prepare_context(context), guided_hint=ours.encode_hint(hint))
    for output, expected in zip(got, ours(x, hint, timesteps, context), strict=True):
        assert_same(output, expected)


def test_channels_last_is_kept():
    control = randomise(ControlNet(**CONTROL)).to(memory_format=torch.channels_last)
    unet = randomise(UNet(**BASE, out_channels=4)).to(memory_format=torch.channels_last)
    x, hint, timesteps, context = small_inputs()
    x, hint = (t.contiguous(memory_format=torch.channels_last) for t in (x, hint))
    h, skips = unet.encode(x, timesteps, context)
    outputs = control(x, hint, timesteps, context, residuals=[*skips, h], scales=torch.tensor([1.0, 0.0]))
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in outputs)
    assert unet.decode(outputs[-1], outputs[:-1], None, timesteps, context).is_contiguous(
        memory_format=torch.channels_last
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hint": torch.rand(2, 3, 32, 40)}, r"hint has shape \[2, 3, 32, 40\]; expected \[2, 3, 32, 48\]"),
        ({"hint": torch.rand(2, 1, 32, 48)}, r"hint has shape \[2, 1, 32, 48\]; expected \[2, 3, 32, 48\]"),
        ({"hint": None}, "hint is None; expected"),
        ({"guided_hint": torch.rand(2, 32, 4, 4)}, r"guided_hint has shape .*; expected \[2, 32, 4, 6\]"),
        ({"scales": [1.0] * 13}, "scales has 13 entries; expected 5"),
        ({"residuals": [None] * 4}, "residuals has 4 entries; expected 5"),
        ({"x": torch.rand(4, 4, 6)}, r"x has shape \[4, 4, 6\]; expected \[N, 4, H, W\]"),
    ],
)
def test_wrong_inputs(change, message):
    inputs = dict(zip(("x", "hint", "timesteps", "context"), small_inputs(), strict=True))
    with pytest.raises(ValueError, match=message):
        ControlNet(**CONTROL)(**inputs | change)
