"""`accelerate` on models of diffusers: same results, same objects, and `restore`."""

import copy
import io
import pickle
import warnings
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor

import controlnet
from controlnet.diffusers import blocks
from tests.controlnet.diffusers_models import CONTEXT, VARIANTS, added_conditions, fused, pipeline, unet, vae
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
    added = {}
    if base.config.addition_embed_type is not None:
        added = {"added_cond_kwargs": added_conditions(2, dtype)}
    down, middle = control(x, t, context, hint, return_dict=False, **options, **added)
    residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
    return base(x, t, context, **residuals, **added).sample


@pytest.fixture
def both():
    base = unet()
    return base, control_model(base)


@pytest.fixture
def strict():
    """A warning, hence a block that runs diffusers' own code, fails the test."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*fast path")
        yield


def close(actual, expected):
    """But for float32's rounding through a hundred layers. `test_step_of_each_architecture` has float64."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=5e-5 * expected.abs().max().item())


def exact(actual, expected, tolerance=1e-12):
    """In float64."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_step_of_each_architecture(variant, strict):
    base = unet(variant).double()
    control = control_model(base).double()
    expected = step(base, control, torch.float64, conditioning_scale=0.7)
    controlnet.accelerate(base)
    controlnet.accelerate(control)
    transformers = sum(isinstance(m, blocks.BasicTransformerBlock) for net in (base, control) for m in net.modules())
    for _ in range(2):  # the second time with what was kept of the first
        with fused() as counts:
            exact(step(base, control, torch.float64, conditioning_scale=0.7), expected)
        assert counts["attention"] == 2 * transformers and counts["geglu"] == transformers
        assert counts["zero_conv_add_group"] == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_is_no_worse_than_diffusers(both, dtype, strict):
    """By the rule of the kernels: at most twice diffusers' error, both against float64 with the rounded weights."""
    base, control = (model.to(dtype) for model in both)
    truth = step(copy.deepcopy(base).double(), copy.deepcopy(control).double(), torch.float64, rounded=dtype)
    theirs = step(base, control, dtype)
    ours = step(controlnet.accelerate(base), controlnet.accelerate(control), dtype)
    their_error, our_error = ((result.double() - truth).norm() for result in (theirs, ours))
    assert our_error <= 2 * their_error
    assert their_error < 0.1 * truth.norm()


@pytest.mark.parametrize("variant", ["sd15", "sd21", "sdxl"])
def test_gradients_reach_the_same_parameters(variant, strict):
    def gradients(base, control):
        parameters = [*base.parameters(), *control.parameters()]
        return torch.autograd.grad(step(base, control, torch.float64).square().mean(), parameters)

    base = unet(variant).double()
    both = base, control_model(base).double()
    expected = gradients(*both)
    largest = max(theirs.abs().max() for theirs in expected)
    for actual, theirs in zip(gradients(*map(controlnet.accelerate, both)), expected, strict=True):
        # of a bias before a group norm little but rounding is left, which scales with the other gradients
        allowed = 1e-11 * theirs.abs().max() + 1e-14 * largest
        torch.testing.assert_close(actual, theirs, rtol=0, atol=allowed.item())


@torch.no_grad()
def test_restore_leaves_nothing(both):
    for model in (*both, vae()):
        before = {name: (tensor.data_ptr(), tensor.stride()) for name, tensor in model.state_dict().items()}
        classes, attributes = [type(m) for m in model.modules()], [sorted(vars(m)) for m in model.modules()]
        hooks = [dict(getattr(model, name)) for name in vars(model) if name.endswith("_hooks")]
        controlnet.accelerate(controlnet.accelerate(model))
        assert [type(m) for m in model.modules()] != classes
        if model is both[0]:
            model(*inputs()[:3])
        controlnet.restore(controlnet.restore(model))
        assert [type(m) for m in model.modules()] == classes
        assert [sorted(vars(m)) for m in model.modules()] == attributes
        assert [dict(getattr(model, name)) for name in vars(model) if name.endswith("_hooks")] == hooks
        assert {name: tensor.stride() for name, tensor in model.state_dict().items()} == {
            name: stride for name, (_, stride) in before.items()
        }


