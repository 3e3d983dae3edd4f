"""Stable Diffusion 2.1 by configuration: the recipe's models against diffusers', whole and at reduced width."""

from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import save_file

import controlnet
from controlnet import build, config
from controlnet.checkpoints import folders, shapes
from controlnet.inference.sampling import ddim
from controlnet.model.controlled import ControlledUNet
from controlnet.model.diffusion import NoiseSchedule
from tests.controlnet.twins import assert_same, randomise

RECIPE = Path(controlnet.__file__).parent / "configs" / "sd21.yaml"
# SD 2.1's own config.json, where it differs from the defaults; attention_head_dim is the number of heads.
SD21 = {
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
SMALL = {"model_channels": 64, "channel_mult": [1, 2], "attention_resolutions": [1, 2], "num_res_blocks": 1,
         "context_dim": 24}  # fmt: skip
CLASSES = {"unet": diffusers.UNet2DConditionModel, "control": diffusers.ControlNetModel}


def reduced():
    """The recipe's `model` section at the width of SMALL, without files."""
    stages = ("unet_config", "control_stage_config")
    overrides = [f"model.{stage}.{key}={value}" for stage in stages for key, value in SMALL.items()]
    return config.load(RECIPE, overrides).model


def test_the_recipe_is_diffusers_sd21():
    """All tensors by name and shape, and every key of config.json that diffusers' models are made from."""
    with torch.device("meta"):
        model = build.build_model(config.load(RECIPE).model, weights=False)
    for part, ours in (("unet", model.unet), ("control", model.control)):
        with torch.device("meta"):
            theirs = CLASSES[part](**SD21)
        renamed = shapes.to_diffusers(ours.state_dict(), ours.arch)
        assert {name: tensor.shape for name, tensor in renamed.items()} == {
            name: tensor.shape for name, tensor in theirs.state_dict().items()
        }
        written = folders.model_config(ours.arch)
        for key in written.keys() - {"_class_name"}:
            want = theirs.config[key]
            assert written[key] == (list(want) if isinstance(want, tuple) else want), key


@pytest.fixture
def pair(tmp_path):
    """The reduced recipe's model with random weights, and diffusers' two, made of its file by our conversion."""
    model = build.build_model(reduced(), weights=False)
    tensors = {}
    for prefix, part, seed in (("model.diffusion_model.", model.unet, 0), ("control_model.", model.control, 1)):
        randomise(part, seed)
        tensors |= {prefix + name: tensor.contiguous() for name, tensor in part.state_dict().items()}
    save_file(tensors, tmp_path / "x.safetensors")
    controlnet.convert(tmp_path / "x.safetensors", tmp_path / "x", "diffusers")
    unet = CLASSES["unet"].from_pretrained(tmp_path / "x" / "unet")
    control = CLASSES["control"].from_pretrained(tmp_path / "x" / "controlnet")
    return model, unet, control


def test_the_recipe_denoises_as_diffusers_does(pair):
    """v-prediction, guidance and control over a whole DDIM schedule."""
    model, their_unet, their_control = (part.double() for part in pair)
    assert their_unet.config.attention_head_dim == [1, 2]
    settings = reduced()
    names = ("timesteps", "linear_start", "linear_end", "beta_schedule", "parameterization")
    schedule = NoiseSchedule(**{name: settings[name] for name in names})
    assert settings["parameterization"] == "v"
    generator = torch.Generator().manual_seed(0)
    x, hint = torch.randn(1, 4, 4, 6, generator=generator), torch.rand(1, 3, 32, 48, generator=generator)
    context, uncond = torch.randn(2, 1, 5, 24, generator=generator, dtype=torch.float64)
    ours = ddim(model, schedule, x.shape, context, uncond_context=uncond, hint=hint, guidance_scale=4, steps=4, x_T=x)

    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type="v_prediction",
    )  # fmt: skip
    scheduler.set_timesteps(4)
    theirs, both, hints = x.double(), torch.cat([uncond, context]), torch.cat([hint, hint]).double()
    with torch.no_grad():
        for t in scheduler.timesteps:
            down, mid = their_control(torch.cat([theirs] * 2), t, both, hints, return_dict=False)
            free, guided = their_unet(
                torch.cat([theirs] * 2), t, both,
                down_block_additional_residuals=down, mid_block_additional_residual=mid,
            ).sample.chunk(2)  # fmt: skip
            theirs = scheduler.step(free + 4 * (guided - free), t, theirs, return_dict=False)[0]
    assert_same(ours.double(), theirs, 1e-4)  # the sampler's latents are float32


def test_loading_the_file_makes_the_recipe_s_model(pair, tmp_path):
    """Linear layers mean heads of 64 channels, so the file alone gives the model that the recipe describes."""
    model, _, _ = pair
    loaded = controlnet.load(tmp_path / "x.safetensors")
    assert loaded.unet.arch.num_head_channels == 64 and loaded.unet.arch.use_linear_in_transformer
    again = ControlledUNet(loaded.unet, loaded.control, sd_locked=True, only_mid_control=False).double()
    x, context = torch.randn(2, 4, 4, 4, dtype=torch.float64), torch.randn(2, 5, 24, dtype=torch.float64)
    with torch.no_grad():
        inputs = x, torch.tensor([1, 900]), context, torch.rand(2, 3, 32, 32)
        assert_same(again(*inputs), model.double()(*inputs))
