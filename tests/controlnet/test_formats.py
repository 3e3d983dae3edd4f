"""Every format into every other and back, bit for bit; and the models in a file, whatever it is."""

import json
import subprocess
import sys

import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from transformers import CLIPTextModel

import controlnet
from controlnet import checkpoints
from controlnet.checkpoints import shapes
from tests.controlnet import formats
from tests.controlnet.formats import FAMILIES, PREFIXES, assert_equal, original, save, state, to_nemo
from tests.controlnet.twins import assert_same

FORMATS = ("original", "diffusers", "nemo", "nemo-1.23")
SUFFIX = {"original": "x.safetensors", "diffusers": "x", "nemo": "x.safetensors", "nemo-1.23": "x.safetensors"}
# a file of v1.0 with its U-Net, a base, and a whole checkpoint
CONTENTS = [
    (("unet", "control"), "sd21"),
    (("unet", "first_stage", "cond_stage"), "sd15"),
    (("unet", "control", "first_stage", "cond_stage"), "sd15"),
]


def write(tensors, folder, format):
    """A file in the format, made without the code under test where that is possible."""
    source = save(tensors, folder / "source.safetensors")
    if format == "original":
        return source
    if format == "diffusers":
        controlnet.convert(source, folder / "source", "diffusers")
        return folder / "source"
    return save(to_nemo(tensors, release_1=format == "nemo-1.23"), folder / "nemo.safetensors")


@pytest.mark.parametrize("src", FORMATS)
def test_from_any_format_to_any_and_back_is_bit_equal(tmp_path, src):
    tensors = original("control", folder=tmp_path)
    source = write(tensors, tmp_path, src)
    for dst in FORMATS:
        there = tmp_path / "there" / dst / SUFFIX[dst]
        report = controlnet.convert(source, there, dst)
        assert report.left_out == [] and report.written == {"control": len(tensors)}
        controlnet.convert(there, tmp_path / "back" / f"{dst}.safetensors", "original")
        assert_equal(checkpoints.read(tmp_path / "back" / f"{dst}.safetensors"), tensors)


@pytest.mark.parametrize(("parts", "family"), CONTENTS, ids=lambda value: "+".join([value] * isinstance(value, str)))
def test_a_round_through_all_formats_is_bit_equal(tmp_path, parts, family):
    """With VAE and text encoder, which go through untouched but for diffusers' names."""
    tensors = original(*parts, folder=tmp_path, **FAMILIES[family])
    source = save(tensors, tmp_path / "source.safetensors")
    for step, format in enumerate(("diffusers", "nemo-1.23", "diffusers", "nemo", "original")):
        target = tmp_path / str(step) / SUFFIX[format]
        report = controlnet.convert(source, target, format)
        assert report.left_out == [] and set(report.written) == set(parts)
        source = target
    assert_equal(checkpoints.read(source), tensors)


@pytest.mark.parametrize("format", ["nemo", "nemo-1.23"])
def test_nemo_names(tmp_path, format):
    tensors = original("unet", "control", "first_stage", "extras", folder=tmp_path)
    controlnet.convert(save(tensors, tmp_path / "x.safetensors"), tmp_path / "y.safetensors", format)
    assert_equal(checkpoints.read(tmp_path / "y.safetensors"), to_nemo(tensors, release_1=format == "nemo-1.23"))
    controlnet.convert(tmp_path / "y.safetensors", tmp_path / "z.safetensors", "original")
    assert_equal(checkpoints.read(tmp_path / "z.safetensors"), tensors)


@pytest.mark.parametrize("name", ["x.ckpt", "x.pth", "x.nemo"])
def test_pickles_and_archives_where_asked_for(tmp_path, name):
    tensors = original("unet", "control", folder=tmp_path)
    format = "nemo" if name.endswith("nemo") else "original"
    controlnet.convert(save(tensors, tmp_path / "x.safetensors"), tmp_path / name, format)
    assert_equal(checkpoints.read(tmp_path / name), to_nemo(tensors) if format == "nemo" else tensors)
    loaded = controlnet.load(tmp_path / name)
    assert_equal(state(loaded.unet), state(formats.unet()))
    assert_equal(state(loaded.control), state(formats.control()))
    assert loaded.report.layout == format


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_dtype_is_kept(tmp_path, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in original("control", folder=tmp_path).items()}
    controlnet.convert(save(tensors, tmp_path / "x.safetensors"), tmp_path / "x", "diffusers")
    assert checkpoints.read(tmp_path / "x")["conv_in.weight"].dtype == dtype
    assert controlnet.load(tmp_path / "x").control.dtype == dtype


