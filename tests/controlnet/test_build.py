"""Models built from configurations: the full recipe on the meta device, and a real step of it at reduced width."""

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import controlnet
from controlnet import config
from controlnet.build import build_conditioning, build_model, instantiate
from controlnet.checkpoints import CheckpointError, weights
from controlnet.config import ConfigError
from controlnet.model.diffusion import DiffusionLoss, NoiseSchedule
from controlnet.model.unet import UNet
from tests.controlnet import tiny
from tests.controlnet.tiny import randomised

RECIPE = Path(controlnet.__file__).parent / "configs" / "sd15_seg.yaml"
CONTROL_ONLY = ("zero_convs.", "input_hint_block.", "middle_block_out.")
NET = {
    "in_channels": 12,
    "model_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": [1, 2],
    "channel_mult": [1, 2],
    "num_heads": 2,
    "use_spatial_transformer": True,
    "context_dim": 8,
    "legacy": False,
}


def small(*overrides: str):
    """A small configuration without files."""
    document = {
        "model": {
            "scale_factor": 1.0,
            "unet_config": NET | {"out_channels": 12},
            "control_stage_config": {"params": NET | {"hint_channels": 3, "hint_block_channels": [8, 16]}},
            "first_stage_config": {"_target_": "controlnet.conditioning.SpaceToDepth", "factor": 2},
            "cond_stage_config": {
                "_target_": "controlnet.conditioning.WordEmbedder",
                "vocabulary": ["red", "house"],
                "dim": 8,
                "max_length": 4,
            },
        }
    }
    return config.compose(document, overrides).model


def base(path: Path, seed: int = 1, **params) -> UNet:
    unet = randomised(UNet(**NET | params, out_channels=12), seed)
    save_file({f"model.diffusion_model.{name}": tensor for name, tensor in unet.state_dict().items()}, path)
    return unet


def assert_same(ours, theirs, names=None) -> None:
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in (ours if names is None else names))


def test_the_recipe_builds_at_full_size():
    with torch.device("meta"):
        model = build_model(config.load(RECIPE).model, weights=False)
    unet, control = model.unet.state_dict(), model.control.state_dict()
    assert (len(unet), sum(p.numel() for p in model.unet.parameters())) == (686, 859_520_964)
    assert (len(control), sum(p.numel() for p in model.control.parameters())) == (340, 361_279_120)
    assert sum(p.numel() for p in model.trainable_parameters()) == 361_279_120


