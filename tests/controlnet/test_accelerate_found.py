"""Reported uses of diffusers, replayed on accelerated models: same results in float64, or a clear error."""

import copy
import threading
import time
import types

import diffusers
import pytest
import torch
from diffusers.models import attention, attention_processor, resnet
from diffusers.training_utils import EMAModel
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import controlnet
from controlnet.diffusers import forget, memo
from tests.controlnet.diffusers_models import CONTEXT, draw, fused, image, pipeline, prompt, unet
from tests.controlnet.diffusers_models import controlnet as control_model
from tests.controlnet.test_accelerate import exact, inputs, step


@pytest.fixture
def both():
    base = unet().double()
    return base, control_model(base).double()


def wide_step(base, control):
    return step(base, control, torch.float64)


# --- attributes of the living model


def circular(layer):
    if isinstance(layer, torch.nn.Conv2d):
        layer.padding_mode = "circular"


def own_convolution(layer):
    if isinstance(layer, torch.nn.Conv2d):
        stock = layer._conv_forward
        layer._conv_forward = lambda x, weight, bias: 1.1 * stock(x, weight, bias)


def dilated(layer):
    if isinstance(layer, torch.nn.Conv2d) and layer.padding == (1, 1):
        layer.dilation, layer.padding = (2, 2), (2, 2)


def hotter(layer):
    if isinstance(layer, attention_processor.Attention):
        layer.scale *= 1.5


def other_eps(layer):
    if isinstance(layer, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
        layer.eps = 0.1


def other_heads(layer):
    if isinstance(layer, attention_processor.Attention):
        layer.heads *= 2


def half_as_much(layer):
    if isinstance(layer, resnet.ResnetBlock2D):
        layer.output_scale_factor = 2.0


@pytest.mark.parametrize("first", ["accelerate", "change"])
@pytest.mark.parametrize("change", [circular, own_convolution, dilated, hotter, other_eps, other_heads, half_as_much])
def test_changed_attributes(change, first, both):
    """In inference and with gradients; what is set back is forgotten."""
    for model in both:
        model.set_attn_processor(attention_processor.AttnProcessor())
    reference = copy.deepcopy(both)
    plain = wide_step(*reference).detach()
    for model in reference:
        model.apply(change)
    expected = wide_step(*reference).detach()
    assert (expected - plain).abs().max() > 1e-3 * plain.abs().max()
    ours = copy.deepcopy(both)
    for model in ours:
        if first == "accelerate":
            controlnet.accelerate(model).apply(change)
        else:
            controlnet.accelerate(model.apply(change))
    with torch.no_grad():
        exact(wide_step(*ours), expected)
    exact(wide_step(*ours).detach(), expected)


# --- classes patched for the whole process

PATCHES = [
    (attention.BasicTransformerBlock, "forward"),
    (attention.FeedForward, "forward"),
    (attention_processor.Attention, "forward"),
    (attention_processor.AttnProcessor2_0, "__call__"),
    (resnet.ResnetBlock2D, "forward"),
    (torch.nn.Linear, "forward"),
    (torch.nn.GroupNorm, "forward"),
    (F, "scaled_dot_product_attention"),
]


@pytest.mark.parametrize(("owner", "name"), PATCHES, ids=lambda value: getattr(value, "__name__", value))
@torch.no_grad()
def test_patches_win(owner, name, both, monkeypatch):
    plain = wide_step(*both)
    stock = getattr(owner, name)
    for model in both:
        controlnet.accelerate(model)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: 1.1 * stock(*args, **kwargs))
    reference = tuple(map(controlnet.restore, copy.deepcopy(both)))
    expected = wide_step(*reference)
    assert (expected - plain).abs().max() > 1e-3 * plain.abs().max()
    with pytest.warns(UserWarning, match=f"a patched .*{name}|scaled_dot"):
        exact(wide_step(*both), expected)
    monkeypatch.undo()
    with fused() as counts:
        exact(wide_step(*both), plain)
    assert counts["attention"] > 20


# --- what is kept


