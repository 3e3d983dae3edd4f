"""Steps as graphs, with a recorder in place of CUDA's: it runs the recorded operations again into the same memory."""

import copy
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import controlnet
from controlnet.diffusers import blocks
from controlnet.inference.graph import StepGraph
from controlnet.inference.sampling import ddim
from controlnet.model.diffusion import NoiseSchedule
from tests.controlnet.diffusers_models import controlnet as control_model
from tests.controlnet.diffusers_models import draw, image, pipeline, prompt, unet
from tests.controlnet.test_accelerate import exact, inputs
from tests.controlnet.test_compile import images
from tests.controlnet.test_compile import model as controlled


class Recording(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default), (
            "a synchronisation, which no capture allows"
        )
        out = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, out))
        return out

    def replay(self):
        for function, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Recorder:
    def __init__(self):
        self.captured, self.replayed = 0, 0

    def serves(self, device):
        return True

    def capture(self, function):
        self.captured += 1
        with Recording() as recording:
            outputs = function()

        def replay():
            self.replayed += 1
            recording.replay()

        return replay, outputs


@pytest.fixture
def recorder():
    return Recorder()


@pytest.fixture
def both():
    base = unet().double()
    return base, control_model(base).double()


def graphed(both, recorder):
    for model in both:
        controlnet.accelerate(model, graph=True, recorder=recorder)
    return both


def step(both, x, t, context, hint, scale=1.0, **options):
    base, control = both
    down, middle = control(x, t, context, hint, conditioning_scale=scale, return_dict=False, **options)
    return base(x, t, context, down_block_additional_residuals=down, mid_block_additional_residual=middle).sample


@torch.no_grad()
def test_everything_that_changes_from_step_to_step(both, recorder):
    """One capture for each model, whatever the values."""
    reference = copy.deepcopy(both)
    graphed(both, recorder)
    x, _, context, hint = inputs(torch.float64)
    arguments = [x, 981, context, hint, 1.0]
    for place, value in [(0, -x), (1, 3), (1, 0), (4, 0.35), (2, context.flip(1)), (3, 1 - hint), (2, context), (0, x)]:
        arguments[place] = value
        exact(step(both, *arguments), step(reference, *arguments))
    for tensor in (arguments[0], arguments[2], arguments[3]):
        tensor.mul_(-0.5)  # in place
        exact(step(both, *arguments), step(reference, *arguments))
    assert (recorder.captured, recorder.replayed) == (2, 22)


@torch.no_grad()
def test_prompt_and_hint_are_computed_once(both, recorder, monkeypatch):
    """Outside of the graph, when they change."""
    encoded = []
    encode = blocks.ControlNetConditioningEmbedding._encode
    monkeypatch.setattr(
        blocks.ControlNetConditioningEmbedding, "_encode", lambda *args: encoded.append(1) or encode(*args)
    )
    graphed(both, recorder)
    x, t, context, hint = inputs(torch.float64)
    for i in range(3):
        step(both, x + i, t, context, hint)
    assert encoded == [1]
    step(both, x, t, context, 1 - hint)
    assert encoded == [1, 1]


@torch.no_grad()
def test_kinds_have_graphs_of_their_own(both, recorder):
    reference = copy.deepcopy(both)
    graphed(both, recorder)
    x, t, context, hint = inputs(torch.float64)
    calls = [
        ((x, t, context, hint), {}),
        ((x, t, context, hint), {"guess_mode": True}),
        ((x, t, context, hint, 0.0), {}),
        ((x, t, context, hint, torch.tensor([0.5, 2.0])[:, None, None, None]), {}),
        ((x[:1], t[:1], context[:1], hint[:1]), {}),
        ((x[..., :4], t, context, hint[..., :32]), {}),
    ]
    for _ in range(2):
        for arguments, options in calls:
            tolerance = 1e-6 if options else 1e-12  # diffusers' scales of the guess mode are float32
            exact(step(both, *arguments, **options), step(reference, *arguments, **options), tolerance)
    # the U-Net's kinds are the sizes
    assert recorder.captured == len(calls) + 3


def weights_in_place(base, control):
    for parameter in (*base.parameters(), *control.parameters()):
        parameter.mul_(0.9)


def weights_moved(base, control):
    for parameter in (*base.parameters(), *control.parameters()):
        parameter.data = parameter.data * 0.9


def another_layer(base, control):
    torch.manual_seed(0)
    base.mid_block.resnets[0].conv1 = torch.nn.Conv2d(64, 64, 3, padding=1).double()


def an_attribute(base, control):
    base.mid_block.resnets[0].norm1.eps = 0.5


def a_hook(base, control):
    control.mid_block.resnets[0].register_forward_hook(lambda module, args, y: 2 * y)


def a_lora(base, control):
    from peft import LoraConfig

    torch.manual_seed(0)
    base.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_q"], init_lora_weights=False))
    base.double()


