"""Steps as CUDA graphs, with a recorder in place of CUDA's that replays the operations into the same memory."""

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
    replaying = False

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
        Recording.replaying = True
        for function, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
        Recording.replaying = False


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


def two_loras(base):
    from peft import LoraConfig

    torch.manual_seed(0)
    for name in ("one", "two"):
        config = LoraConfig(r=2, target_modules=["to_k", "to_q", "proj_in"], init_lora_weights=False)
        base.add_adapter(config, adapter_name=name)
    base.set_adapters(["one", "two"], [1.0, 0.3])
    base.double()


@torch.no_grad()
def test_lora_scales_are_copied(both, recorder):
    """The factor of a call and the adapters' weights, of all layers or of some, take no new capture."""
    base = both[0]
    two_loras(base)
    reference = copy.deepcopy(base)
    graphed(both, recorder)
    x, t, context, _ = inputs(torch.float64)
    plain = reference(x, t, context).sample
    for scale, weights in [
        (None, [1.0, 0.3]),
        (0.5, [1.0, 0.3]),
        (1.0, [0.2, 2.0]),
        (None, [0.0, 1.0]),
        (-0.4, [1.0, {"mid": 0.1}]),
        (0.0, [1.0, 1.0]),
        (0.7, [1.0, 0.3]),
    ]:
        options = {} if scale is None else {"cross_attention_kwargs": {"scale": scale}}
        for model in (base, reference):
            model.set_adapters(["one", "two"], weights)
        expected = reference(x, t, context, **options).sample
        exact(base(x, t, context, **options).sample, expected)
        assert (weights == [1.0, 0.3] and scale is None) == torch.equal(expected, plain)
    assert (recorder.captured, recorder.replayed) == (1, 7)
    scales = [m.scaling for m in base.modules() if hasattr(m, "scaling")]
    assert scales and all(type(value) is float for table in scales for value in table.values())


@torch.no_grad()
def test_other_adapters_take_another_graph(both, recorder):
    base = both[0]
    two_loras(base)
    reference = copy.deepcopy(base)
    graphed(both, recorder)
    x, t, context, _ = inputs(torch.float64)
    changes = [
        lambda model: model.set_adapters(["one"]),
        lambda model: model.fuse_lora(),  # writes through `.data`
        lambda model: model.unfuse_lora(),
        lambda model: model.disable_lora(),
        lambda model: model.enable_lora(),
        lambda model: model.delete_adapters("two"),
    ]
    base(x, t, context)
    for change in changes:
        change(base)
        change(reference)
        exact(base(x, t, context).sample, reference(x, t, context).sample, 1e-10)
    assert recorder.captured <= 1 + len(changes)


class Copies:
    """Counts what a step copies between its replays, as launches on the host."""

    def __init__(self, monkeypatch):
        self.count = 0
        for name in ("copy_", "fill_", "clone"):
            monkeypatch.setattr(torch.Tensor, name, self._counted(getattr(torch.Tensor, name)), raising=False)

    def _counted(self, function):
        def counted(*args, **kwargs):
            if not Recording.replaying:
                self.count += 1
            return function(*args, **kwargs)

        return counted


@torch.no_grad()
def test_copies_of_a_step(both, recorder, monkeypatch):
    """Latents and timestep of both models, what each returns, and nothing else: the U-Net reads the residuals in place.

    Two replays.
    """
    base, control = graphed(both, recorder)
    assert len(control.controlnet_down_blocks) + 1 == 13
    x, _, context, hint = inputs(torch.float64)
    step((base, control), x, 7, context, hint, 0.5)
    copies, before = Copies(monkeypatch), recorder.replayed
    step((base, control), -x, 8, context, hint, 0.5)
    assert (copies.count, recorder.replayed - before) == (2 + 13 + 2 + 1, 2)
    step((base, control), -x, 9, context, hint, 0.6)
    assert copies.count == 2 * 18 + 1


def residuals_of(result):
    return {"down_block_additional_residuals": result[0], "mid_block_additional_residual": result[1]}


@torch.no_grad()
def test_residuals_are_read_in_place_only_while_they_are_there(both, recorder):
    """The U-Net's graph follows the residuals that it is given, however they came about."""
    reference = copy.deepcopy(both)
    base, control = graphed(both, recorder)
    x, t, context, hint = inputs(torch.float64)

    def check(result, **options):
        given = [*result[0], result[1]]
        kept = [r.clone() for r in given]
        expected = reference[0](x, t, context, **residuals_of(result)).sample
        exact(base(x, t, context, **residuals_of(result), **options).sample, expected)
        assert all(map(torch.equal, given, kept)), "the residuals are the caller's own"

    first = control(x, t, context, hint, return_dict=False)
    check(first)
    second = control(x, t, context, 1 - hint, return_dict=False)
    check(first)  # those of an earlier call
    check(second)
    check(second)
    second[1].mul_(2)  # written to by the caller, as a second ControlNet's are added
    check(second)
    base(x, t, context)  # another graph of the U-Net, in the memory of which the outputs may have been
    check(second)
    third = control(x, t, context, hint, return_dict=False)
    check(([-r for r in third[0]], third[1]))
    off = control(x, t, context, hint, conditioning_scale=0.0, return_dict=False)
    check(off)
    check(third)
    assert recorder.captured == 2 + 1 + 1
    weights_moved(*both)
    weights_moved(*reference)
    check(control(x, t, context, hint, return_dict=False))


@torch.no_grad()
def test_the_memory_of_graphs_is_shared(both):
    """A replay of one may overwrite the outputs of another, unless it reads them."""

    class Overwriting(Recorder):
        def __init__(self):
            super().__init__()
            self.outputs = {}

        def capture(self, function):
            replay, outputs = super().capture(function)
            self.outputs[replay] = [t for t in tree_leaves(outputs) if isinstance(t, torch.Tensor)]
            reads = {id(t) for t in self.given}

            def overwriting():
                for other, tensors in self.outputs.items():
                    if other is not replay:
                        for tensor in tensors:
                            if id(tensor) not in reads:
                                tensor.fill_(float("nan"))
                replay()

            return overwriting, outputs

    reference = copy.deepcopy(both)
    recorder = Overwriting()
    recorder.given = ()
    base, control = graphed(both, recorder)
    x, t, context, hint = inputs(torch.float64)
    result = control(x, t, context, hint, return_dict=False)
    recorder.given = recorder.outputs[next(iter(recorder.outputs))]
    expected = reference[0](x, t, context, **residuals_of(result)).sample
    exact(base(x, t, context, **residuals_of(result)).sample, expected)
    recorder.given = ()
    base(x, t, context)  # overwrites the residuals
    exact(base(x, t, context, **residuals_of(result)).sample, expected)


@torch.no_grad()
def test_inference_mode_and_none_take_turns(both, recorder):
    reference = copy.deepcopy(both)
    graphed(both, recorder)
    arguments = inputs(torch.float64)
    for mode in (True, False, True):
        with torch.inference_mode(mode):
            exact(step(both, *arguments).clone(), step(reference, *arguments).clone())
    assert recorder.captured == 2


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