@pytest.mark.parametrize("channels_last", [True, False])
@torch.no_grad()
def test_weights_are_the_same_parameters(channels_last, both):
    base, control = both
    parameters, pointers = dict(base.named_parameters()), {p.data_ptr() for p in base.parameters()}
    expected = step(*both)
    controlnet.accelerate(base, channels_last=channels_last)
    assert all(parameter is parameters[name] for name, parameter in base.named_parameters())
    assert len(base.state_dict()) == len(parameters)
    assert base.conv_in.weight.is_contiguous(memory_format=torch.channels_last) == channels_last
    if not channels_last:
        assert {p.data_ptr() for p in base.parameters()} == pointers
        assert torch.nn.utils.parameters_to_vector(base.parameters()).numel() == base.num_parameters()
    close(step(*both), expected)


@torch.no_grad()
def test_it_is_still_diffusers_model(both, tmp_path):
    base, control = both
    expected = step(*both)
    controlnet.accelerate(base)
    controlnet.accelerate(control)
    assert type(base) is diffusers.UNet2DConditionModel and type(control) is diffusers.ControlNetModel
    assert (base.config.cross_attention_dim, base.dtype, base.device.type) == (CONTEXT, torch.float32, "cpu")
    close(step(base, control), expected)
    base.save_pretrained(tmp_path / "unet")
    control.save_pretrained(tmp_path / "control")
    read = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    assert not any(isinstance(m, blocks.Block) for m in read.modules())
    assert torch.equal(step(read, diffusers.ControlNetModel.from_pretrained(tmp_path / "control")), expected)
    for copied in (copy.deepcopy(base), pickle.loads(pickle.dumps(base)), _saved_whole(base)):
        with fused() as counts:
            close(step(copied, control), expected)
        assert counts["attention"] > 20
        copied.mid_block.resnets[0].time_emb_proj.weight.zero_()
        copied.mid_block.resnets[0].conv1.weight.zero_()
    assert type(controlnet.restore(pickle.loads(pickle.dumps(control))).controlnet_mid_block) is torch.nn.Conv2d
    close(step(base, control), expected)
    copied = copy.deepcopy(control)
    copied.controlnet_mid_block.weight.zero_()
    close(step(base, control), expected)