class Recorder(TorchDispatchMode):
    """Notes every operation, to run it again into the same outputs, as a CUDA graph does."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, out))
        return out

    def replay(self):
        for function, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@torch.no_grad()
def test_captured_by_hand(both):
    """Whoever records a step and runs it on other inputs in the same memory gets nothing kept of the first ones."""
    x, t, context, hint = inputs(torch.float64)

    def run():
        down, middle = both[1](x, t, context, hint, return_dict=False)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        return both[0](x, t, context, **residuals).sample

    for model in both:
        controlnet.accelerate(model)
    run()
    with Recorder() as graph:
        out = run()
    for tensor in (x, context, hint):
        tensor.mul_(-0.5)
        graph.replay()
        exact(out, run())


@pytest.mark.parametrize("foreach", [False, True])
@torch.no_grad()
def test_ema_weights(foreach, both):
    base, _ = both
    x, t, context, _ = inputs(torch.float64)
    ema = EMAModel([0.8 * p for p in base.parameters()], foreach=foreach)
    plain = base(x, t, context).sample
    reference = copy.deepcopy(base)
    ema.copy_to(reference.parameters())
    expected = reference(x, t, context).sample
    controlnet.accelerate(base)
    exact(base(x, t, context).sample, plain)
    ema.store(base.parameters())
    ema.copy_to(base.parameters())
    exact(base(x, t, context).sample, expected)
    ema.restore(base.parameters())
    exact(base(x, t, context).sample, plain)


@torch.no_grad()
def test_forget_after_writes_that_are_not_counted(both):
    base, control = map(controlnet.accelerate, both)
    wide_step(base, control)
    for parameter in (*base.parameters(), *control.parameters()):
        parameter.data.mul_(0.8)
    forget()
    actual = wide_step(base, control)
    exact(actual, wide_step(*map(controlnet.restore, both)))


@torch.no_grad()
def test_threads_share_a_model(both, monkeypatch):
    """Switched just where a result is being kept."""
    base, _ = both
    x, t, *_ = inputs(torch.float64)
    contexts = [torch.randn(2, 7, CONTEXT).double() for _ in range(2)]
    expected = [base(x, t, context).sample for context in contexts]
    real = memo.StorageWeakRef
    monkeypatch.setattr(memo, "StorageWeakRef", lambda storage: time.sleep(1e-3) or real(storage))
    controlnet.accelerate(base)
    results = [[], []]

    @torch.no_grad()
    def work(i):
        for _ in range(4):
            results[i].append(base(x, t, contexts[i]).sample)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for outputs, wanted in zip(results, expected, strict=True):
        assert len(outputs) == 4
        for output in outputs:
            exact(output, wanted)


# --- pipelines


@pytest.mark.parametrize(
    "options",
    [
        {"controlnet_conditioning_scale": [0.0, 1.0]},
        {"controlnet_conditioning_scale": [1.0, 0.0]},
        {"control_guidance_end": [0.5, 1.0]},
        {"control_guidance_end": 0.5},
        {"controlnet_conditioning_scale": [0.0, 1.0], "guess_mode": True},
    ],
    ids=str,
)
def test_one_of_two_controlnets_is_off(options):
    arguments = prompt(image=[image(seed=1), image(seed=2)], num_inference_steps=3) | options
    expected = draw(pipeline(controls=2), **arguments)
    assert (draw(controlnet.accelerate(pipeline(controls=2)), **arguments) - expected).abs().max() < 1e-4


def test_from_pipe():
    arguments = prompt(image=image(seed=9), control_image=image(), strength=0.6, num_inference_steps=3)
    ways = (diffusers.StableDiffusionControlNetImg2ImgPipeline, diffusers.AutoPipelineForImage2Image)
    for way in ways:
        pictures = []
        for pipe in (pipeline(), controlnet.accelerate(pipeline())):
            other = way.from_pipe(pipe, requires_safety_checker=False)
            other.set_progress_bar_config(disable=True)
            pictures.append(draw(other, **arguments))
        assert (pictures[0] - pictures[1]).abs().max() < 1e-4


# --- sizes and types


@pytest.mark.parametrize(
    "sizes", [(4, 4, 1), (4, 4, 2), (4, 1, 4), (1, 1, 2), (2, 1, 1), (1, 2, 2), (4, 2, 4)], ids=str
)
@torch.no_grad()
def test_batches_are_broadcast_as_diffusers_does(sizes, both):
    """Of latents, prompt and hint: the same result, or an error from both."""

    def attempt():
        try:
            down, middle = control(x, 5, context, hint, return_dict=False)
        except RuntimeError as error:
            return error
        return [*down, middle]

    _, control = both
    x = torch.randn(sizes[0], 4, 8, 8).double()
    context, hint = torch.randn(sizes[1], 7, CONTEXT).double(), torch.rand(sizes[2], 3, 64, 64).double()
    expected = attempt()
    controlnet.accelerate(control)
    for _ in range(2):
        actual = attempt()
        if isinstance(expected, RuntimeError):
            assert isinstance(actual, RuntimeError)
        else:
            for ours, theirs in zip(actual, expected, strict=True):
                exact(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
@torch.no_grad()
def test_a_hint_of_integers_is_refused(dtype, both):
    _, control = both
    x, t, context, hint = inputs(torch.float64)
    controlnet.accelerate(control)
    with pytest.raises(RuntimeError, match="Input type .* and bias type .* should be the same"):
        control(x, t, context, (255 * hint).to(dtype))


@torch.no_grad()
def test_two_equal_halves_of_a_hint_are_encoded_once(both):
    _, control = both
    x, t, context, hint = inputs(torch.float64)
    four = [torch.cat([tensor, -tensor]) for tensor in (x, context)]
    hints = [torch.cat([hint, hint]), torch.cat([hint, 1 - hint]), hint[:1].repeat(4, 1, 1, 1)]
    expected = [control(four[0], 5, four[1], h, return_dict=False)[0] for h in hints]
    controlnet.accelerate(control)
    for h, wanted in zip(hints, expected, strict=True):
        for ours, theirs in zip(control(four[0], 5, four[1], h, return_dict=False)[0], wanted, strict=True):
            exact(ours, theirs)


# --- other kinds of derivatives, and tracers


def tangent(base, x, t, context):
    return torch.func.jvp(lambda x: base(x, t, context).sample, (x,), (torch.ones_like(x),))[1]


def forward_mode(base, x, t, context):
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        return torch.autograd.forward_ad.unpack_dual(base(dual, t, context).sample).tangent


def func_grad(base, x, t, context):
    return torch.func.grad(lambda x: base(x, t, context).sample.square().mean())(x)


def vmapped(base, x, t, context):
    return torch.func.vmap(lambda x, context: base(x[None], 5, context[None]).sample)(x, context)


def functional(base, x, t, context):
    other = {name: 0.9 * p.detach() for name, p in base.named_parameters()}
    return torch.func.functional_call(base, other, (x, t, context)).sample


@pytest.mark.parametrize("transform", [tangent, forward_mode, func_grad, vmapped, functional])
def test_transforms(transform, both):
    base, _ = both
    # PyTorch's fused attention has no forward derivative
    base.set_attn_processor(attention_processor.AttnProcessor())
    x, t, context, _ = inputs(torch.float64)
    expected = transform(base, x, t, context)
    # nor has its group norm of channels_last one that runs, under diffusers alone, too
    controlnet.accelerate(base, channels_last=transform not in (tangent, forward_mode))
    with torch.no_grad():
        base(x, t, context)
    exact(transform(base, x, t, context), expected)


@pytest.mark.parametrize("frozen", [False, True])
def test_gradient_penalty(frozen, both):
    """The gradients of a gradient's norm: of the inputs, and of the weights of both models."""

    def gradients(base, control):
        x, t, context, hint = inputs(torch.float64)
        for tensor in (x, context):
            tensor.requires_grad_()
        down, middle = control(x, t, context, hint, return_dict=False)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        loss = base(x, t, context, **residuals).sample.square().mean()
        first = torch.autograd.grad(loss, (x, context), create_graph=True)
        parameters = [p for net in (base, control) for p in net.parameters() if p.requires_grad]
        return torch.autograd.grad(sum(g.square().sum() for g in first), (x, context, *parameters))

    for net in both:
        # PyTorch's fused attention has no second derivative
        net.set_attn_processor(attention_processor.AttnProcessor())
    both[0].requires_grad_(not frozen)
    expected = gradients(*both)
    largest = max(g.abs().max() for g in expected)
    for net in both:
        controlnet.accelerate(net)
    with fused() as counts:
        actual = gradients(*both)
    assert counts["attention"] > 40
    for ours, theirs in zip(actual, expected, strict=True):
        # of a bias before a group norm little but rounding is left, which scales with the other gradients
        allowed = 1e-9 * theirs.abs().max() + 1e-13 * largest
        torch.testing.assert_close(ours, theirs, rtol=0, atol=allowed.item())