def test_the_recipe_takes_a_real_step_at_reduced_width(tmp_path):
    """Every file that the recipe names is there, small; the rest of it stands as it is."""
    width = ["model_channels=32", "context_dim=16", "num_heads=4"]
    model_config = config.load(
        RECIPE,
        [
            *(f"model.{part}.{setting}" for part in ("unet_config", "control_stage_config") for setting in width),
            f"model.unet_config.from_pretrained={tmp_path}/sd.ckpt",
            f"model.first_stage_config.from_pretrained={tmp_path}/vae.bin",
            "model.first_stage_config.ddconfig.ch=32",
            "model.first_stage_config.ddconfig.ch_mult=[1,1,1,1]",
            "model.first_stage_config.ddconfig.num_res_blocks=1",
            f"model.cond_stage_config.version={tmp_path}/clip",
            "model.cond_stage_config.max_length=8",
        ],
    ).model
    node = {key: value for key, value in model_config.unet_config.items() if key != "from_pretrained"}
    locked = randomised(instantiate(node), seed=1)
    for parameter in locked.parameters():
        parameter.data *= 0.05
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in locked.state_dict().items()}
    torch.save({"state_dict": tensors, "global_step": 1}, tmp_path / "sd.ckpt")
    vae = type(tiny.vae())(
        block_out_channels=(32,) * 4,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    torch.save(vae.state_dict(), tmp_path / "vae.bin")
    tiny.clip_folder(tmp_path / "clip")

    model, conditioning = build_model(model_config), build_conditioning(model_config)
    assert model.unet.input_blocks[0][0].weight.is_contiguous(memory_format=torch.channels_last)
    assert_same(model.unet, locked)
    loss = DiffusionLoss(model, NoiseSchedule.from_config(model_config))
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    latents = conditioning.latents(torch.rand(2, 3, 64, 64, generator=generator) * 2 - 1, generator)
    context = conditioning.context(["a cat", ""])
    assert latents.shape == (2, 4, 8, 8) and context.shape == (2, 8, 16)
    hint, noise = torch.rand(2, 3, 64, 64, generator=generator), torch.randn(2, 4, 8, 8, generator=generator)
    value = loss(latents, hint, context, noise, torch.tensor([10, 900]))
    value.backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    zero = {
        f"control.{n}" for n, _ in model.control.named_parameters() if n.startswith(("zero_convs", "middle_block_out"))
    }
    assert torch.isfinite(value) and moved == zero, "at step 0 exactly the 26 tensors of the zero convolutions learn"
    optimizer.step()
    assert all(model.state_dict()[name].abs().max() > 0 for name in zero)
    assert_same(model.unet, locked)


def test_the_control_is_a_copy_of_the_unet(tmp_path):
    unet = base(tmp_path / "sd.safetensors")
    for override in (
        f"model.unet_config.from_pretrained={tmp_path}/sd.safetensors",
        f"model.ckpt_path={tmp_path}/sd.safetensors",
    ):
        model = build_model(small(override))
        assert_same(model.unet, unet)
        trunk = [name for name in model.control.state_dict() if not name.startswith(CONTROL_ONLY)]
        assert_same(model.control, unet, trunk)
        assert not model.control.state_dict()["zero_convs.0.0.weight"].any()


@pytest.mark.parametrize("from_nemo", ["True", "False"])
def test_the_control_starts_from_another_unet(tmp_path, from_nemo):
    first, second = base(tmp_path / "a.safetensors", seed=1), base(tmp_path / "b.safetensors", seed=2)
    model = build_model(
        small(
            f"model.unet_config.from_pretrained={tmp_path}/a.safetensors",
            f"model.unet_config.from_NeMo={from_nemo}",
            f"model.control_stage_config.params.from_pretrained_unet={tmp_path}/b.safetensors",
            f"model.control_stage_config.params.from_NeMo={from_nemo}",
        )
    )
    assert_same(model.unet, first)
    assert_same(model.control, second, [n for n in model.control.state_dict() if not n.startswith(CONTROL_ONLY)])


def test_a_trained_control_is_taken_up(tmp_path):
    trained = randomised(build_model(small(), weights=False).control, seed=3)
    tensors = {f"control_model.{name}": tensor for name, tensor in trained.state_dict().items()}
    save_file(tensors, tmp_path / "control.safetensors")
    base(tmp_path / "sd.safetensors")
    unet = f"model.unet_config.from_pretrained={tmp_path}/sd.safetensors"
    for key in ("control_stage_config.from_pretrained", "ckpt_path"):
        assert_same(build_model(small(unet, f"model.{key}={tmp_path}/control.safetensors")).control, trained)
    only_unet = build_model(small(unet, f"model.ckpt_path={tmp_path}/control.safetensors", "model.load_only_unet=True"))
    assert not only_unet.control.state_dict()["zero_convs.0.0.weight"].any()


def test_stages_of_a_whole_checkpoint(tmp_path):
    embedder = build_conditioning(small()).cond_stage
    tensors = {f"cond_stage_model.{name}": 2 * tensor for name, tensor in embedder.state_dict().items()}
    save_file(tensors | {"model.diffusion_model.out.2.bias": torch.ones(12)}, tmp_path / "sd.safetensors")
    path = f"model.ckpt_path={tmp_path}/sd.safetensors"
    assert torch.equal(build_conditioning(small(path)).context(["red"]), 2 * embedder(embedder.tokenize(["red"])))
    without = build_conditioning(small(path, "model.load_encoder=False"))
    assert torch.equal(without.context(["red"]), embedder(embedder.tokenize(["red"])))


def test_a_configuration_of_the_original_with_one_file_for_everything(tmp_path):
    """`target`, `params`, no `from_pretrained`: U-Net, ControlNet, VAE and text encoder all come from ckpt_path."""
    net = {key: value for key, value in NET.items() if key != "in_channels"} | {"in_channels": 4, "context_dim": 16}
    ddconfig = {"double_z": True, "ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "z_channels": 4, "resolution": 256}
    hint = {"hint_channels": 3, "hint_block_channels": [8, 16]}
    clip = tiny.clip_folder(tmp_path / "clip")
    document = {
        "target": "cldm.cldm.ControlLDM",
        "params": {
            "ckpt_path": f"{tmp_path}/all.ckpt",
            "unet_config": {"target": "cldm.cldm.ControlledUnetModel", "params": net | {"out_channels": 4}},
            "control_stage_config": {"target": "cldm.cldm.ControlNet", "params": net | hint},
            "first_stage_config": {
                "target": "ldm.models.autoencoder.AutoencoderKL",
                "params": {"embed_dim": 4, "ddconfig": ddconfig, "lossconfig": {"target": "torch.nn.Identity"}},
            },
            "cond_stage_config": {
                "target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
                "params": {"version": f"{tmp_path}/clip", "max_length": 8},
            },
        },
    }
    model_config = config.compose({"model": document}).model
    want = randomised(build_model(model_config, weights=False), seed=5)
    vae = tiny.vae()
    with torch.no_grad():
        clip.final_layer_norm.bias.add_(1)
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in want.unet.state_dict().items()}
    tensors |= {f"control_model.{name}": tensor for name, tensor in want.control.state_dict().items()}
    tensors |= {f"first_stage_model.{name}": tensor for name, tensor in tiny.original_vae_names(vae, 1).items()}
    tensors |= {f"cond_stage_model.transformer.text_model.{name}": tensor for name, tensor in clip.state_dict().items()}
    torch.save({"state_dict": tensors}, tmp_path / "all.ckpt")
    model, conditioning = build_model(model_config), build_conditioning(model_config)
    assert_same(model, want)
    assert_same(conditioning.first_stage.vae, vae)
    assert_same(conditioning.cond_stage.encoder, clip)


@pytest.mark.parametrize("sd_locked", [True, False])
def test_what_trains_follows_sd_locked(sd_locked):
    model = build_model(small(f"model.sd_locked={sd_locked}"))
    trained = {name for name, parameter in model.unet.named_parameters() if parameter.requires_grad}
    decoder = {name for name, _ in model.unet.named_parameters() if name.startswith(("output_blocks.", "out."))}
    assert trained == (set() if sd_locked else decoder)
    assert all(parameter.requires_grad for parameter in model.control.parameters())


@pytest.mark.parametrize(("flag", "form"), [(True, torch.channels_last), (False, torch.contiguous_format)])
def test_channels_last(flag, form):
    model = build_model(small(f"model.channels_last={flag}"))
    kernels = [p for p in model.parameters() if p.dim() == 4 and p.shape[-1] == 3 and p.shape[1] > 1]
    assert kernels and all(parameter.is_contiguous(memory_format=form) for parameter in kernels)


@pytest.mark.parametrize("flag", [True, False])
def test_use_checkpoint_and_use_flash_attention_reach_both_networks(flag):
    parts, keys = ("unet_config", "control_stage_config"), ("use_checkpoint", "use_flash_attention")
    model = build_model(small(*(f"model.{part}.{key}={flag}" for part in parts for key in keys)))
    for net in (model.unet, model.control):
        assert (net.arch.use_checkpoint, net.arch.use_flash_attention) == (flag, flag)


def test_random_weights_are_said_to_be(caplog):
    with caplog.at_level(logging.WARNING):
        build_model(small())
    assert "model.unet_config.from_pretrained" in caplog.text


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.control_stage_config.num_heads=4", ["control_stage_config.num_heads is 4; expected 2"]),
        ("model.control_stage_config.model_channels=64", ["control_stage_config.model_channels is 64; expected 32"]),
        ("model.control_stage_config.in_channels=4", ["control_stage_config.in_channels is 4; expected 12"]),
        ("model.unet_config=null", ["model.unet_config is not given"]),
    ],
)
def test_unet_and_control_that_do_not_fit(override, words):
    with pytest.raises(ConfigError) as error:
        build_model(small(override))
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.first_stage_config.factor=4", ["model.unet_config.in_channels is 12; expected 48"]),
        ("model.cond_stage_config.dim=6", ["model.unet_config.context_dim is 8; expected 6"]),
        ("model.control_stage_config.hint_block_channels=[8,8,8]", ["shrinks the hint 4 times; expected 2 times"]),
        ("model.first_stage_config={_target_: ldm.models.autoencoder.AutoencoderKL, factor: 2}", ["factor"]),
        ("model.cond_stage_config=null", ["model.cond_stage_config is not given"]),
    ],
)
def test_stages_that_do_not_fit(override, words):
    with pytest.raises(ConfigError) as error:
        build_conditioning(small(override))
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_vae_without_weights_is_an_error():
    document = {"model": {"first_stage_config": {"target": "ldm.models.autoencoder.AutoencoderKL"}}}
    with torch.device("meta"), pytest.raises(ConfigError, match=r"model\.first_stage_config\.from_pretrained"):
        build_conditioning(config.compose(document).model)