def _saved_whole(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("processor", [AttnProcessor(), AttnProcessor2_0(), SlicedAttnProcessor(1)], ids=type)
@torch.no_grad()
def test_processors_that_compute_the_same(processor, both, strict):
    base, control = both
    expected = step(*both)
    base.set_attn_processor(processor)
    close(step(controlnet.accelerate(base), control), expected)
    base.set_default_attn_processor()
    close(step(base, control), expected)


# --- what goes on working around it


@torch.no_grad()
def test_hooks_on_the_model_itself(both, strict):
    base, control = map(controlnet.accelerate, both)
    expected = step(base, control)
    seen = []
    for model in both:
        model.register_forward_pre_hook(lambda module, args: seen.append("before"))
        model.register_forward_hook(lambda module, args, result: seen.append("after"))
    assert torch.equal(step(base, control), expected)
    assert seen == ["before", "after"] * 2


@pytest.mark.parametrize("accelerate_first", [True, False])
@torch.no_grad()
def test_cpu_offload(both, accelerate_first, strict):
    """accelerate's hooks take the place of forward, of the model or of each layer in it."""
    from accelerate import cpu_offload, cpu_offload_with_hook
    from accelerate.hooks import remove_hook_from_module

    for offload in (cpu_offload_with_hook, cpu_offload):
        base, control = unet(), control_model(unet())
        expected = step(base, control)
        if accelerate_first:
            controlnet.accelerate(base)
        offload(base, execution_device=torch.device("cpu"))
        if not accelerate_first:
            controlnet.accelerate(base)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*fast path")  # layer by layer, norms are not there to be read
            close(step(base, control), expected)
        controlnet.restore(base)
        close(step(base, control), expected)
        remove_hook_from_module(base, recurse=True)
        close(step(base, control), expected)


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


@torch.no_grad()
def test_blocks_compiled_one_by_one(both, strict):
    base, control = map(controlnet.accelerate, both)
    expected = step(base, control)
    base.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    for _ in range(2):
        close(step(base, control), expected)


@torch.no_grad()
def test_autocast(both, strict):
    base, control = both
    with torch.autocast("cpu", torch.bfloat16):
        theirs = step(*both)
        ours = step(*map(controlnet.accelerate, both))
    truth = step(*both)
    assert (ours - truth).norm() <= 2 * (theirs - truth).norm()


@torch.no_grad()
def test_inference_mode(both, strict):
    base, control = both
    expected = step(base, control)
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
    with pytest.raises(ValueError, match=r"scales has a mask of shape \[3, 1, 4, 4\]"):
        control(x, t, context, hint, conditioning_scale=torch.ones(3, 1, 4, 4))
    down, _ = control(x, t, context, hint, return_dict=False)  # the error left nothing behind
    close(down[0], one[0][0])


@pytest.mark.parametrize("guess_mode", [False, True])
@torch.no_grad()
def test_scale_zero_has_the_shapes_of_any_other(guess_mode, both, strict):
    base, control = both
    x, t, context, hint = inputs()
    options = {"conditioning_scale": 0.0, "guess_mode": guess_mode}
    expected = control(x, t, context, hint, **options)
    with fused() as counts:
        actual = controlnet.accelerate(control)(x, t, context, hint, **options)
    assert not counts, "computed for nothing"
    ours = [*actual.down_block_res_samples, actual.mid_block_res_sample]
    for mine, theirs in zip(ours, [*expected.down_block_res_samples, expected.mid_block_res_sample], strict=True):
        assert torch.equal(mine, theirs)
        mine += 1  # diffusers adds the next ControlNet's in place


@pytest.mark.parametrize("size", [(64, 64), (72, 40)])
@torch.no_grad()
def test_vae(size, strict):
    model = vae().double()
    images = torch.rand(2, 3, *size).double() * 2 - 1
    latents = torch.randn(2, 4, size[0] // 8, size[1] // 8).double()
    moments, decoded = model.encode(images).latent_dist.parameters, model.decode(latents).sample
    controlnet.accelerate(model)
    with fused() as counts:
        exact(model.encode(images).latent_dist.parameters, moments)
        exact(model.decode(latents).sample, decoded)
    norms = sum(isinstance(m, torch.nn.GroupNorm) for m in model.modules())
    assert counts == {"attention": 2, "group_norm_silu": norms}
    model.enable_slicing()
    exact(model.decode(latents).sample, decoded)


# --- bad input


@pytest.mark.parametrize("target", [torch.nn.Linear(2, 2), diffusers.DDIMScheduler(), "unet", None])
def test_unsupported_target(target):
    for function in (controlnet.accelerate, controlnet.restore):
        with pytest.raises(TypeError, match="expected a pipeline with a UNet2DConditionModel .*AutoencoderKL"):
            function(target)


def test_unsupported_pipeline():
    pipe = diffusers.DDIMPipeline(
        diffusers.UNet2DModel(sample_size=8, block_out_channels=(32,) * 4), diffusers.DDIMScheduler()
    )
    with pytest.raises(TypeError, match="DDIMPipeline; expected a pipeline with a UNet2DConditionModel"):
        controlnet.accelerate(pipe)
    assert not any(isinstance(m, blocks.Block) for m in pipe.unet.modules())


def test_a_model_on_several_devices_changes_nothing(monkeypatch):
    pipe = pipeline()
    elsewhere = list(pipe.vae.decoder.parameters())[-1]
    parameters = type(pipe.vae).parameters
    fake = SimpleNamespace(device="cuda:1", is_meta=False)
    monkeypatch.setattr(
        pipe.vae, "parameters", lambda: (fake if p is elsewhere else p for p in parameters(pipe.vae)), raising=False
    )
    with pytest.raises(ValueError, match="AutoencoderKL on cpu, cuda:1; expected all of it on one device"):
        controlnet.accelerate(pipe)
    for model in (pipe.unet, pipe.controlnet, pipe.vae):
        assert not any(isinstance(m, blocks.Block) for m in model.modules())


@pytest.mark.parametrize("release", ["0.39.1", "0.43.0", "1.0.0"])
def test_release_that_was_not_tested(release, monkeypatch):
    from importlib import metadata

    monkeypatch.setattr(metadata, "version", lambda name: release)
    with pytest.raises(ImportError, match=f"diffusers {release} is installed; .* tested with 0.40 to 0.42"):
        controlnet.accelerate(unet())


def test_a_pipeline_is_accelerated_once():
    pipe = pipeline()
    assert controlnet.accelerate(pipe) is pipe
    shared, hooks = pipe.unet.__dict__["_cn"], dict(pipe.controlnet._forward_hooks)
    controlnet.accelerate(pipe)
    assert pipe.unet.__dict__["_cn"] is shared and pipe.controlnet._forward_hooks == hooks
