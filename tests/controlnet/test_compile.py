"""torch.compile of whole steps: one graph, the results of eager execution, nothing compiled again for other sizes."""

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from controlnet.model.controlled import ControlledUNet
from controlnet.model.controlnet import ControlNet
from controlnet.model.diffusion import DiffusionLoss, NoiseSchedule
from controlnet.model.unet import UNet
from controlnet.training.compiling import mark_sizes
from tests.controlnet.twins import BASE, assert_same, randomise

# One level with attention and one without: a block of every kind, an upsampling, a downsampling.
SMALL = BASE | {"attention_resolutions": [1], "use_flash_attention": True}
SIZES = [(2, 4, 4), (3, 8, 10), (4, 6, 12), (5, 10, 4)]  # N, H, W; the second makes them variables


def model(**options) -> ControlledUNet:
    unet = randomise(UNet(**SMALL | options, out_channels=4))
    return ControlledUNet(unet, randomise(ControlNet(**SMALL | options, hint_channels=3), seed=1))


def images(n: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """latents, hint, context, timesteps."""
    generator = torch.Generator().manual_seed(1)
    latents, context = (torch.randn(n, *size, generator=generator) for size in ((4, height, width), (7, 24)))
    hint = torch.rand(n, 3, 8 * height, 8 * width, generator=generator)
    return latents, hint, context, torch.arange(999, 999 - n, -1)


@pytest.fixture
def counter():
    torch._dynamo.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


def test_training_step(counter):
    """Forward and backward of the loss, every gradient; one graph for all sizes, marked as training marks them."""
    step = DiffusionLoss(model(), NoiseSchedule())
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    frames = []
    for _, height, width in SIZES[:3]:
        latents, hint, context, timesteps = images(2, height, width)
        noise = latents.flip(0)
        mark_sizes(latents, hint, noise)
        gradients = []
        for function in (step, compiled):
            step.zero_grad()
            loss = function(latents, hint, context, noise, timesteps)
            loss.backward()
            gradients.append([loss.detach(), *(p.grad for p in step.model.trainable_parameters())])
        for got, want in zip(*reversed(gradients), strict=True):
            assert_same(got, want, rtol=1e-3)
        frames.append(counter.frame_count)
    assert frames == [1, 1, 1]


def test_training_step_with_a_trained_decoder_and_checkpointing(counter):
    step = DiffusionLoss(model(use_checkpoint=True, channel_mult=[1]), NoiseSchedule())
    step.model.unet.output_blocks.requires_grad_(True)
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    latents, hint, context, timesteps = images(*SIZES[0])
    gradients = []
    for function in (step, compiled):
        step.zero_grad()
        function(latents, hint, context, latents.flip(0), timesteps).backward()
        gradients.append([p.grad for p in step.model.trainable_parameters()])
    for got, want in zip(*reversed(gradients), strict=True):
        assert_same(got, want, rtol=1e-3)
    assert counter.frame_count == 1


@torch.no_grad()
def test_inference_step(counter):
    """Over batches, sizes and strengths of the control."""
    step = model()
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    frames = []
    for i, size in enumerate(SIZES):
        latents, hint, context, timesteps = images(*size)
        scales = torch.tensor(0.25 * i)
        want = step(latents, timesteps, context, hint, scales=scales)
        assert_same(compiled(latents, timesteps, context, hint, scales=scales), want, rtol=1e-4)
        frames.append(counter.frame_count)
    assert frames == [1, 2, 2, 2]
