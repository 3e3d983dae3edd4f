"""Configurations in NeMo's and the original's layout: read as they are, checked key by key."""

import inspect
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest

import controlnet
from controlnet import build, config
from controlnet.config import ConfigError
from controlnet.config.checks import every_key
from controlnet.config.stages import ARGUMENTS, CONTROLLED, TARGETS

RECIPE = Path(controlnet.__file__).parent / "configs" / "sd15_seg.yaml"
NEMO_NAMES = "nemo.collections.multimodal"

# Every key of NeMo's ControlNet configuration, with the values it has there.
NEMO = f"""
trainer: {{devices: 2, num_nodes: 1, accelerator: gpu, precision: 16, logger: False, enable_checkpointing: False,
  use_distributed_sampler: True, max_epochs: 3, max_steps: -1, log_every_n_steps: 10, accumulate_grad_batches: 1,
  gradient_clip_val: 1.0, benchmark: False, enable_model_summary: True, limit_val_batches: 0}}
exp_manager:
  explicit_log_dir: null
  exp_dir: null
  name: controlnet
  create_wandb_logger: False
  wandb_logger_kwargs: {{project: stable-diffusion, group: controlnet, name: controlnet-v1.5, resume: True}}
  create_checkpoint_callback: True
  create_tensorboard_logger: True
  checkpoint_callback_params: {{save_top_k: -1, every_n_train_steps: 5000, every_n_epochs: 0,
    monitor: reduced_train_loss, filename: 'controlnet--{{reduced_train_loss:.2f}}-{{step}}-{{consumed_samples}}'}}
  resume_if_exists: True
  resume_ignore_no_checkpoint: True
  resume_from_checkpoint: ${{model.resume_from_checkpoint}}
  ema: {{enable: False, decay: 0.9999, validate_original_weights: False, every_n_steps: 1, cpu_offload: False}}
model:
  precision: ${{trainer.precision}}
  micro_batch_size: 4
  global_batch_size: 8
  linear_start: 0.00085
  linear_end: 0.0120
  num_timesteps_cond: 1
  log_every_t: 200
  timesteps: 1000
  first_stage_key: images
  cond_stage_key: captions
  control_key: hint
  image_size: 64
  channels: 4
  cond_stage_trainable: false
  conditioning_key: crossattn
  monitor: val/loss_simple_ema
  scale_factor: 0.18215
  use_ema: False
  scale_by_std: False
  ckpt_path:
  ignore_keys: [ ]
  parameterization: eps
  clip_denoised: True
  load_only_unet: False
  cosine_s: 8e-3
  given_betas:
  original_elbo_weight: 0
  v_posterior: 0
  l_simple_weight: 1
  use_positional_encodings: False
  learn_logvar: False
  logvar_init: 0
  beta_schedule: linear
  loss_type: l2
  learning_rate: 1.0e-04
  concat_mode: True
  cond_stage_forward:
  text_embedding_dropout_rate: 0.0
  fused_opt: True
  inductor: False
  inductor_cudagraphs: False
  capture_cudagraph_iters: -1
  channels_last: True
  only_mid_control: False
  sd_locked: True
  control_stage_config:
    _target_: {NEMO_NAMES}.models.controlnet.controlnet.ControlNet
    params: {{from_pretrained_unet: /ckpts/v1-5-pruned.ckpt, from_NeMo: True, image_size: 32, in_channels: 4,
      hint_channels: 3, model_channels: 320, attention_resolutions: [4, 2, 1], num_res_blocks: 2,
      channel_mult: [1, 2, 4, 4], num_heads: 8, use_spatial_transformer: True, use_linear_in_transformer: False,
      transformer_depth: 1, context_dim: 768, use_checkpoint: False, legacy: False, use_flash_attention: False}}
  unet_config: {{_target_: {NEMO_NAMES}.models.controlnet.controlnet.ControlledUnetModel,
    from_pretrained: /ckpts/v1-5-pruned.ckpt, from_NeMo: True, image_size: 32, in_channels: 4, out_channels: 4,
    model_channels: 320, attention_resolutions: [4, 2, 1], num_res_blocks: 2, channel_mult: [1, 2, 4, 4], num_heads: 8,
    use_spatial_transformer: True, transformer_depth: 1, context_dim: 768, use_checkpoint: False, legacy: False,
    use_flash_attention: False}}
  first_stage_config:
    _target_: {NEMO_NAMES}.models.stable_diffusion.ldm.autoencoder.AutoencoderKL
    from_pretrained: /ckpts/vae.bin
    embed_dim: 4
    monitor: val/rec_loss
    ddconfig: {{double_z: true, z_channels: 4, resolution: 256, in_channels: 3, out_ch: 3, ch: 128,
      ch_mult: [1, 2, 4, 4], num_res_blocks: 2, attn_resolutions: [], dropout: 0.0}}
    lossconfig: {{target: torch.nn.Identity}}
  cond_stage_config: {{_target_: {NEMO_NAMES}.modules.stable_diffusion.encoders.modules.FrozenCLIPEmbedder,
    version: openai/clip-vit-large-patch14, device: cuda, max_length: 77}}
  data:
    num_workers: 16
    synthetic_data: False
    synthetic_data_length: 10000
    train:
      dataset_path: [/datasets/coco-stuff/coco-stuff-tarfiles/wdinfo-coco-stuff.pkl]
      augmentations: {{resize_smallest_side: 512, center_crop_h_w: "512, 512", horizontal_flip: False}}
      filterings:
    webdataset: {{infinite_sampler: False, local_root_path: /datasets/coco-stuff/coco-stuff-tarfiles}}
  optim:
    name: fused_adam
    lr: 2e-5
    weight_decay: 0.
    betas: [0.9, 0.999]
    sched: {{name: WarmupHoldPolicy, warmup_steps: 0, hold_steps: 10000000000000}}
  nsys_profile: {{enabled: False, start_step: 10, end_step: 10, ranks: [0], gen_shape: False}}
  image_logger: {{batch_frequency: 1000, max_images: 4}}
  seed: 1234
  resume_from_checkpoint: null
  apex_transformer_log_level: 30
  gradient_as_bucket_view: True
"""