# load


def inputs(model):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 4, 4, generator=generator)
    return x, torch.tensor([3, 700]), torch.randn(2, 5, model.arch.context_dim, generator=generator)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("format", FORMATS)
def test_load_gives_the_same_models(tmp_path, format, family):
    params = FAMILIES[family]
    tensors = original("unet", "control", "first_stage", folder=tmp_path, **params)
    loaded = controlnet.load(write(tensors, tmp_path, format))
    assert len(loaded.report.matched) == len([name for name in tensors if "first_stage" not in name])
    assert loaded.report.unused == [] and len(loaded.first_stage) > 0 and loaded.cond_stage == {}
    for model, twin in ((loaded.unet, formats.unet(**params)), (loaded.control, formats.control(**params))):
        assert_equal(state(model), state(twin))
        x, timesteps, context = inputs(twin)
        hint = [torch.ones(2, 3, 8, 8)] if model is loaded.control else []
        with torch.no_grad():
            got, want = model(x, *hint, timesteps, context), twin(x, *hint, timesteps, context)
        for one, other in zip(got, want, strict=True):
            assert_same(one, other, 1e-4)
    assert not any(p.requires_grad for p in loaded.unet.parameters())
    assert all(p.requires_grad for p in loaded.control.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_reads_what_is_written_for_it(tmp_path, family):
    """Whole folders, by diffusers' own from_pretrained; its models answer as ours do, so config.json is right, too."""
    tensors = original("unet", "control", "first_stage", "cond_stage", folder=tmp_path, **FAMILIES[family])
    controlnet.convert(save(tensors, tmp_path / "x.safetensors"), tmp_path / "x", "diffusers")
    loaded = controlnet.load(tmp_path / "x.safetensors")
    theirs = UNet2DConditionModel.from_pretrained(tmp_path / "x" / "unet")
    x, timesteps, context = inputs(loaded.unet)
    with torch.no_grad():
        assert_same(loaded.unet(x, timesteps, context), theirs(x, timesteps, context).sample, 1e-4)
        theirs = ControlNetModel.from_pretrained(tmp_path / "x" / "controlnet")
        hint = torch.rand(2, 3, 8, 8)
        down, mid = theirs(x, timesteps, context, hint, return_dict=False)
        for one, other in zip(loaded.control(x, hint, timesteps, context), [*down, mid], strict=True):
            assert_same(one, other, 1e-4)
    vae = AutoencoderKL.from_pretrained(tmp_path / "x" / "vae")
    assert_equal(vae.state_dict(), formats.tiny.vae().state_dict())
    text = CLIPTextModel.from_pretrained(tmp_path / "x" / "text_encoder")
    assert_equal(text.state_dict(), formats.tiny.clip_folder(tmp_path / "clip").state_dict())


def test_what_diffusers_writes_is_read(tmp_path):
    """diffusers' own folders, with heads that no shape tells, go through the original's format and come back."""
    shared = {
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "cross_attention_dim": 24,
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
    }
    theirs = formats.tiny.randomised(
        UNet2DConditionModel(**shared, layers_per_block=2, up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")), 3
    )
    theirs.save_pretrained(tmp_path / "pipe" / "unet")
    theirs = formats.tiny.randomised(ControlNetModel(**shared, conditioning_embedding_out_channels=(8, 16)), 4)
    theirs.save_pretrained(tmp_path / "pipe" / "controlnet")
    controlnet.convert(tmp_path / "pipe", tmp_path / "x.safetensors", "original")
    controlnet.convert(tmp_path / "x.safetensors", tmp_path / "back", "diffusers")
    for part in ("unet", "controlnet"):
        assert_equal(checkpoints.read(tmp_path / "back" / part), checkpoints.read(tmp_path / "pipe" / part))
        before, after = (
            json.loads((tmp_path / place / part / "config.json").read_text()) for place in ("pipe", "back")
        )
        assert {key: before[key] for key in after} == after
    control = controlnet.load(tmp_path / "x.safetensors").control
    assert control.arch.num_head_channels == 16
    x, timesteps, context = inputs(control)
    hint = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        down, mid = theirs(x, timesteps, context, hint, return_dict=False)
        for one, other in zip(control(x, hint, timesteps, context), [*down, mid], strict=True):
            assert_same(one, other, 1e-4)


def test_a_diffusers_single_file_and_given_heads(tmp_path):
    tensors = original("control", folder=tmp_path, num_heads=4)
    controlnet.convert(save(tensors, tmp_path / "x.safetensors"), tmp_path / "d.safetensors", "diffusers", num_heads=4)
    assert "controlnet_mid_block.weight" in checkpoints.read(tmp_path / "d.safetensors")
    assert controlnet.load(tmp_path / "d.safetensors").control.arch.num_heads == 4  # stated in the file
    assert controlnet.load(tmp_path / "x.safetensors").control.arch.num_heads == 8  # the family's
    assert controlnet.load(tmp_path / "x.safetensors", num_heads=2).control.arch.num_heads == 2


@pytest.mark.parametrize(
    "params",
    [
        {"channel_mult": [1, 2, 3], "num_res_blocks": [1, 2, 1], "attention_resolutions": [2], "transformer_depth": 2},
        {"attention_resolutions": [], "use_scale_shift_norm": True},
        {"channel_mult": [1], "attention_resolutions": [1], "num_res_blocks": 3},
        {"num_res_blocks": 2, "num_attention_blocks": [1, 2]},
        {"disable_self_attentions": [True, False], "disable_middle_self_attn": True},
    ],
)
def test_other_architectures_are_read_off_the_shapes(tmp_path, params):
    tensors = original("unet", "control", folder=tmp_path, **params)
    loaded = controlnet.load(save(tensors, tmp_path / "x.safetensors"))
    assert_equal(state(loaded.unet), state(formats.unet(**params)))
    wanted = formats.control(**params).arch
    for name in ("channel_mult", "num_res_blocks", "attention_resolutions", "transformer_depth", "use_scale_shift_norm",
                 "num_attention_blocks", "disable_self_attentions", "disable_middle_self_attn",
                 "hint_block_channels"):  # fmt: skip
        assert getattr(loaded.control.arch, name) == getattr(wanted, name), name


SD15 = {"in_channels": 4, "model_channels": 320, "num_res_blocks": [2] * 4, "attention_resolutions": [1, 2, 4],
        "channel_mult": [1, 2, 4, 4], "use_spatial_transformer": True, "transformer_depth": 1, "context_dim": 768,
        "num_heads": 8, "use_linear_in_transformer": False, "legacy": False, "use_flash_attention": True}  # fmt: skip
SD21 = SD15 | {"context_dim": 1024, "use_linear_in_transformer": True, "num_head_channels": 64}
del SD21["num_heads"]


@pytest.mark.parametrize("params", [SD15, SD21], ids=["sd15", "sd21"])
@pytest.mark.parametrize("part", ["unet", "control"])
def test_the_whole_models_are_read_off_their_shapes(part, params):
    """At full size, without memory, in both layouts' names."""
    own = {"unet": {"out_channels": 4}, "control": {"hint_channels": 3, "hint_block_channels": [16, 32, 96, 256]}}[part]
    with torch.device("meta"):
        model = {"unet": controlnet.UNet, "control": controlnet.ControlNet}[part](**params, **own)
    tensors = model.state_dict()
    assert shapes.parameters(tensors, part, "x") == params | own
    theirs = shapes.to_diffusers(tensors, model.arch)
    assert len(theirs) == len(tensors) and not theirs.keys() & tensors.keys()
    assert list(shapes.to_original(theirs, part, "x")) == list(tensors)


def test_a_text_encoder_alone_and_its_buffers(tmp_path):
    """Folders of transformers' releases differ in a prefix; old files have position numbers beside the weights."""
    tensors = original("cond_stage", folder=tmp_path)
    tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(12)[None]
    controlnet.convert(save(tensors, tmp_path / "x.safetensors"), tmp_path / "text", "diffusers")
    names = checkpoints.read(tmp_path / "text")
    assert "text_model.final_layer_norm.weight" in names and len(names) == len(tensors)
    controlnet.convert(tmp_path / "text", tmp_path / "back.safetensors", "original")
    assert_equal(checkpoints.read(tmp_path / "back.safetensors"), tensors)
    found = controlnet.load(tmp_path / "clip").cond_stage
    assert_equal({f"cond_stage_model.{name}": t for name, t in found.items()}, original("cond_stage", folder=tmp_path))
    assert checkpoints.parts(tmp_path / "clip") == ["cond_stage"]


# transfer, add_control, the command


def test_transfer_moves_what_comes_from_the_base(tmp_path):
    tensors = original("unet", "control", folder=tmp_path)
    old, new = state(formats.unet(seed=5)), state(formats.unet(seed=6))
    for name, base in (("old", old), ("new", new)):
        save({PREFIXES["unet"] + key: tensor for key, tensor in base.items()}, tmp_path / f"{name}.safetensors")
    control, dst = save(tensors, tmp_path / "x.safetensors"), tmp_path / "moved.safetensors"
    loaded = controlnet.transfer(control, tmp_path / "old.safetensors", tmp_path / "new.safetensors", dst)
    found = checkpoints.read(dst)
    assert found.keys() == tensors.keys()
    for part, model in (("control", loaded.control), ("unet", loaded.unet)):
        for name, tensor in model.state_dict().items():
            want = tensors[PREFIXES[part] + name].double()
            if name in old:
                want = want + new[name].double() - old[name].double()
            assert_same(tensor.double(), want, 1e-6)
            assert torch.equal(found[PREFIXES[part] + name], tensor)


def test_transfer_to_the_same_base_changes_nothing(tmp_path):
    tensors = original("control", folder=tmp_path)
    base = save(original("unet", folder=tmp_path), tmp_path / "base.safetensors")
    loaded = controlnet.transfer(save(tensors, tmp_path / "x.safetensors"), base, base)
    assert_equal(state(loaded.control), state(formats.control()))
    assert loaded.unet is None


@pytest.mark.parametrize("format", FORMATS)
def test_add_control_copies_the_trunk_of_any_base(tmp_path, format):
    tensors = original("unet", "first_stage", folder=tmp_path)
    source = write(tensors, tmp_path, format)
    dst = tmp_path / "with.safetensors"
    loaded = controlnet.add_control(source, dst, hint_block_channels=(8, 16))
    found, base = checkpoints.read(dst), state(formats.unet())
    assert_equal({name: found[name] for name in tensors}, tensors)
    trunk = [name for name in loaded.control.state_dict() if name in base]
    assert len(trunk) > 50
    assert_equal({name: found[PREFIXES["control"] + name] for name in trunk}, {name: base[name] for name in trunk})
    x, timesteps, context = inputs(loaded.control)
    outputs = loaded.control(x, torch.rand(2, 3, 8, 8), timesteps, context)
    assert len(outputs) == 5 and not any(output.any() for output in outputs)
    with torch.no_grad():  # training the copy leaves the U-Net alone
        loaded.control.input_blocks[0][0].weight.zero_()
    assert_equal(state(loaded.unet), base)


def test_the_command(tmp_path):
    source = save(original("control", "extras", folder=tmp_path), tmp_path / "x.safetensors")
    command = [sys.executable, "-m", "controlnet.convert", str(source), str(tmp_path / "x"), "--format", "diffusers"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "left out" in done.stdout and "model_ema 1" in done.stdout and "betas 1" in done.stdout
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 1 and "not empty" in again.stderr and "Traceback" not in again.stderr
    assert (tmp_path / "x" / "config.json").is_file()


def test_importing_the_package_imports_no_model():
    code = "import sys, controlnet; assert 'torch' not in sys.modules; print(controlnet.load.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "load"
