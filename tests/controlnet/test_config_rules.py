"""Settings of other systems reach the key that is read, or are an error if they ask for a missing feature."""

import logging
import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import controlnet
from controlnet import build, config
from controlnet.config import ConfigError
from tests.controlnet import tiny_run
from tests.controlnet.test_config import NEMO, ORIGINAL


def nemo(*overrides):
    return config.compose(OmegaConf.create(NEMO), overrides)


def original(*overrides):
    return config.compose(OmegaConf.create(ORIGINAL), overrides)


@pytest.mark.parametrize(
    "override, path, value",
    [
        ("model.learning_rate=3e-5", "optim.lr", 3e-5),
        ("model.base_learning_rate=3e-5", "optim.lr", 3e-5),
        ("model.params.learning_rate=3e-5", "optim.lr", 3e-5),
        ("model.use_ema=True", "exp_manager.ema.enable", True),
        ("model.precision=bf16", "trainer.precision", "bf16"),
        ("trainer.max_time='00:01:00:00'", "exp_manager.max_time_per_run", "00:01:00:00"),
        ("model.first_stage_key=webp", "data.train.extensions.image", "webp"),
        ("model.control_key=depth.png", "data.train.extensions.hint", "depth.png"),
        ("model.cond_stage_key=blip.txt", "data.train.extensions.caption", "blip.txt"),
        ("model.control_key=depth", "model.control_key", "depth"),
    ],
)
def test_the_setting_reaches_the_key_that_is_read(override, path, value):
    assert OmegaConf.select(original(), path) != value
    assert OmegaConf.select(original(override), path) == value


def test_batch_entries_that_are_no_extension_leave_the_extensions():
    usual = config.compose({}).data.train.extensions
    assert original("model.first_stage_key=images").data.train.extensions == usual
    assert nemo("model.control_key=seg").data.train.extensions == usual
    explicit = original("data.train.extensions.image=png", "data.train.extensions.hint=webp")
    assert explicit.data.train.extensions.image == "png" and explicit.model.first_stage_key == "jpg"


def test_nemo_lets_optim_decide_the_learning_rate_and_says_so_once(caplog):
    with caplog.at_level(logging.INFO, logger="controlnet.config"):
        assert nemo().optim.lr == 2e-5
    assert [r.getMessage() for r in caplog.records] == [
        "model.learning_rate 0.0001 is not used: optim.lr 2e-05 decides, as in NeMo"
    ]


@pytest.mark.parametrize("name", ["megatron_fused_adam", "distributed_fused_adam"])
def test_another_name_of_the_optimizer_is_said_once(name, caplog):
    with caplog.at_level(logging.INFO, logger="controlnet.config"):
        assert original(f"optim.name={name}").optim.name == "fused_adam"
    assert [r.getMessage() for r in caplog.records] == [f"optim.name {name}: the fused AdamW of PyTorch"]


@pytest.mark.parametrize(
    "overrides, words",
    [
        (
            ["model.learning_rate=1e-5", "model.base_learning_rate=2e-5"],
            "model.learning_rate.*model.base_learning_rate",
        ),
        (["model.use_ema=True", "exp_manager.ema.enable=False"], "model.use_ema.*exp_manager.ema.enable"),
        (["model.precision=bf16", "trainer.precision=32"], "model.precision is bf16 and trainer.precision fp32"),
        (
            ["model.unet_config.unet_precision=fp16"],
            "model.unet_config.unet_precision is fp16 and trainer.precision fp32",
        ),
        (["model.channels=8"], "model.channels is 8 and model.unet_config.in_channels 4"),
        (["model.nsys_profile.enabled=True"], "nsys profile python -m controlnet.train"),
        (["model.tune=True", "model.inductor=True"], "model.tune and model.inductor"),
        (["model.tensor_model_parallel_size=2"], "tensor_model_parallel_size is 2; only 1 is possible"),
        (["model.fused_opt=False"], "model.fused_opt"),
        (["model.v_posterior=0.5"], "model.v_posterior"),
        (["model.control_key=jpg"], "model.first_stage_key.*three different names"),
        (["trainer.strategy=fsdp"], "trainer.strategy is 'fsdp'; ranks are data-parallel"),
        (["trainer.strategy=deepspeed_stage_2"], "trainer.strategy"),
        (["trainer.max_time=1h"], "expected DAYS:HOURS:MINUTES:SECONDS"),
        (
            ["exp_manager.checkpoint_callback_params={save_top_k: 3, monitor: reduced_train_loss}"],
            "the newest checkpoints are kept here, not the best: set monitor to null",
        ),
        (["optim.sched={name: CosineAnnealing, hold_steps: 10}"], "optim.sched.hold_steps is 10 with the decay"),
        (["model.unet_config.num_classes=10"], "num_classes is 10; expected.*sequential"),
        (["model.cond_stage_config.freeze=False"], "always frozen"),
        (["model.unet_config.offload_to_cpu=True"], "use_checkpoint saves memory"),
        (
            ["model.cond_stage_config._target_=sgm.modules.GeneralConditioner"],
            "sdxl_seg.yaml has them, with controlnet.conditioning.TextEncoders",
        ),
        (["model._target_=sgm.models.diffusion.DiffusionEngine"], "Stable Diffusion XL is configured"),
    ],
)
def test_what_asks_for_something_else_is_an_error_that_names_the_key(overrides, words):
    with pytest.raises(ConfigError, match=words):
        original(*overrides)