# The original repository's configuration of the same model.
ORIGINAL_NET = """image_size: 32, in_channels: 4, model_channels: 320, attention_resolutions: [4, 2, 1],
        num_res_blocks: 2, channel_mult: [1, 2, 4, 4], num_heads: 8, use_spatial_transformer: True,
        transformer_depth: 1, context_dim: 768, use_checkpoint: True, legacy: False"""
ORIGINAL = f"""
model:
  target: cldm.cldm.ControlLDM
  params:
    linear_start: 0.00085
    linear_end: 0.0120
    num_timesteps_cond: 1
    log_every_t: 200
    timesteps: 1000
    first_stage_key: "jpg"
    cond_stage_key: "txt"
    control_key: "hint"
    image_size: 64
    channels: 4
    cond_stage_trainable: false
    conditioning_key: crossattn
    monitor: val/loss_simple_ema
    scale_factor: 0.18215
    use_ema: False
    only_mid_control: False
    control_stage_config:
      target: cldm.cldm.ControlNet
      params: {{hint_channels: 3, {ORIGINAL_NET}}}
    unet_config:
      target: cldm.cldm.ControlledUnetModel
      params: {{out_channels: 4, {ORIGINAL_NET}}}
    first_stage_config:
      target: ldm.models.autoencoder.AutoencoderKL
      params:
        embed_dim: 4
        monitor: val/rec_loss
        ddconfig: {{double_z: true, z_channels: 4, resolution: 256, in_channels: 3, out_ch: 3, ch: 128,
          ch_mult: [1, 2, 4, 4], num_res_blocks: 2, attn_resolutions: [], dropout: 0.0}}
        lossconfig: {{target: torch.nn.Identity}}
    cond_stage_config: {{target: ldm.modules.encoders.modules.FrozenCLIPEmbedder}}
"""


@pytest.fixture
def load(tmp_path):
    def loader(text, *overrides):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return config.load(path, overrides)

    return loader


def test_nemo_file_runs_as_it_is(load):
    c = load(NEMO)
    assert c.trainer.precision == "fp16"
    assert c.data.num_workers == 16 and c.data.train.augmentations.center_crop_h_w == "512, 512"
    assert c.optim.lr == 2e-5 and c.optim.eps == 1e-8 and c.optim.sched.name == "WarmupHoldPolicy"
    assert "data" not in c.model and "optim" not in c.model
    assert c.exp_manager.resume_from_checkpoint is None
    control = c.model.control_stage_config
    assert "params" not in control and control.hint_channels == 3 and control.from_NeMo is True
    targets = {stage: c.model[stage]._target_ for stage in ("unet_config", "control_stage_config")}
    assert targets == {
        "unet_config": "controlnet.model.unet.UNet",
        "control_stage_config": "controlnet.model.controlnet.ControlNet",
    }
    assert c.model.first_stage_config._target_ == "controlnet.conditioning.AutoencoderKL"
    assert c.model.cond_stage_config._target_ == "controlnet.conditioning.CLIPTextEncoder"


