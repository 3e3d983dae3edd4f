"""Scales per sample, per output and over the image, against their formula, without and with guidance."""

import pytest
import torch
import torch.nn.functional as F

from controlnet.inference.sampling import guided
from controlnet.model.controlled import ControlledUNet
from controlnet.model.controlnet import ControlNet
from controlnet.model.scales import for_both_halves
from controlnet.model.unet import UNet
from tests.controlnet.twins import BASE, assert_same, randomise

SIZES = [(4, 6), (4, 6), (2, 3), (2, 3), (2, 3)]  # of the outputs: two skips, a downsampling, a skip, the middle block


@pytest.fixture(scope="module")
def control():
    return randomise(ControlNet(**BASE, hint_channels=3, hint_block_channels=(8,)).double())


@pytest.fixture(scope="module")
def unet():
    return randomise(UNet(**BASE, out_channels=4).double(), seed=3)


def inputs(n=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x, hint = torch.randn(n, 4, 4, 6, generator=generator), torch.rand(n, 3, 4, 6, generator=generator)
    context = torch.randn(n, 5, 24, generator=generator)
    return x.to(dtype), hint.to(dtype), torch.tensor([7, 600])[:n], context.to(dtype)


def averaged(mask, size):
    """Each output pixel is the mean of the rectangle of mask pixels that it touches."""
    height, width = size
    rows = [(i * mask.shape[2] // height, -(-(i + 1) * mask.shape[2] // height)) for i in range(height)]
    columns = [(j * mask.shape[3] // width, -(-(j + 1) * mask.shape[3] // width)) for j in range(width)]
    cells = [[mask[:, 0, a:b, c:d].mean((1, 2)) for c, d in columns] for a, b in rows]
    return torch.stack([torch.stack(row, -1) for row in cells], -2)[:, None]  # [B, 1, height, width]


@pytest.mark.parametrize("with_residuals", [True, False])
@pytest.mark.parametrize(
    "shape", [(2, 1, 4, 6), (1, 1, 4, 6), (2, 1, 32, 48), (2, 1, 5, 7), (1, 1, 1, 2), (2, 1, 2, 1)]
)
def test_a_mask_is_averaged_to_each_level(control, shape, with_residuals):
    plain = control(*inputs())
    assert [tuple(output.shape[2:]) for output in plain] == SIZES
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    residuals = [torch.randn_like(output) for output in plain] if with_residuals else None
    got = control(*inputs(), scales=mask, residuals=residuals)
    for i, (output, unscaled) in enumerate(zip(got, plain, strict=True)):
        want = averaged(mask.double(), SIZES[i]) * unscaled
        assert_same(output, want + residuals[i] if with_residuals else want, rtol=1e-6)  # the mask is float32


def test_a_constant_mask_is_a_number(control):
    for one, other in zip(control(*inputs(), scales=torch.full((2, 1, 8, 8), 0.25)), control(*inputs(), scales=0.25),
                          strict=True):  # fmt: skip
        assert_same(one, other, rtol=1e-7)


def test_one_pixel_is_one_number_for_each_sample(control):
    numbers = torch.tensor([0.5, -1.0])
    got, want = control(*inputs(), scales=numbers[:, None, None, None]), control(*inputs(), scales=numbers)
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


def test_every_kind_in_one_list(control):
    mask = torch.rand(2, 1, 4, 6)
    got = control(*inputs(), scales=[0.5, mask, torch.tensor(2.0), torch.tensor([1.0, 0.0]), 0])
    factors = [0.5, averaged(mask.double(), SIZES[1]), 2.0, torch.tensor([1.0, 0.0])[:, None, None, None], 0]
    for output, unscaled, factor in zip(got, control(*inputs()), factors, strict=True):
        assert_same(output + unscaled, unscaled * (factor + 1), rtol=1e-6)  # where the factor is 0, too, not all is 0


def test_where_the_mask_is_zero_the_unet_is_alone(control, unet):
    """At every level, so that the residuals there are the U-Net's own to the bit."""
    mask = torch.ones(1, 1, 4, 6)
    mask[:, :, :, :2] = 0
    x, hint, timesteps, context = inputs()
    h, skips = unet.encode(x, timesteps, context)
    got = control(x, hint, timesteps, context, residuals=[*skips, h], scales=mask)
    for output, skip in zip(got, [*skips, h], strict=True):
        kept = skip.shape[3] // 3
        assert torch.equal(output[..., :kept], skip[..., :kept])
        assert (output[..., kept:] - skip[..., kept:]).abs().max() > 0.01


def test_gradients_through_a_mask(control):
    x, hint, timesteps, context = inputs(1)
    mask = torch.rand(1, 1, 2, 3, dtype=torch.float64, requires_grad=True)
    x.requires_grad_()

    def last(x, mask):
        features = control(x, hint, timesteps, context)[-1]
        return features.sum(), (F.adaptive_avg_pool2d(mask, (2, 3)) * features).square().sum()

    want = torch.autograd.grad(last(x, mask)[1], (x, mask))
    got = torch.autograd.grad(control(x, hint, timesteps, context, scales=mask)[-1].square().sum(), (x, mask))
    for one, other in zip(got, want, strict=True):
        assert_same(one, other, rtol=1e-5)  # the mask is averaged in float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_and_memory_format_of_the_outputs_stay(dtype):
    control = randomise(ControlNet(**BASE, hint_channels=3, hint_block_channels=(8,)))
    control = control.to(dtype, memory_format=torch.channels_last)
    for output in control(*inputs(dtype=dtype), scales=torch.rand(2, 1, 8, 12)):
        assert output.dtype == dtype and output.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("mask", "pattern"),
    [
        (torch.ones(3, 1, 4, 6), r"mask of shape \[3, 1, 4, 6\]; expected \[2, 1, h, w\] or \[1, 1, h, w\]"),
        (torch.ones(2, 4, 4, 6), r"mask of shape \[2, 4, 4, 6\]"),
        (torch.ones(2, 1, 0, 6), r"mask of shape \[2, 1, 0, 6\]"),
        (torch.ones(2, 1, 4, 6, dtype=torch.int64), "mask of torch.int64; expected floating point"),
    ],
)
def test_a_mask_that_does_not_fit(control, mask, pattern):
    with pytest.raises(ValueError, match=pattern):
        control(*inputs(), scales=mask)


# guidance


SCALES = {
    "number": 0.7,
    "per sample": torch.tensor([0.5, 2.0]),
    "mask": torch.rand(2, 1, 4, 6, generator=torch.Generator().manual_seed(2)),
    "one mask": torch.rand(1, 1, 4, 6, generator=torch.Generator().manual_seed(3)),
    "per output": [0.5, torch.tensor([1.0, 0.1]), 1.0, torch.rand(2, 1, 8, 12), 2],
}


@pytest.mark.parametrize("guess_mode", [True, False])
@pytest.mark.parametrize("kind", SCALES)
def test_guidance_with_every_kind_of_scale(control, unet, kind, guess_mode):
    """Both halves in one batch are each half by itself, the unconditional one uncontrolled in guess mode."""
    model, scales = ControlledUNet(unet, control, sd_locked=True, only_mid_control=False), SCALES[kind]
    x, hint, timesteps, context = inputs()
    uncond = context.flip(1)
    options = {"hint": hint, "guidance_scale": 3.0, "scales": scales, "guess_mode": guess_mode}
    got = guided(model, context, uncond_context=uncond, **options)(x, timesteps)
    every = scales if isinstance(scales, list) else [scales] * 5
    every = [scale * 0.825 ** (4 - i) for i, scale in enumerate(every)] if guess_mode else every
    with torch.no_grad():
        cond = model(x, timesteps, context, hint, scales=every)
        free = model(x, timesteps, uncond, None if guess_mode else hint, scales=every)
    assert_same(got, (free + 3 * (cond - free)).float(), rtol=1e-5)


def test_what_both_halves_share_stays_a_number():
    device = torch.device("cpu")
    for scale in (0.5, torch.tensor(0.5), torch.rand(1, 1, 4, 4)):
        assert for_both_halves(scale, 2, device, conditional_only=False) is scale
    rows = for_both_halves(0.5, 2, device, conditional_only=True)
    assert rows.tolist() == [0, 0, 0.5, 0.5]