@torch.no_grad()
def test_traced(both):
    class Step(torch.nn.Module):
        def __init__(self, base, control):
            super().__init__()
            self.base, self.control = base, control

        def forward(self, x, t, context, hint):
            down, middle = self.control(x, t, context, hint, return_dict=False)
            residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
            return self.base(x, t, context, return_dict=False, **residuals)[0]

    x, t, context, hint = inputs(torch.float64)
    model = Step(*both)
    expected = model(x, t, -context, 1 - hint)
    for part in both:
        controlnet.accelerate(part)
    model(x, t, context, hint)
    traced = torch.jit.trace(model, (x, t, context, hint), check_trace=False)
    exact(traced(x, t, -context, 1 - hint), expected)


# --- wraps that come and go


@torch.no_grad()
def test_wraps_that_are_undone_leave_the_fast_path(both):
    """As DeepCache wraps the forwards of a model and of its blocks, and HyperTile those of attentions."""
    base, _ = map(controlnet.accelerate, both)
    x, t, context, _ = inputs(torch.float64)
    expected = base(x, t, context).sample
    wrapped = [
        base,
        *(m for m in base.modules() if isinstance(m, (resnet.ResnetBlock2D, attention_processor.Attention))),
    ]
    stock = [module.forward for module in wrapped]
    for module, forward in zip(wrapped, stock, strict=True):
        module.forward = lambda *args, forward=forward, **kwargs: forward(*args, **kwargs)
    exact(base(x, t, context).sample, expected)
    for module, forward in zip(wrapped, stock, strict=True):
        assert isinstance(forward, types.MethodType)
        module.forward = forward  # as they undo it: a bound method stays behind
    exact(base(x, t, context).sample, expected)
    for module in wrapped:
        del module.forward
    with fused() as counts:
        exact(base(x, t, context).sample, expected)
    assert counts["attention"] == 32 and counts["geglu"] == 16