def test_original_file_runs_as_it_is(load):
    c = load(ORIGINAL)
    assert c.model._target_ == "controlnet.model.controlled.ControlledUNet"
    assert c.model.unet_config.out_channels == 4 and c.model.unet_config.use_checkpoint is True
    assert c.model.first_stage_config.ddconfig.ch == 128
    assert c.model.parameterization == "eps" and c.model.sd_locked is True


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("model.unet_config.use_checkpoint=True", "model.unet_config.use_checkpoint", True),
        ("trainer.precision=bf16", "trainer.precision", "bf16"),
        ("model.unet_config.use_flash_attention=True", "model.unet_config.use_flash_attention", True),
        ("model.control_stage_config.use_flash_attention=True", "model.control_stage_config.use_flash_attention", True),
        (
            "model.control_stage_config.params.use_flash_attention=True",
            "model.control_stage_config.use_flash_attention",
            True,
        ),
        ("model.unet_config.params.use_flash_attention=True", "model.unet_config.use_flash_attention", True),
        ("model.channels_last=True", "model.channels_last", True),
        ("model.inductor=True", "model.inductor", True),
        ("+model.data.num_workers=3", "data.num_workers", 3),
        ("++data.num_workers=3", "data.num_workers", 3),
        ("model.optim.sched.warmup_steps=7", "optim.sched.warmup_steps", 7),
        (
            "model.control_stage_config.params.from_pretrained_unet=null",
            "model.control_stage_config.from_pretrained_unet",
            None,
        ),
        ("data.train.dataset_path=[a.tar,b.tar]", "data.train.dataset_path", ["a.tar", "b.tar"]),
        ("exp_manager.name=a=b", "exp_manager.name", "a=b"),
        ("model.resume_from_checkpoint=x", "exp_manager.resume_from_checkpoint", "x"),
        (
            "exp_manager.exp_dir=${model.data.webdataset.local_root_path}",
            "exp_manager.exp_dir",
            "/datasets/coco-stuff/coco-stuff-tarfiles",
        ),
    ],
)
def test_override(load, override, path, value):
    from omegaconf import OmegaConf

    assert OmegaConf.select(load(NEMO, override), path) == value


@pytest.mark.parametrize("original", ["unet_config", "control_stage_config"])
def test_override_reaches_the_original_layout(load, original):
    c = load(
        ORIGINAL, f"model.{original}.use_flash_attention=True", f"model.params.{original}.params.use_checkpoint=False"
    )
    assert c.model[original].use_flash_attention is True and c.model[original].use_checkpoint is False


