"""Whole steps inside a CUDA graph: capture fails on a synchronisation or on memory from outside the graph's pool."""

import pytest
import torch

from controlnet.model.diffusion import DiffusionLoss, NoiseSchedule
from tests.controlnet.test_compile import images, model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def placed(tensors):
    """On the GPU, in bfloat16 and channels_last; timesteps stay integers."""
    for t in tensors:
        t = t.cuda() if t.dtype == torch.int64 else t.to("cuda", torch.bfloat16)
        yield t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t


def capture(function):
    """A graph of one call of function, and what the call returned: the graph writes there."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # kernels are compiled and libraries initialised before the capture
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function()
    return graph, outputs


@torch.no_grad()
def test_inference_step():
    step = model().to("cuda", torch.bfloat16).to(memory_format=torch.channels_last)
    latents, hint, context, timesteps = placed(images(2, 8, 8))
    scales = torch.ones((), device="cuda")
    graph, got = capture(lambda: step(latents, timesteps, context, hint, scales=scales))
    for factor in (0.5, 2.0):  # new inputs in the same memory
        latents.mul_(factor)
        scales.mul_(factor)
        graph.replay()
        assert torch.equal(got, step(latents, timesteps, context, hint, scales=scales))


def test_training_step():
    step = DiffusionLoss(model().to("cuda", torch.bfloat16).to(memory_format=torch.channels_last), NoiseSchedule())
    step.schedule.cuda()
    latents, hint, context, timesteps = placed(images(2, 8, 8))
    noise = latents.flip(0)
    parameters = list(step.model.trainable_parameters())

    def gradients():
        return torch.autograd.grad(step(latents, hint, context, noise, timesteps), parameters)

    graph, got = capture(gradients)
    for factor in (0.5, 2.0):
        latents.mul_(factor)
        graph.replay()
        # cuDNN may choose another convolution inside the graph, hence not bit for bit.
        for ours, eager in zip(got, gradients(), strict=True):
            assert (ours - eager).float().norm() <= 0.02 * eager.float().norm() + 1e-6