def test_wrong_files(tmp_path):
    base(tmp_path / "wide.safetensors", model_channels=64)
    with pytest.raises(CheckpointError, match=r"is \[256, 64\], expected \[128, 32\]"):
        build_model(small(f"model.unet_config.from_pretrained={tmp_path}/wide.safetensors"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        build_model(small("model.unet_config.from_pretrained=nowhere.ckpt"))
    save_file({"cond_stage_model.transformer.x": torch.ones(1)}, tmp_path / "text.safetensors")
    with pytest.raises(ConfigError, match="holds cond_stage; expected a U-Net or a ControlNet"):
        build_model(small(f"model.ckpt_path={tmp_path}/text.safetensors"))


def test_a_size_that_does_not_fit_is_found_before_anything_is_loaded(tmp_path, monkeypatch):
    """A ControlNet of another width beside a whole U-Net: seconds, not the minutes of loading gigabytes first."""
    base(tmp_path / "base.safetensors")
    base(tmp_path / "wide.safetensors", model_channels=64)
    loaded = []
    monkeypatch.setattr(weights.Ready, "load", lambda ready: loaded.append(ready.report.path))
    settings = [f"model.unet_config.from_pretrained={tmp_path}/base.safetensors"]
    with pytest.raises(CheckpointError, match=r"wide\.safetensors has \d+ tensors of another shape than the model"):
        build_model(small(*settings, f"model.control_stage_config.from_pretrained_unet={tmp_path}/wide.safetensors"))
    assert loaded == []
    build_model(small(*settings, f"model.control_stage_config.from_pretrained_unet={tmp_path}/base.safetensors"))
    assert loaded == [f"{tmp_path}/base.safetensors"] * 2


@pytest.mark.parametrize(("training", "encoder"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_first_stage_without_a_precision_has_that_of_training(tmp_path, training, encoder):
    tiny.vae().save_pretrained(tmp_path)
    config = small()
    config["first_stage_config"] = {
        "_target_": "controlnet.conditioning.AutoencoderKL",
        "from_pretrained": str(tmp_path),
    }
    config["unet_config"]["in_channels"] = 4
    vae = build_conditioning(config, precision=training).first_stage.vae
    assert vae.encoder.conv_in.weight.dtype == encoder and vae.decoder.conv_in.weight.dtype == torch.float32