@pytest.mark.parametrize(
    ("spelling", "name"),
    [(16, "fp16"), ("16-mixed", "fp16"), ("bf16-mixed", "bf16"), ("bf16", "bf16"), (32, "fp32"), ("32-true", "fp32")],
)
def test_precision_spellings(load, spelling, name):
    assert load(NEMO, f"trainer.precision={spelling}").trainer.precision == name
    assert config.precision(name) == name


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "model.unet_config.use_chekpoint=True",
            ["model.unet_config.use_chekpoint", "model.unet_config.use_checkpoint"],
        ),
        ("model.chanels_last=True", ["model.chanels_last", "model.channels_last"]),
        ("trianer.max_steps=1", ["trianer", "trainer"]),
        ("data.webdataset.infinit_sampler=True", ["infinit_sampler", "data.webdataset.infinite_sampler"]),
        ("model.cond_stage_config.max_lenght=3", ["max_lenght", "model.cond_stage_config.max_length"]),
        ("trainer.precision=bf61", ["trainer.precision", "'bf61'", "bf16", "nearest: bf16"]),
        ("trainer.accelerator=gpuu", ["trainer.accelerator", "'gpuu'", "nearest: gpu"]),
        ("model.parameterization=epsilon", ["model.parameterization", "'epsilon'", "eps, v, x0"]),
        ("trainer.max_steps=ten", ["trainer.max_steps", "'ten'", "an integer"]),
        ("trainer.max_steps=True", ["trainer.max_steps", "True", "an integer"]),
        ("optim.lr=fast", ["optim.lr", "'fast'", "a number"]),
        ("model.sd_locked=1", ["model.sd_locked", "1", "true or false"]),
        ("optim.betas=0.9", ["optim.betas", "0.9", "a list"]),
        ("trainer.gradient_clip_val=[1]", ["trainer.gradient_clip_val", "a number"]),
        ("trainer=3", ["trainer", "3", "a mapping"]),
        ("model.unet_config=3", ["model.unet_config", "3", "a mapping"]),
        ("model.loss_type=l1", ["model.loss_type", "'l1'", "'l2'"]),
        ("model.conditioning_key=concat", ["model.conditioning_key", "cross-attention"]),
        ("model.seed=???", ["model.seed", "???"]),
        ("model.seed=${nowhere}", ["nowhere"]),
        ("model.seed", ["'model.seed'", "key.subkey=value"]),
        ("model.seed.deep.x=1", ["model.seed", "'deep'", "an integer"]),
        (
            "model.unet_config._target_=cldm.cldm.ControledUnetModel",
            ["cldm.cldm.ControledUnetModel", "cldm.cldm.ControlledUnetModel"],
        ),
        ("model.unet_config.target=cldm.cldm.ControlNet", ["model.unet_config", "controlnet.model.unet.UNet"]),
        (
            f"model.cond_stage_config._target_={NEMO_NAMES}.modules.stable_diffusion.encoders.modules.FrozenMegatronCLIPEmbedder",
            ["FrozenMegatronCLIPEmbedder", "transformers folder"],
        ),
    ],
)
def test_bad_override_is_one_clear_error(load, override, words):
    with pytest.raises(ConfigError) as error:
        load(NEMO, override)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- 1\n- 2\n", ["ListConfig", "mapping"]),
        ("model: {a: [", ["not a YAML"]),
        *((f"a: !!{tag} ''", ["not a YAML", "kind that its tag names"]) for tag in ("int", "float", "timestamp")),
        ("model: {unet_config: {params: {a: 1}, a: 2}}", ["model.unet_config.a", "once"]),
        ("model: {optim: {lr: 1}}\noptim: {lr: 2}", ["optim", "model.optim"]),
        ("model: {first_stage_config: {factor: 4}}", ["first_stage_config", "_target_", "SpaceToDepth"]),
    ],
)
def test_bad_file_is_one_clear_error(load, text, words):
    with pytest.raises(ConfigError) as error:
        load(text)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("value", ["!!int ''", "!!timestamp x", "[" * 3000, "{a: 1, a"])
def test_an_override_that_is_no_yaml_is_one_clear_error(load, value):
    with pytest.raises(ConfigError, match="override .trainer.max_steps=.* cannot be applied"):
        load(NEMO, f"trainer.max_steps={value}")


def test_missing_file():
    with pytest.raises(FileNotFoundError):
        config.load("nowhere.yaml")


def test_what_has_no_effect_is_silent_and_cannot_be_read(load, tmp_path, caplog):
    from omegaconf import OmegaConf

    with caplog.at_level(logging.INFO, logger="controlnet.config"):
        c = load(NEMO, "model.learning_rate=2e-5")
        OmegaConf.save(c, tmp_path / "saved.yaml")
        config.load(tmp_path / "saved.yaml")
    assert caplog.text == ""
    assert "logger" not in c.trainer and "use_ema" not in c.model and "image_size" not in c.model.unet_config


def test_the_tables_name_real_classes_and_their_arguments():
    assert set(ARGUMENTS) == set(build.CLASSES) and set(TARGETS.values()) <= {*ARGUMENTS, CONTROLLED}
    for target, keys in ARGUMENTS.items():
        parameters = inspect.signature(build.CLASSES[target]).parameters
        read = {name for name, key in keys.items() if not key.silent and not key.only}
        assert read <= set(parameters) and set(parameters) <= set(keys), target
        for name, parameter in parameters.items():
            default = ... if parameter.default is parameter.empty else parameter.default
            if name in read and name != "precision":  # without one, `build_conditioning` gives trainer.precision
                assert keys[name].default == (list(default) if isinstance(default, tuple) else default), (target, name)


