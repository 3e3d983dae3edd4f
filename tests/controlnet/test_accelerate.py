"""Models of diffusers, accelerated and as drop-in classes: the same numbers, the same objects, and the way back."""

import copy
import io
import pickle
import warnings

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor

import controlnet
from controlnet.diffusers import ControlNetModel, UNet2DConditionModel
from tests.controlnet.diffusers_models import CONTEXT, VARIANTS, pipeline, randomized, unet, vae
from tests.controlnet.diffusers_models import controlnet as control_model

X = (2, 4, 9, 6)
HINT = (2, 3, 72, 48)


def inputs(dtype=torch.float32, rounded=None):
    rounded = rounded or dtype
    generator = torch.Generator().manual_seed(3)
    x, context = (torch.randn(shape, generator=generator) for shape in (X, (2, 7, CONTEXT)))
    hint = torch.rand(HINT, generator=generator)
    x, context, hint = (tensor.to(rounded).to(dtype) for tensor in (x, context, hint))
    return x, torch.tensor([981, 40]), context, hint


def step(base, control, dtype=torch.float32, rounded=None, **options):
    """The prediction of a denoising step."""
    x, t, context, hint = inputs(dtype, rounded)
    down, middle = control(x, t, context, hint, return_dict=False, **options)
    residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
    return base(x, t, context, **residuals).sample


@pytest.fixture
def both():
    base = unet()
    return base, control_model(base)


@pytest.fixture
def strict():
    """A warning, hence a call that takes diffusers' path, fails the test."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*fast path")
        yield


def close(actual, expected):
    """But for float32's rounding through a hundred layers. `test_step_of_each_architecture` has float64."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=5e-5 * expected.abs().max().item())


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_step_of_each_architecture(variant, strict):
    base = unet(variant).double()
    control = control_model(base).double()
    expected = step(base, control, torch.float64, conditioning_scale=0.7)
    controlnet.accelerate(base)
    controlnet.accelerate(control)
    actual = step(base, control, torch.float64, conditioning_scale=0.7)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12 * expected.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_is_no_worse_than_diffusers(both, dtype, strict):
    """By the rule of the kernels: at most twice diffusers' error, both against float64 with the rounded weights."""
    base, control = (model.to(dtype) for model in both)
    exact = step(copy.deepcopy(base).double(), copy.deepcopy(control).double(), torch.float64, rounded=dtype)
    theirs = step(base, control, dtype)
    ours = step(controlnet.accelerate(base), controlnet.accelerate(control), dtype)
    their_error, our_error = ((result.double() - exact).norm() for result in (theirs, ours))
    assert our_error <= 2 * their_error
    assert their_error < 0.1 * exact.norm()


def test_gradients_reach_the_same_parameters(both, strict):
    def gradients(base, control):
        parameters = [*base.parameters(), *control.parameters()]
        return torch.autograd.grad(step(base, control).square().mean(), parameters)

    base, control = both
    expected = gradients(base, control)
    largest = max(theirs.abs().max() for theirs in expected)
    for actual, theirs in zip(gradients(*map(controlnet.accelerate, both)), expected, strict=True):
        # of a bias before a group norm little but rounding is left, which scales with the other gradients
        allowed = 1e-4 * theirs.abs().max() + 1e-7 * largest
        torch.testing.assert_close(actual, theirs, rtol=0, atol=allowed.item())


@torch.no_grad()
def test_restore_leaves_nothing(both):
    for model in (*both, vae()):
        before = {name: (tensor.data_ptr(), tensor.stride()) for name, tensor in model.state_dict().items()}
        classes, attributes = [type(m) for m in model.modules()], [sorted(vars(m)) for m in model.modules()]
        controlnet.restore(controlnet.accelerate(controlnet.accelerate(model)))
        assert [type(m) for m in model.modules()] == classes
        assert [sorted(vars(m)) for m in model.modules()] == attributes
        assert {name: tensor.stride() for name, tensor in model.state_dict().items()} == {
            name: stride for name, (_, stride) in before.items()
        }