def other_processors(base, control):
    from diffusers.models.attention_processor import AttnProcessor

    class Doubled(AttnProcessor):
        def __call__(self, *args, **kwargs):
            return 2 * super().__call__(*args, **kwargs)

    base.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(Doubled())


@pytest.mark.filterwarnings("ignore:.*fast path")
@pytest.mark.parametrize(
    "change",
    [weights_in_place, weights_moved, another_layer, an_attribute, a_hook, a_lora, other_processors],
    ids=lambda change: change.__name__,
)
@torch.no_grad()
def test_changes_of_the_models(change, both, recorder):
    reference = copy.deepcopy(both)
    graphed(both, recorder)
    arguments = inputs(torch.float64)
    plain = step(both, *arguments)
    change(*both)
    change(*reference)
    expected = step(reference, *arguments)
    assert (expected - plain).abs().max() > 1e-6
    for _ in range(2):
        exact(step(both, *arguments), expected)


@torch.no_grad()
def test_lora_scales(both, recorder):
    a_lora(*both)
    reference = copy.deepcopy(both[0])
    graphed(both, recorder)
    x, t, context, _ = inputs(torch.float64)
    for scale in (1.0, 0.5, 1.0, 0.5):
        options = {"cross_attention_kwargs": {"scale": scale}}
        exact(both[0](x, t, context, **options).sample, reference(x, t, context, **options).sample)
    before = recorder.captured
    both[0](x, t, context, cross_attention_kwargs={"scale": 0.5})
    assert recorder.captured == before


@torch.no_grad()
def test_results_are_the_callers_own(both, recorder):
    graphed(both, recorder)
    x, t, context, hint = inputs(torch.float64)
    first = step(both, x, t, context, hint)
    kept = first.clone()
    step(both, -x, t, context, hint)
    assert torch.equal(first, kept)


def test_pictures(recorder):
    pipe = pipeline(controls=2)
    arguments = prompt(image=[image(seed=1), image(seed=2)], num_inference_steps=4, control_guidance_end=[1.0, 0.5])
    expected = draw(pipe, **arguments)
    controlnet.accelerate(pipe, graph=True, recorder=recorder)
    for _ in range(2):
        assert (draw(pipe, **arguments) - expected).abs().max() < 1e-4
    assert recorder.captured == 4  # U-Net, ControlNets, and the second one's zeros
    controlnet.restore(pipe)
    assert torch.equal(draw(pipe, **arguments), expected)


@pytest.mark.parametrize("guess_mode", [False, True])
def test_our_own_sampler(guess_mode, recorder):
    net = controlled().double()
    latents, hint, context, _ = (t.double() for t in images(1, 8, 8))
    options = {"uncond_context": -context, "hint": hint, "steps": 4, "x_T": latents, "guess_mode": guess_mode}
    expected = ddim(net, NoiseSchedule(), latents.shape, context, **options)
    actual = ddim(net, NoiseSchedule(), latents.shape, context, graph=recorder, **options)
    exact(actual, expected)
    assert (recorder.captured, recorder.replayed) == (1, 4)


def test_gradients_take_no_graph(both, recorder):
    graphed(both, recorder)
    step(both, *inputs(torch.float64)).square().mean().backward()
    assert recorder.captured == 0 and both[0].conv_in.weight.grad is not None


@torch.no_grad()
def test_without_a_gpu_calls_are_eager_and_it_is_said_once(both):
    for model in both:
        controlnet.accelerate(model, graph=True)
    with pytest.warns(UserWarning, match="on cpu there are no CUDA graphs"):
        step(both, *inputs(torch.float64))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        step(both, *inputs(torch.float64))


@torch.no_grad()
def test_restore_frees_everything(both, recorder):
    graphed(both, recorder)
    step(both, *inputs(torch.float64))
    graph = both[0].__dict__["forward"].graph
    assert graph._graphs
    copied = copy.deepcopy(both[0])
    for model in both:
        controlnet.restore(model)
    assert not graph._graphs
    assert "forward" not in vars(both[0])
    assert type(controlnet.restore(copied)) is type(both[0])


@torch.no_grad()
def test_any_function_of_a_model(recorder):
    model = torch.nn.Linear(3, 2)
    graph = StepGraph(lambda x, t: model(x) * t, model, numbers=("t",), recorder=recorder)
    for t in (2, 3, 0):
        x = torch.randn(4, 3)
        torch.testing.assert_close(graph(x=x, t=t), model(x) * t)
    assert recorder.captured == 1
    model.weight.mul_(2)
    torch.testing.assert_close(graph(x=x, t=1), model(x))
    model.weight.data = model.weight * 3
    torch.testing.assert_close(graph(x=x, t=1), model(x))
    assert recorder.captured == 2
    graph.reset()
    assert torch.equal(graph(x=x.double().float(), t=1), model(x))
    assert recorder.captured == 3