def test_what_no_code_reads_is_silent():
    package = Path(controlnet.__file__).parent
    tables = ("keys.py", "stages.py")
    code = "\n".join(path.read_text() for path in package.rglob("*.py") if path.name not in tables)
    words = set(re.findall(r"\w+", code))
    unread = [path for path, key in every_key() if path.rpartition(".")[2] not in words]
    known = dict(every_key())
    assert [path for path in unread if not (known[path].silent or known[path].only)] == []


def test_instantiate_drops_what_has_no_effect_and_refuses_the_rest():
    node = {"target": "controlnet.conditioning.SpaceToDepth", "params": {"factor": 4, "monitor": "x"}}
    assert build.instantiate(node).factor == 4
    with pytest.raises(ConfigError, match="factr.*nearest is model.first_stage_config.factor"):
        build.instantiate({"_target_": "controlnet.conditioning.SpaceToDepth", "factr": 4})
    with pytest.raises(ConfigError, match="os.system"):
        build.instantiate({"_target_": "os.system", "command": "true"})
    with pytest.raises(ConfigError, match="SpaceToDepth wants a value for factor"):
        build.instantiate({"_target_": "controlnet.conditioning.SpaceToDepth"})
    with pytest.raises(ConfigError, match="UNet wants a value for .*model_channels"):
        build.instantiate({"_target_": "controlnet.model.unet.UNet", "in_channels": 4})
    with pytest.raises(ConfigError, match="no _target_"):
        build.instantiate({"factor": 4})


def test_original_openclip_target_keeps_its_own_default(load):
    text = "model: {cond_stage_config: {target: ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder}}"
    assert load(text).model.cond_stage_config.layer == "penultimate"


def test_a_saved_configuration_loads_to_the_same(load, tmp_path):
    from omegaconf import OmegaConf

    first = load(NEMO, "trainer.precision=bf16")
    OmegaConf.save(first, tmp_path / "saved.yaml")
    assert config.load(tmp_path / "saved.yaml") == first


def test_recipe_is_the_document_with_its_values(load):
    recipe, nemo = config.load(RECIPE), load(NEMO)
    for section in ("optim", "data"):
        theirs = dict(nemo[section])
        for key in theirs:
            if key != "sched":
                assert recipe[section][key] == theirs[key], (section, key)
    remarks = {"from_NeMo", "image_size", "use_flash_attention"}
    for stage in ("unet_config", "control_stage_config"):
        theirs = {k: v for k, v in nemo.model[stage].items() if k not in remarks}
        assert {k: v for k, v in recipe.model[stage].items() if k not in remarks} == theirs


def test_without_omegaconf_the_message_says_what_to_install():
    code = (
        "import sys; sys.modules['omegaconf'] = None\n"
        "from controlnet import config\n"
        "try: config.load('x.yaml')\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "omegaconf is not installed" in done.stdout and "pip install omegaconf" in done.stdout


@pytest.mark.parametrize(
    "old, new",
    [
        ("controlnet.unet.UNet", "controlnet.model.unet.UNet"),
        ("controlnet.controlnet.ControlNet", "controlnet.model.controlnet.ControlNet"),
        ("controlnet.diffusion.ControlledUNet", "controlnet.model.controlled.ControlledUNet"),
        ("controlnet.sdxl.TextEncoders", "controlnet.conditioning.TextEncoders"),
    ],
)
def test_names_from_before_the_modules_moved_are_aliases(old, new):
    assert config.canonical_target(old) == new
    assert config.canonical_target(new) == new


def test_modules_are_found_under_the_names_that_they_had():
    from controlnet.controlnet import ControlNet
    from controlnet.diffusion import ControlledUNet, NoiseSchedule
    from controlnet.sdxl import TextEncoders
    from controlnet.tar import members

    from controlnet import command, conditioning, extras, opening, training_state
    from controlnet.build.opening import open_origin

    assert TextEncoders is conditioning.TextEncoders
    assert opening.open_origin is open_origin
    assert {command.parser.__module__, extras.require.__module__, members.__module__} == {
        "controlnet.common.command",
        "controlnet.common.extras",
        "controlnet.common.tar",
    }
    assert ControlNet is controlnet.ControlNet
    assert ControlledUNet.__module__ == "controlnet.model.controlled"
    assert NoiseSchedule.__module__ == "controlnet.model.diffusion"
    assert training_state.MANIFEST == "manifest.json"