@torch.no_grad()
def test_weights_are_shared(both):
    base, control = both
    parameters = dict(base.named_parameters())
    controlnet.accelerate(base)
    assert all(parameter is parameters[name] for name, parameter in base.named_parameters())
    ours = {id(parameter) for parameter in base._binding.model.parameters()}
    assert ours == {id(parameter) for parameter in parameters.values()}
    assert not list(base._binding.model.buffers())[1:]  # but for the frequencies of the timesteps
    assert len(base.state_dict()) == len(parameters)


@torch.no_grad()
def test_it_is_still_diffusers_model(both, tmp_path):
    base, control = both
    expected = step(*both)
    controlnet.accelerate(base)
    controlnet.accelerate(control)
    assert isinstance(base, diffusers.UNet2DConditionModel) and isinstance(control, diffusers.ControlNetModel)
    assert (base.config.cross_attention_dim, base.dtype, base.device.type) == (CONTEXT, torch.float32, "cpu")
    base.save_pretrained(tmp_path / "unet")
    control.save_pretrained(tmp_path / "control")
    read = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    assert type(read) is diffusers.UNet2DConditionModel
    assert torch.equal(step(read, diffusers.ControlNetModel.from_pretrained(tmp_path / "control")), expected)
    for copied in (copy.deepcopy(base), pickle.loads(pickle.dumps(base)), _saved_whole(base)):
        assert type(copied) is UNet2DConditionModel
        close(step(copied, control), expected)
        copied.conv_in.weight.zero_()
    close(step(base, control), expected)


