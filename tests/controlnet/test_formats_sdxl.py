"""Stable Diffusion XL's files: original single files, diffusers' folders and NeMo's, there and back bit for bit."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import controlnet
from controlnet import checkpoints
from controlnet.checkpoints import shapes
from controlnet.model.controlnet import ControlNet
from controlnet.model.unet import UNet
from tests.controlnet import formats, tiny
from tests.controlnet.formats import assert_equal, save, state
from tests.controlnet.test_sdxl_model import SDXL

SMALL = {**SDXL, "model_channels": 64, "num_res_blocks": 1, "transformer_depth": [0, 1, 2], "context_dim": 48,
         "adm_in_channels": 40}  # fmt: skip
HINT = {"hint_channels": 3, "hint_block_channels": (8, 16)}
LOGIT = "conditioner.embedders.1.model.logit_scale"


def unet():
    return tiny.randomised(UNet(**SMALL, out_channels=4), 1)


def control():
    return tiny.randomised(ControlNet(**SMALL, **HINT), 2)


@pytest.fixture
def tensors(tmp_path):
    """A base with its ControlNet, as one original file has them."""
    found = {f"model.diffusion_model.{name}": tensor for name, tensor in state(unet()).items()}
    found |= {f"control_model.{name}": tensor for name, tensor in state(control()).items()}
    found |= {f"first_stage_model.{name}": t for name, t in tiny.original_vae_names(tiny.vae(), 1).items()}
    text = tiny.clip_folder(tmp_path / "clip").state_dict()
    prefix = "conditioner.embedders.0.transformer.text_model."
    found |= {prefix + name.removeprefix("text_model."): tensor for name, tensor in text.items()}
    found |= {f"conditioner.embedders.1.{name}": tensor for name, tensor in formats.open_clip().items()}
    return {name: tensor.clone().contiguous() for name, tensor in found.items()}


def test_a_round_through_all_formats_is_bit_equal(tmp_path, tensors):
    source = save(tensors, tmp_path / "source.safetensors")
    without = {name: tensor for name, tensor in tensors.items() if name != LOGIT}
    for step, format in enumerate(("nemo", "original", "diffusers", "nemo-1.23", "diffusers", "original")):
        target = tmp_path / str(step) / ("x" if format == "diffusers" else "x.safetensors")
        done = controlnet.convert(source, target, format)
        assert done.left_out == ([LOGIT] if step == 2 else [])
        if step == 1:
            assert_equal(checkpoints.read(target), tensors)
        source = target
    assert_equal(checkpoints.read(source), without)
    assert set(done.written) == {"unet", "control", "first_stage", "cond_stage", "cond_stage_2"}


def test_diffusers_reads_what_is_written_for_it(tmp_path, tensors):
    controlnet.convert(save(tensors, tmp_path / "x.safetensors"), tmp_path / "x", "diffusers")
    loaded = controlnet.load(tmp_path / "x.safetensors")
    generator = torch.Generator().manual_seed(0)
    x, context = torch.randn(2, 4, 5, 4, generator=generator), torch.randn(2, 7, 48, generator=generator)
    timesteps, hint = torch.tensor([3, 700]), torch.rand(2, 3, 10, 8, generator=generator)
    pooled, sizes = torch.randn(2, 16, generator=generator), torch.zeros(2, 6)
    for name, model, cls in (
        ("unet", loaded.unet, UNet2DConditionModel),
        ("controlnet", loaded.control, ControlNetModel),
    ):
        theirs = cls.from_pretrained(tmp_path / "x" / name, addition_time_embed_dim=4)
        own = (hint,) if name == "controlnet" else ()
        y = torch.cat([pooled, torch.tensor([1.0, 1, 0, 0]).repeat(2, 6)], dim=1)
        with torch.no_grad():
            got = model(x, *own, timesteps, context, y=y)
            want = theirs(x, timesteps, context, *own, return_dict=False,
                          added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes})  # fmt: skip
        got, want = (got, [*want[0], want[1]]) if own else ([got], want)
        for one, other in zip(got, want, strict=True):
            formats.twins.assert_same(one, other, 1e-4)
    vae = AutoencoderKL.from_pretrained(tmp_path / "x" / "vae")
    assert vae.config.scaling_factor == 0.13025
    assert_equal(vae.state_dict(), tiny.vae().state_dict())
    first = CLIPTextModel.from_pretrained(tmp_path / "x" / "text_encoder")
    assert_equal(first.state_dict(), tiny.clip_folder(tmp_path / "clip").state_dict())
    second = CLIPTextModelWithProjection.from_pretrained(tmp_path / "x" / "text_encoder_2")
    twin = CLIPTextModelWithProjection(CLIPTextConfig(**second.config.to_dict()))
    wanted = convert_open_clip_checkpoint(twin, dict(tensors), prefix="conditioner.embedders.1.model.")
    assert_equal(second.state_dict(), {name: wanted[name] for name in second.state_dict()})
    assert second.config.hidden_act == "gelu" and second.config.projection_dim == 24


def test_folders_and_files_of_one_part(tmp_path, tensors):
    """What people download: a ControlNet's folder or bare file, a text encoder's folder, a U-Net file."""
    controlnet.convert(save(tensors, tmp_path / "x.safetensors"), tmp_path / "x", "diffusers")
    for source in (tmp_path / "x" / "controlnet", tmp_path / "x/controlnet/diffusion_pytorch_model.safetensors"):
        found = controlnet.load(source)
        assert_equal(state(found.control), state(control()))
        assert found.control.arch.adm_in_channels == 40 and found.control.arch.transformer_depth == (0, 1, 2)
    assert checkpoints.parts(tmp_path / "x" / "text_encoder_2") == ["cond_stage_2"]
    encoder = checkpoints.part_tensors(tmp_path / "x.safetensors", "cond_stage_2")
    assert_equal(encoder, checkpoints.read(tmp_path / "x" / "text_encoder_2"))
    fresh = UNet(**SMALL, out_channels=4)
    checkpoints.load_unet(fresh, tmp_path / "x")
    assert_equal(state(fresh), state(unet()))


def test_the_refiner_has_the_second_text_encoder_alone(tmp_path, tensors):
    kept = {name: t for name, t in tensors.items() if name.startswith("model.")}
    kept |= {
        f"conditioner.embedders.0.{name}": t for name, t in formats.open_clip().items() if name != "model.logit_scale"
    }
    controlnet.convert(save(kept, tmp_path / "x.safetensors"), tmp_path / "x", "diffusers")
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == ["text_encoder_2", "unet"]
    controlnet.convert(tmp_path / "x", tmp_path / "back.safetensors", "original")
    assert_equal(checkpoints.read(tmp_path / "back.safetensors"), kept)


def test_a_control_is_added_to_a_base(tmp_path, tensors):
    base = {name: tensor for name, tensor in tensors.items() if not name.startswith("control_model.")}
    loaded = controlnet.add_control(save(base, tmp_path / "x.safetensors"), hint_block_channels=(8, 16))
    trunk = state(unet())
    assert torch.equal(loaded.control.state_dict()["label_emb.0.2.weight"], trunk["label_emb.0.2.weight"])
    assert (
        loaded.control.arch.transformer_depth == (0, 1, 2) and loaded.cond_stage_2.keys() == formats.open_clip().keys()
    )


@pytest.mark.parametrize("part", ["unet", "control"])
def test_the_whole_models_are_read_off_their_shapes(part):
    """At full size, without memory, in both layouts' names."""
    own = {"unet": {"out_channels": 4}, "control": {"hint_channels": 3, "hint_block_channels": [16, 32, 96, 256]}}[part]
    with torch.device("meta"):
        model = {"unet": UNet, "control": ControlNet}[part](**SDXL, **own)
    tensors = model.state_dict()
    found = shapes.architecture(shapes.parameters(tensors, part, "x"), part, "x")
    assert vars(found) == vars(model.arch) | {"attention_resolutions": (2, 4), "use_flash_attention": True}
    theirs = shapes.to_diffusers(tensors, model.arch)
    assert len(theirs) == len(tensors) and not theirs.keys() & tensors.keys()
    assert list(shapes.to_original(theirs, part, "x")) == list(tensors)


def test_middle_depth_that_diffusers_cannot_say(tmp_path):
    params = SMALL | {"transformer_depth_middle": 1}
    source = save(state(UNet(**params, out_channels=4)), tmp_path / "x.safetensors")
    assert controlnet.load(source).unet.arch.transformer_depth_middle == 1
    with pytest.raises(controlnet.CheckpointError, match=r"transformer_depth_middle 1: diffusers' middle block"):
        controlnet.convert(source, tmp_path / "x", "diffusers")


def test_the_config_that_is_written(tmp_path, tensors):
    controlnet.convert(save(tensors, tmp_path / "x.safetensors"), tmp_path / "x", "diffusers")
    config = json.loads((tmp_path / "x" / "unet" / "config.json").read_text())
    assert config["transformer_layers_per_block"] == [1, 1, 2] and config["addition_embed_type"] == "text_time"
    assert config["projection_class_embeddings_input_dim"] == 40 and config["attention_head_dim"] == [1, 2, 4]
