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


@pytest.mark.parametrize("changes", [1, 3])
@torch.no_grad()
def test_step_graph_of_accelerated_models(changes):
    """The graphs of `accelerate(..., graph=True)` follow inputs, scale and weights, and give the memory back."""
    pytest.importorskip("diffusers")
    import controlnet
    from tests.controlnet.diffusers_models import CONTEXT, unet
    from tests.controlnet.diffusers_models import controlnet as control_model

    base = unet()
    models = [m.to("cuda", torch.bfloat16) for m in (base, control_model(base))]
    x, context = (torch.randn(2, *size, device="cuda", dtype=torch.bfloat16) for size in ((4, 16, 16), (7, CONTEXT)))
    hint = torch.rand(2, 3, 128, 128, device="cuda", dtype=torch.bfloat16)

    def step(scale):
        down, middle = models[1](x, 500, context, hint, conditioning_scale=scale, return_dict=False)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        return models[0](x, 500, context, **residuals, return_dict=False)[0]

    def close(actual, expected):
        assert (actual - expected).float().norm() <= 0.02 * expected.float().norm()

    for net in models:
        controlnet.accelerate(net)
    results = []
    for graph in (False, True):
        for net in models:
            controlnet.accelerate(net, graph=graph)
        for i in range(changes):
            for tensor in (x, context, hint):
                tensor.mul_(-1)
            results.append(step(0.5 + i))
        for tensor in (x, context, hint):
            tensor.mul_((-1) ** changes)  # as they were
    for eager, replayed in zip(results[:changes], results[changes:], strict=True):
        close(replayed, eager)
    for net in models:
        controlnet.restore(net)
    close(step(0.5), step(0.5))


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