def _saved_whole(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@torch.no_grad()
def test_drop_in_classes(both, tmp_path, strict):
    base, control = both
    expected = step(*both)
    base.save_pretrained(tmp_path / "unet")
    control.save_pretrained(tmp_path / "control")
    ours = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    our_control = ControlNetModel.from_pretrained(tmp_path / "control")
    close(step(ours, our_control), expected)
    fresh = ControlNetModel.from_unet(ours)
    assert type(fresh) is ControlNetModel
    randomized(fresh, seed=1)
    close(step(ours, fresh), expected)
    assert type(controlnet.restore(ours)) is diffusers.UNet2DConditionModel
    assert torch.equal(step(ours, control), expected)


@torch.no_grad()
def test_drop_in_class_from_a_single_file(both, tmp_path, strict):
    """In the original's layout, as downloaded."""
    base, control = both
    base.save_pretrained(tmp_path / "unet")
    control.save_pretrained(tmp_path / "control")
    controlnet.convert(tmp_path / "control", tmp_path / "control.safetensors", "original")
    ours = ControlNetModel.from_single_file(str(tmp_path / "control.safetensors"), config=str(tmp_path / "control"))
    assert type(ours) is ControlNetModel
    close(step(controlnet.accelerate(base), ours.eval()), step(*both))


# --- what the fast path does not serve, diffusers computes, and says so once


def a_lora(base, control):
    from peft import LoraConfig

    base.add_adapter(LoraConfig(r=2, target_modules=["to_k"], init_lora_weights=False))
    return {}, base.unload_lora


def a_processor(base, control):
    class Doubled(AttnProcessor):
        def __call__(self, *args, **kwargs):
            return 2 * super().__call__(*args, **kwargs)

    base.set_attn_processor(Doubled())
    return {}, lambda: base.set_attn_processor(AttnProcessor2_0())


def freeu(base, control):
    base.enable_freeu(0.9, 0.2, 1.5, 1.6)
    return {}, base.disable_freeu


def a_hook(base, control):
    handle = base.mid_block.resnets[0].register_forward_hook(lambda module, args, result: result * 2)
    return {}, handle.remove


def another_forward(base, control):
    layer = base.conv_out
    layer.forward = lambda x: 2 * type(layer).forward(layer, x)
    return {}, lambda: delattr(layer, "forward")


def a_mask(base, control):
    return {"encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0, 0, 0]] * 2)}, lambda: None


def an_adapter(base, control):
    shapes = [(32, X[2:]), (64, (5, 3)), (64, (3, 2)), (64, (2, 1))]
    return {"down_intrablock_additional_residuals": [torch.ones(2, c, *size) for c, size in shapes]}, lambda: None


FEATURES = {
    a_lora: "a LoRA",
    a_processor: "the attention processor Doubled",
    freeu: "FreeU",
    a_hook: "a hook on mid_block.resnets.0",
    another_forward: "another forward of conv_out",
    a_mask: "the argument encoder_attention_mask",
    an_adapter: "the argument down_intrablock_additional_residuals",
}


@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.__name__)
@torch.no_grad()
def test_unserved_feature(feature, both):
    def call(base, arguments):
        x, t, context, _ = inputs()
        copied = {name: list(v) if isinstance(v, list) else v for name, v in arguments.items()}
        return base(x, t, context, **copied).sample

    base, control = both
    reference = copy.deepcopy(base).to(memory_format=torch.channels_last)
    plain = call(reference, {})
    torch.manual_seed(0)
    expected = call(reference, feature(reference, control)[0])
    assert (expected - plain).abs().max() > 1e-3, "the feature is without effect"
    controlnet.accelerate(base)
    torch.manual_seed(0)
    arguments, end = feature(base, control)
    with pytest.warns(UserWarning, match=FEATURES[feature]) as warned:
        for _ in range(3):
            assert torch.equal(call(base, arguments), expected)
    assert len([w for w in warned if "fast path" in str(w.message)]) == 1
    end()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*fast path")
        ran = []
        base.bind()
        model = base._binding.model
        forward = model.forward
        model.forward = lambda *args, **kwargs: ran.append(1) or forward(*args, **kwargs)
        close(call(base, {}), plain)
    assert ran == [1], "the fast path did not come back"


@torch.no_grad()
def test_class_embeddings():
    base = unet(class_embed_type="identity", projection_class_embeddings_input_dim=None)
    x, t, context, _ = inputs()
    labels = torch.randn(2, 128)
    expected = base(x, t, context, class_labels=labels).sample
    with pytest.warns(UserWarning, match="class"):
        controlnet.accelerate(base)
        close(base(x, t, context, class_labels=labels).sample, expected)


@torch.no_grad()
def test_ip_adapter(both):
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
    from diffusers.models.embeddings import ImageProjection

    base, _ = both

    def add(model):
        torch.manual_seed(0)
        processors = {}
        for name in model.attn_processors:
            width = model.get_submodule(name.rpartition(".")[0]).to_q.in_features
            own = IPAdapterAttnProcessor2_0(hidden_size=width, cross_attention_dim=CONTEXT, num_tokens=(4,))
            processors[name] = own if "attn2" in name else AttnProcessor2_0()
        model.set_attn_processor(processors)
        model.encoder_hid_proj = diffusers.models.embeddings.MultiIPAdapterImageProjection(
            [ImageProjection(cross_attention_dim=CONTEXT, image_embed_dim=16, num_image_text_embeds=4)]
        )
        model.config["encoder_hid_dim_type"] = "ip_image_proj"
        model.register_to_config(encoder_hid_dim_type="ip_image_proj")

    reference = copy.deepcopy(base)
    add(reference)
    x, t, context, _ = inputs()
    images = {"image_embeds": [torch.randn(2, 1, 16)]}
    expected = reference(x, t, context, added_cond_kwargs=images).sample
    controlnet.accelerate(base)
    add(base)
    with pytest.warns(UserWarning, match="an IP-Adapter"):
        close(base(x, t, context, added_cond_kwargs=images).sample, expected)


@pytest.mark.parametrize("processor", [AttnProcessor(), AttnProcessor2_0(), SlicedAttnProcessor(1)], ids=type)
@torch.no_grad()
def test_processors_that_compute_the_same(processor, both, strict):
    base, control = both
    expected = step(*both)
    base.set_attn_processor(processor)
    close(step(controlnet.accelerate(base), control), expected)


# --- what goes on working around it


@torch.no_grad()
def test_hooks_on_the_model_itself(both, strict):
    base, control = map(controlnet.accelerate, both)
    expected = step(base, control)
    seen = []
    base.register_forward_pre_hook(lambda module, args: seen.append("before"))
    base.register_forward_hook(lambda module, args, result: seen.append("after"))
    assert torch.equal(step(base, control), expected)
    assert seen == ["before", "after"]


@pytest.mark.parametrize("accelerate_first", [True, False])
@torch.no_grad()
def test_cpu_offload(both, accelerate_first, strict):
    """accelerate's hooks take the place of forward; the fast one has to be inside, and diffusers' after `restore`."""
    from accelerate import cpu_offload_with_hook
    from accelerate.hooks import remove_hook_from_module

    base, control = both
    expected = step(*both)
    if accelerate_first:
        controlnet.accelerate(base)
    cpu_offload_with_hook(base, execution_device="cpu")
    if not accelerate_first:
        controlnet.accelerate(base)
    ran = []
    forward = base._binding.model.forward
    base._binding.model.forward = lambda *args, **kwargs: ran.append(1) or forward(*args, **kwargs)
    close(step(base, control), expected)
    assert ran == [1]
    controlnet.restore(base)
    assert torch.equal(step(base, control), expected)
    remove_hook_from_module(base)
    assert torch.equal(step(base, control), expected)


@torch.no_grad()
def test_moves_and_casts_are_followed(both, strict):
    base, control = map(controlnet.accelerate, both)
    expected = step(base, control)
    for model in (base, control):
        model.double()
    wide = step(base, control, torch.float64)
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide.float(), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    for model in (base, control):
        model.float()
    close(step(base, control), expected)


@torch.no_grad()
def test_compiled_whole(both, strict):
    base, control = map(controlnet.accelerate, both)
    expected = step(base, control)
    compiled = [torch.compile(model, backend="aot_eager", fullgraph=True) for model in (base, control)]
    close(step(*compiled), expected)
    assert controlnet.accelerate(compiled[0]) is compiled[0]


@pytest.mark.parametrize("feature", [a_lora, a_processor, freeu], ids=lambda feature: feature.__name__)
@torch.no_grad()
def test_a_feature_on_a_compiled_model(feature, both):
    """Compiled code does not look for changes, diffusers' methods tell of them."""
    base, control = both
    x, t, context, _ = inputs()
    torch.manual_seed(0)
    reference = copy.deepcopy(base)
    feature(reference, control)
    expected = reference(x, t, context).sample
    plain = base(x, t, context).sample
    compiled = torch.compile(controlnet.accelerate(base), backend="aot_eager", fullgraph=True)
    close(compiled(x, t, context).sample, plain)
    torch.manual_seed(0)
    _, end = feature(base, control)
    torch.testing.assert_close(compiled(x, t, context).sample, expected, rtol=0, atol=1e-4)
    assert (expected - plain).abs().max() > 1e-3
    end()
    close(compiled(x, t, context).sample, plain)


@torch.no_grad()
def test_autocast(both, strict):
    base, control = both
    with torch.autocast("cpu", torch.bfloat16):
        theirs = step(*both)
        ours = step(*map(controlnet.accelerate, both))
    exact = step(*both)
    assert (ours - exact).norm() <= 2 * (theirs - exact).norm()


@torch.no_grad()
def test_inference_mode(both, strict):
    base, control = both
    expected = step(*both)
    controlnet.accelerate(base)
    controlnet.accelerate(control)
    with torch.inference_mode():
        close(step(base, control).clone(), expected)
    close(step(base, control), expected)


@torch.no_grad()
def test_scales_beyond_diffusers(both, strict):
    base, control = both
    x, t, context, hint = inputs()
    one = control(x, t, context, hint, return_dict=False)
    controlnet.accelerate(control)
    down, middle = control(x, t, context, hint, conditioning_scale=torch.tensor([0.5, 2.0]), return_dict=False)
    weights = torch.tensor([0.5, 2.0])[:, None, None, None]
    for actual, expected in zip([*down, middle], [*one[0], one[1]], strict=True):
        close(actual, weights * expected)
    mask = torch.zeros(2, 1, 72, 48)
    mask[..., :24] = 1
    down, _ = control(x, t, context, hint, conditioning_scale=mask, return_dict=False)
    close(down[0], one[0][0] * mask[..., ::8, ::8])


@torch.no_grad()
def test_scale_zero_has_the_shapes_of_any_other(both, strict):
    base, control = both
    x, t, context, hint = inputs()
    expected = control(x, t, context, hint, conditioning_scale=0.0)
    actual = controlnet.accelerate(control)(x, t, context, hint, conditioning_scale=0.0)
    for ours, theirs in zip(actual.down_block_res_samples, expected.down_block_res_samples, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(actual.mid_block_res_sample, expected.mid_block_res_sample)


@pytest.mark.parametrize("size", [(64, 64), (72, 40)])
@torch.no_grad()
def test_vae(size):
    model = vae()
    images = torch.rand(2, 3, *size) * 2 - 1
    latents = torch.randn(2, 4, size[0] // 8, size[1] // 8)
    moments, decoded = model.encode(images).latent_dist.parameters, model.decode(latents).sample
    controlnet.accelerate(model)
    close(model.encode(images).latent_dist.parameters, moments)
    close(model.decode(latents).sample, decoded)
    model.enable_slicing()
    close(model.decode(latents).sample, decoded)
    assert model.decoder._plain, "the decoder took diffusers' path"


# --- bad input


@pytest.mark.parametrize("target", [torch.nn.Linear(2, 2), diffusers.DDIMScheduler(), "unet", None])
def test_unsupported_target(target):
    with pytest.raises(TypeError, match="expected one of StableDiffusionPipeline, .*AutoencoderKL"):
        controlnet.accelerate(target)


def test_unsupported_pipeline():
    parts = dict.fromkeys(("text_encoder_2", "tokenizer_2"), None)
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=vae(), unet=unet(), scheduler=diffusers.DDIMScheduler(), text_encoder=None, tokenizer=None, **parts
    )
    with pytest.raises(TypeError, match="StableDiffusionXLPipeline"):
        controlnet.accelerate(pipe)
    assert type(pipe.unet) is diffusers.UNet2DConditionModel


@pytest.mark.parametrize("release", ["0.39.1", "0.43.0", "1.0.0"])
def test_release_that_was_not_tested(release, monkeypatch):
    from importlib import metadata

    monkeypatch.setattr(metadata, "version", lambda name: release)
    with pytest.raises(ImportError, match=f"diffusers {release} is installed; .* tested with 0.40 to 0.42"):
        controlnet.accelerate(unet())


@torch.no_grad()
def test_architecture_that_is_not_served():
    base = unet(only_cross_attention=True, norm_num_groups=16)
    x, t, context, _ = inputs()
    expected = base(x, t, context).sample
    with pytest.warns(UserWarning, match="norm_num_groups is 16"):
        controlnet.accelerate(base)
        close(base(x, t, context).sample, expected)


def test_a_pipeline_is_accelerated_once():
    pipe = pipeline()
    assert controlnet.accelerate(pipe) is pipe
    binding = pipe.unet._binding
    controlnet.accelerate(pipe)
    assert pipe.unet._binding is binding and len(pipe.unet._pipelines) == 1