@pytest.mark.parametrize(
    "override",
    [
        "trainer.strategy=ddp",
        "trainer.strategy=ddp_find_unused_parameters_true",
        "trainer.strategy=auto",
        "+trainer.strategy={_target_: nemo.collections.nlp.parts.nlp_overrides.NLPDDPStrategy}",
        "trainer.strategy=null",
        "model.megatron_amp_O2=True",
        "model.tensor_model_parallel_size=1",
        "model.pipeline_model_parallel_size=1",
        "optim.overlap_grad_sync=True",
        "model.unet_config.use_fp16=True",
        "model.unet_config.unet_precision=fp32",
        "trainer.limit_val_batches=0",
        "model.channels=4",
        "model.cond_stage_config.freeze=True",
    ],
)
def test_what_asks_for_nothing_is_accepted_in_silence(override, caplog):
    with caplog.at_level(logging.INFO, logger="controlnet.config"):
        original(override)
    assert caplog.text == ""


def test_no_key_is_like_it():
    with pytest.raises(ConfigError, match=r"model\.wibble_wobble is not a known key, nor is any like it"):
        original("model.wibble_wobble=1")


def test_attention_is_fused_unless_the_file_says_otherwise():
    cfg = tiny_run.configuration("run")
    assert build.build_model(cfg.model).unet.arch.use_flash_attention is True
    cfg = tiny_run.configuration("run", "model.unet_config.use_flash_attention=False")
    assert build.build_model(cfg.model).unet.arch.use_flash_attention is False


class TestSecrets:
    """What comes from the environment is used, and never written down."""

    TREE = {
        "model": {
            "ckpt_path": "${oc.env:CN_TOKEN}",
            "seed": "${oc.decode:${oc.env:CN_SEED}}",
            "micro_batch_size": "${model.seed}",
        },
        "exp_manager": {"exp_dir": "/runs/${oc.env:CN_TOKEN}/${exp_manager.name}", "name": "${model.ckpt_path}-x"},
        "data": {"train": {"dataset_path": ["s3://${oc.env:CN_USER,nobody}/a.tar"]}},
    }

    def load(self, monkeypatch):
        monkeypatch.setenv("CN_TOKEN", "hunter2")
        monkeypatch.setenv("CN_SEED", "77")
        return config.compose(self.TREE)

    def test_values_are_read(self, monkeypatch):
        cfg = self.load(monkeypatch)
        assert cfg.model.ckpt_path == "hunter2" and cfg.model.seed == 77 and cfg.model.micro_batch_size == 77
        assert cfg.exp_manager.name == "hunter2-x" and cfg.exp_manager.exp_dir == "/runs/hunter2/hunter2-x"
        assert cfg.data.train.dataset_path[0] == "s3://nobody/a.tar"

    def test_references_are_saved(self, monkeypatch, tmp_path):
        cfg = self.load(monkeypatch)
        OmegaConf.save(cfg, tmp_path / "config.yaml")
        text = (tmp_path / "config.yaml").read_text()
        assert "hunter2" not in text and "77" not in text
        assert "${oc.env:CN_TOKEN}" in text and "${oc.env:CN_USER,nobody}" in text
        monkeypatch.setenv("CN_TOKEN", "changed")
        again = config.load(tmp_path / "config.yaml")
        assert again.exp_manager.exp_dir == "/runs/changed/changed-x" and again.model.micro_batch_size == 77

    def test_a_variable_that_is_not_set_is_an_error_where_it_is_needed(self, monkeypatch):
        monkeypatch.delenv("CN_TOKEN", raising=False)
        tree = {"data": {"train": {"dataset_path": "${oc.env:CN_TOKEN}"}}}
        with pytest.raises(ConfigError, match="data.train.dataset_path cannot be resolved.*CN_TOKEN"):
            config.compose(tree)
        assert config.compose(tree, sections=["model"]).model.seed == 1234

    def test_whole_sections_by_reference(self, monkeypatch):
        monkeypatch.setenv("CN_TOKEN", "hunter2")
        words = {"_target_": "controlnet.conditioning.WordEmbedder", "vocabulary": ["${oc.env:CN_TOKEN}"]}
        tree = {"run": words, "model": {"cond_stage_config": "${run}"}}
        cfg = config.compose(tree)
        assert cfg.model.cond_stage_config.vocabulary[0] == "hunter2"
        assert "hunter2" not in OmegaConf.to_yaml(cfg)


def test_a_file_that_contains_itself_or_grows_is_refused(tmp_path):
    levels = ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60))]
    for text in ("&a [*a]", "a: &a {b: *a}", "\n".join(levels), "[" * 500 + "]" * 500):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(ConfigError, match="nested"):
            config.load(tmp_path / "config.yaml")


@pytest.mark.parametrize(
    "override, words",
    [
        ("model.first_stage_config._target_=null", "model.first_stage_config._target_ is None"),
        ("model.unet_config._target_=3", "model.unet_config._target_ is 3"),
        ("model.cond_stage_config._target_=[a]", r"model.cond_stage_config._target_ is \['a'\]"),
        ("model.unet_config.from_pretrained=true", "model.unet_config.from_pretrained is True; expected a text"),
        ("model.cond_stage_config.max_length=abc", "model.cond_stage_config.max_length is 'abc'; expected an integer"),
        ("model.cond_stage_config.dim=-1", "model.cond_stage_config.dim is -1; expected an integer from 1"),
        ("model.control_stage_config.hint_channels=9223372036854775808", "model.control_stage_config.hint_channels"),
        ("data.train.filterings=-1", "data.train.filterings is -1; expected a mapping"),
        ("optim.betas=[-0.9,0.999]", "optim.betas"),
        ("model.linear_start=-1", "model.linear_start is -1; expected a number above 0 and below 1"),
        ("model.unet_config.num_res_blocks=1000000000000", "model.unet_config.num_res_blocks"),
        ("model.timesteps=0", "model.timesteps is 0; expected an integer from 1"),
        ("data.webdataset.shuffle_buffer=-1", "data.webdataset.shuffle_buffer is -1; expected an integer from 0"),
        ("model.ckpt_path=" + "x" * 5000, "model.ckpt_path has 5000 characters; expected at most 4096"),
        ("optim.lr=.nan", "optim.lr is nan; expected a number at least 0"),
    ],
)
def test_kinds_and_ranges(override, words):
    with pytest.raises(ConfigError, match=words):
        tiny_run.configuration("run", override)


def test_weights_beyond_the_memory_are_refused_before_they_are_made():
    wide = [f"model.{stage}.model_channels=16384" for stage in ("unet_config", "control_stage_config")]
    cfg = tiny_run.configuration("run", *wide, "model.unet_config.channel_mult=[64,64]")
    with pytest.raises(ConfigError, match=r"model.unet_config: these sizes make [\d,]+ weights, [\d,]+ GiB in float32"):
        build.build_model(cfg.model)


def test_a_loader_may_name_its_entries_as_the_configuration_does(tmp_path):
    class Named(tiny_run.Loader):
        def __iter__(self):
            for batch in super().__iter__():
                yield {"jpg": batch["images"], "txt": batch["captions"], "seg": batch["hint"], "keys": batch["keys"]}

    keys = ["model.first_stage_key=jpg", "model.cond_stage_key=txt", "model.control_key=seg"]
    named = tiny_run.trainer(tiny_run.configuration(tmp_path / "named", *keys), loader=Named)
    plain = tiny_run.trainer(tiny_run.configuration(tmp_path / "plain", *keys))
    named.fit()
    plain.fit()
    theirs = tiny_run.weights(plain)
    assert all(tensor.equal(theirs[name]) for name, tensor in tiny_run.weights(named).items())


@pytest.mark.parametrize("text", [NEMO, ORIGINAL], ids=["nemo", "original"])
def test_every_key_of_other_systems_files_stands_in_the_page(text):
    page = (Path(controlnet.__file__).parents[1] / "docs" / "configuration.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `([\w.]+)` \|", page, flags=re.MULTILINE))
    tree = config.canonical_node(OmegaConf.to_container(OmegaConf.create(text)))

    def leaves(node, path=""):
        for key, value in node.items():
            full = f"{path}{key}"
            if isinstance(value, dict) and full not in listed:  # what is listed as a whole has its reason as a whole
                yield from leaves(value, f"{full}.")
            elif key != "_target_":
                yield full

    found = list(leaves(tree))
    assert len(found) > 30 and [path for path in found if path not in listed] == []
