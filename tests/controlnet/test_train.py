"""The training loop on one rank: arithmetic of a step, what is trained, precision, bad numbers, signals, reports."""

import functools
import json
import signal
import sys
import time
import types

import numpy as np
import pytest
import torch
from PIL import Image

from cnkernels import cache, findings, machine, tune
from cnkernels.tune import first_call
from controlnet import train
from controlnet.config import ConfigError
from controlnet.training import compiling
from controlnet.training.distributed import StopRequest, World, start
from controlnet.training.randomness import RandomStreams
from controlnet.training.trainer import run_folder
from tests.controlnet import tiny_run
from tests.controlnet.tiny_run import rows

# Both networks with one level, of every kind of block one: for what takes long.
ONE_LEVEL = [
    f"model.{part}.{key}=[1]"
    for part in ("unet_config", "control_stage_config")
    for key in ("channel_mult", "attention_resolutions")
]


def fit(folder, *overrides, **kwargs):
    trainer = tiny_run.trainer(tiny_run.configuration(folder, *overrides), **kwargs)
    trainer.fit()
    return trainer


def checkpoint_names(folder):
    return sorted(path.name for path in (folder / "checkpoints").glob("*"))


class TestStep:
    def test_micro_batches_make_the_step_of_the_whole_batch(self, tmp_path):
        """4 micro-batches of 1 and one batch of 4 see the same samples and, drawn per sample, the same noise."""

        class PerSample(RandomStreams):
            def noise_and_timesteps(self, latents, timesteps):
                draws = [super(PerSample, self).noise_and_timesteps(one[None], timesteps) for one in latents]
                return tuple(torch.cat(parts) for parts in zip(*draws, strict=True))

        runs = []
        for micro in (1, 4):
            batch = [f"model.micro_batch_size={micro}", "model.global_batch_size=4"]
            cfg = tiny_run.configuration(tmp_path / str(micro), *batch, *tiny_run.LINEAR)
            run = tiny_run.trainer(cfg, streams=PerSample(1, 0, "cpu"))
            run.fit()
            runs.append(run)
        assert [run.accumulate for run in runs] == [4, 1]
        assert [run.images_seen for run in runs] == [12, 12]
        tiny_run.assert_same_weights(runs[0], tiny_run.weights(runs[1]))

    def test_each_update_has_its_rate(self, tmp_path):
        fit(tmp_path, "optim.sched.warmup_steps=2", "trainer.accumulate_grad_batches=2")
        assert [row["lr"] for row in rows(tmp_path)] == [5e-4, 1e-3, 1e-3]


class TestWhatIsTrained:
    @pytest.mark.parametrize(
        "override", ["model.sd_locked=True", "model.sd_locked=False", "model.only_mid_control=True"]
    )
    def test_exactly_what_requires_a_gradient_changes(self, tmp_path, override):
        run = tiny_run.trainer(tiny_run.configuration(tmp_path, "trainer.max_steps=1", override))
        before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
        run.fit()
        decoder = ("unet.output_blocks.", "unet.out.")
        for name, parameter in run.model.named_parameters():
            trained = name.startswith("control.") or ("sd_locked=False" in override and name.startswith(decoder))
            if "only_mid" in override and name.startswith("control.zero_convs."):
                trained = False
            assert parameter.requires_grad == trained, name
            assert torch.equal(parameter, before[name]) != trained, name
            # A gradient for every trained parameter is what DDP needs to do without a search for unused ones.
            assert (parameter.grad is not None) == trained, name

    def test_the_untrained_control_changes_nothing_and_learns(self, tmp_path):
        run = tiny_run.trainer(tiny_run.configuration(tmp_path, "trainer.max_steps=4"), awake=False)
        with torch.no_grad():  # a U-Net whose output is not the zero of its own last layer
            run.model.unet.out[-1].weight.normal_(std=0.1)
        _, hint, context, noise, t = run._inputs(next(iter(run.make_loader(None))))
        with torch.no_grad():
            assert torch.equal(run.model(noise, t, context, hint), run.model(noise, t, context))
        run.fit()
        assert rows(tmp_path)[-1]["control_sensitivity"] > 0

    def test_the_loss_of_one_batch_falls(self, tmp_path):
        class OneBatch(tiny_run.Loader):
            def __iter__(self):
                for batch in super().__iter__():
                    self.next = 1
                    yield batch
                    self.next = 0

        class SameNoise(RandomStreams):
            def noise_and_timesteps(self, latents, timesteps):
                self.generator.manual_seed(0)
                return super().noise_and_timesteps(latents, timesteps)

        fit(
            tmp_path,
            "trainer.max_steps=30",
            "optim.lr=3e-3",
            "model.text_embedding_dropout_rate=0",
            loader=OneBatch,
            streams=SameNoise(0, 0, "cpu"),
        )
        losses = [row["loss"] for row in rows(tmp_path)]
        assert losses[-1] < 0.6 * losses[0]


class TestRandomness:
    def test_ranks_draw_differently_and_start_equal(self, tmp_path):
        world = [World(rank, 1, rank, torch.device("cpu")) for rank in (0, 1)]
        cfg = tiny_run.configuration(tmp_path)
        runs = [tiny_run.trainer(cfg, each) for each in world]
        for name, tensor in tiny_run.weights(runs[0]).items():
            assert torch.equal(tensor, tiny_run.weights(runs[1])[name])
        latents = torch.zeros(64, 3, 4, 4)
        (noise, t), (other_noise, other_t) = (run.streams.noise_and_timesteps(latents, 1000) for run in runs)
        assert not torch.isclose(noise, other_noise).any()
        assert (t == other_t).float().mean() < 0.1
        drops = [run.streams.dropped_prompts(64, 0.5) for run in runs]
        assert not torch.equal(*drops)

    def test_streams_are_of_their_distributions(self):
        streams = RandomStreams(3, 0, "cpu")
        noise, t = streams.noise_and_timesteps(torch.zeros(20000, 1, 2, 2), 10)
        assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
        assert torch.bincount(t, minlength=10).min() > 1800 and t.max() == 9
        assert abs(streams.dropped_prompts(20000, 0.3).float().mean() - 0.3) < 0.02
        assert streams.dropped_prompts(2, 0.0).tolist() == [False, False]
        assert streams.dropped_prompts(2, 1.0).tolist() == [True, True]


class TestPrecision:
    @pytest.mark.parametrize("name, dtype", [("bf16", torch.bfloat16), ("16-mixed", torch.float16)])
    @pytest.mark.parametrize("sd_locked", [True, False])
    def test_low_precision_follows_float32(self, tmp_path, name, dtype, sd_locked):
        low = fit(tmp_path / "low", f"trainer.precision={name}", f"model.sd_locked={sd_locked}")
        fit(tmp_path / "full", f"model.sd_locked={sd_locked}")
        for parameter in low.model.parameters():
            assert parameter.dtype == (torch.float32 if parameter.requires_grad else dtype) or not isinstance(
                parameter, torch.nn.Parameter
            )
        for tensor in tiny_run.weights(low).values():
            assert tensor.dtype == torch.float32
        # bf16 keeps 8 bits: about 0.4 % a rounding, a few dozen of them in a row.
        for got, expected in zip(rows(tmp_path / "low"), rows(tmp_path / "full"), strict=True):
            assert got["loss"] == pytest.approx(expected["loss"], rel=0.03)
            assert got["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=0.1)
        assert ("loss_scale" in rows(tmp_path / "low")[0]) == (dtype == torch.float16)

    def test_an_overflow_lowers_the_scale_and_is_not_a_step(self, tmp_path):
        run = tiny_run.trainer(tiny_run.configuration(tmp_path, "trainer.precision=16", "trainer.max_skipped_steps=1"))
        run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
        run.fit()
        assert run.skipped > 1 and run.step == 3
        assert rows(tmp_path)[-1]["loss_scale"] == 2.0 ** (40 - run.skipped)
        assert all(torch.isfinite(tensor).all() for tensor in tiny_run.weights(run).values())


class TestVariants:
    """Ways to compute the same thing: equal to the plain run up to rounding."""

    @pytest.mark.parametrize(
        "overrides",
        [
            ["model.channels_last=True"],
            ["model.unet_config.use_checkpoint=True", "model.control_stage_config.use_checkpoint=True"],
            ["model.unet_config.params.use_flash_attention=True"],
        ],
        ids=["channels_last", "use_checkpoint", "use_flash_attention"],
    )
    def test_same_result(self, tmp_path, overrides):
        plain = fit(tmp_path / "plain", *tiny_run.LINEAR)
        variant = fit(tmp_path / "variant", *tiny_run.LINEAR, *overrides)
        tiny_run.assert_same_weights(plain, tiny_run.weights(variant))

    def test_an_optimizer_of_another_package(self, tmp_path, monkeypatch):
        """Bad steps are left out though its kernel does not read found_inf, as that of 8-bit AdamW; and it resumes."""

        class AdamW8bit(torch.optim.AdamW):
            _step_supports_amp_scaling = False

        package, module = types.ModuleType("bitsandbytes"), types.ModuleType("bitsandbytes.optim")
        module.AdamW8bit = AdamW8bit
        monkeypatch.setitem(sys.modules, "bitsandbytes", package)
        monkeypatch.setitem(sys.modules, "bitsandbytes.optim", module)
        plain = fit(tmp_path / "plain", *tiny_run.LINEAR, loader=Poisoned)
        options = [*tiny_run.LINEAR, "optim.name=adamw_8bit", "exp_manager.resume_if_exists=True"]
        fit(tmp_path / "variant", *options, "trainer.max_steps=2", loader=Poisoned)
        variant = fit(tmp_path / "variant", *options, loader=Poisoned)
        assert isinstance(variant.optimizer, AdamW8bit) and variant.skipped == plain.skipped == 1
        tiny_run.assert_same_weights(plain, tiny_run.weights(variant))

    @pytest.mark.skipif(torch.cuda.is_available(), reason="looks at what is measured on a CPU")
    def test_tune_measures_the_first_step_and_changes_nothing(self, tmp_path, monkeypatch):
        monkeypatch.setenv("CNKERNELS_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("cnkernels.check.ensure", lambda ops, dtypes, device: [])  # has tests of its own
        monkeypatch.setattr(first_call, "tune", functools.partial(tune.tune, rounds=1))
        findings.forget()
        plain = fit(tmp_path / "plain", *tiny_run.LINEAR, *ONE_LEVEL)
        variant = fit(tmp_path / "variant", *tiny_run.LINEAR, *ONE_LEVEL, "model.tune=True")
        tiny_run.assert_same_weights(plain, tiny_run.weights(variant))
        record = cache.read(machine.identity(torch.device("cpu")))
        monkeypatch.undo()
        findings.forget()
        directions = {(op, e["direction"]) for op, entries in record["choices"].items() for e in entries}
        assert directions >= {("attention", "forward"), ("attention", "backward"), ("group_norm_silu", "backward")}

    def test_inductor_compiles_each_part_once_for_all_sizes(self, tmp_path, monkeypatch):
        """Traced as a whole in the first step; what a compiler makes of the graph has tests in test_compile.py."""
        compiled, handed_out = [], []

        class Wide(tiny_run.Loader):
            """Every other batch is wider."""

            def __iter__(self):
                for batch in super().__iter__():
                    if self.next % 2 == 0:
                        batch |= {
                            name: torch.cat([batch[name], batch[name][..., :8]], 3) for name in ("images", "hint")
                        }
                    handed_out.append(tuple(batch["hint"].shape[2:]))
                    yield batch

        def compile_without_inductor(module, **options):
            def backend(graph, inputs):
                compiled.append((type(module).__name__, len(handed_out)))
                return graph.forward

            module._compiled_call_impl = torch.compile(module._call_impl, backend=backend, fullgraph=True)

        monkeypatch.setattr(torch.nn.Module, "compile", compile_without_inductor)
        every = [f"trainer.{key}_every_n_steps=3" for key in ("log", "control_sensitivity")]
        options = [*tiny_run.LINEAR, *every, *ONE_LEVEL, "data.train.buckets.sizes=['16, 16', '16, 24']"]
        plain = fit(tmp_path / "plain", *options, loader=Wide)
        handed_out.clear()
        variant = fit(tmp_path / "variant", *options, "model.inductor=True", loader=Wide)
        tiny_run.assert_same_weights(plain, tiny_run.weights(variant))
        assert handed_out == [(16, 16), (16, 24), (16, 16)]
        assert compiled == [("DiffusionLoss", 1), ("Sensitivity", 1)]

    def test_a_compilation_says_that_it_goes_on(self, caplog):
        caplog.set_level("INFO")
        with compiling.announced(every=0.01):
            while len(caplog.records) < 3:
                time.sleep(0.01)
        messages = [record.getMessage() for record in caplog.records]
        assert messages[0].startswith("compiling the training step, once, which takes minutes")
        assert messages[1].startswith("still compiling the training step: 0 s so far")
        assert messages[-1] == "compiled the training step in 0 s"


class Poisoned(tiny_run.Loader):
    """Images of batches 1 and, with `forever`, all later ones are NaN."""

    forever = False

    def __iter__(self):
        for batch in super().__iter__():
            if self.next == 2 or (self.forever and self.next > 2):
                batch["images"][0, 0, 0, 0] = float("nan")
            yield batch


class TestBadNumbers:
    def test_a_step_that_is_not_finite_is_left_out(self, tmp_path):
        run = fit(tmp_path, loader=Poisoned)
        assert run.step == 3 and run.skipped == 1 and run.images_seen == 8
        assert [row["skipped_steps"] for row in rows(tmp_path)] == [0, 1, 1]
        assert all(torch.isfinite(tensor).all() for tensor in tiny_run.weights(run).values())
        record = json.loads((tmp_path / "nonfinite-rank0.jsonl").read_text())
        assert record == {"after_step": 1, "loss_is_finite": False, "keys": ["sample-2", "sample-3"]}

    def test_too_many_in_a_row_end_the_run_without_a_checkpoint(self, tmp_path):
        class Forever(Poisoned):
            forever = True

        cfg = tiny_run.configuration(
            tmp_path, "trainer.max_skipped_steps=3", "exp_manager.checkpoint_callback_params.every_n_train_steps=1"
        )
        run = tiny_run.trainer(cfg, loader=Forever)
        with pytest.raises(
            FloatingPointError, match="not finite 3 times in a row at step 1; nothing was saved since step 1"
        ):
            run.fit()
        assert checkpoint_names(tmp_path) == ["step-00000001"]

    def test_weights_that_are_not_finite_are_not_saved(self, tmp_path):
        run = tiny_run.trainer(tiny_run.configuration(tmp_path, "optim.lr=1e38", "trainer.max_steps=1"))
        with pytest.raises(FloatingPointError, match="the weights are not finite at step 1; no checkpoint"):
            run.fit()
            run.trainable[0].data.fill_(float("nan"))
            run.saved_step = None
            run.save()
        assert all(name == "step-00000001" for name in checkpoint_names(tmp_path))

    def test_clipping(self, tmp_path):
        sgd = fit(tmp_path / "free", "trainer.max_steps=1")
        clipped = fit(tmp_path / "clipped", "trainer.max_steps=1", "trainer.gradient_clip_val=0.01")
        assert rows(tmp_path / "clipped")[0]["gradient_norm"] == rows(tmp_path / "free")[0]["gradient_norm"] > 0.01
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in clipped.trainable])
        assert norm.item() == pytest.approx(0.01, rel=1e-3)
        assert torch.nn.utils.get_total_norm([p.grad for p in sgd.trainable]).item() > 0.01


class TestEnds:
    def test_max_epochs(self, tmp_path):
        class Short(tiny_run.Loader):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, epoch_batches=3, **kwargs)

        run = fit(
            tmp_path, "trainer.max_steps=-1", "trainer.max_epochs=2", "trainer.accumulate_grad_batches=4", loader=Short
        )
        assert run.step == 1 and run.loader.epoch == 2  # 6 batches: a step of 4, and 2 left over
        with pytest.raises(ConfigError, match="max_steps and trainer.max_epochs are both unlimited"):
            fit(tmp_path / "endless", "trainer.max_steps=-1")

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_signal_ends_with_a_checkpoint(self, tmp_path, number):
        class Signalled(tiny_run.Loader):
            def __iter__(self):
                for batch in super().__iter__():
                    if self.next == 2:
                        signal.raise_signal(number)
                    yield batch

        before = signal.getsignal(number)
        with StopRequest() as stop:
            run = tiny_run.trainer(
                tiny_run.configuration(tmp_path, "trainer.max_steps=50"), loader=Signalled, stop=stop
            )
            assert run.fit() is True
        assert stop.signal == number and run.step == 2
        assert checkpoint_names(tmp_path) == ["step-00000002"]
        assert signal.getsignal(number) == before

    def test_a_second_signal_acts_as_before(self):
        with pytest.raises(KeyboardInterrupt), StopRequest():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    def test_a_signal_while_samples_are_drawn(self, tmp_path):
        overrides = ["model.image_logger.max_images=1", "model.image_logger.batch_frequency=2"]
        cfg = tiny_run.configuration(tmp_path, *overrides, "model.image_logger.log_images_kwargs.ddim_steps=900")
        with StopRequest() as stop:
            run = tiny_run.trainer(cfg, stop=stop)
            evaluations = []

            def interrupt(module, arguments):
                evaluations.append(module.training)
                if evaluations.count(False) == 4:
                    signal.raise_signal(signal.SIGTERM)

            run.model.unet.middle_block.register_forward_pre_hook(lambda module, args: None)
            run.model.register_forward_pre_hook(interrupt)
            assert run.fit() is True
        assert run.step == 2 and evaluations.count(False) < 20
        assert run.model.training
        assert checkpoint_names(tmp_path) == ["step-00000002"]


class TestReports:
    def test_rows(self, tmp_path):
        run = fit(tmp_path, "trainer.log_every_n_steps=2", "trainer.max_steps=4", "trainer.accumulate_grad_batches=3")
        found = rows(tmp_path)
        assert [row["step"] for row in found] == [2, 4]
        assert [row["images_seen"] for row in found] == [12, 24] and run.images_seen == 24
        for row in found:
            assert row["samples_per_second"] > 0 and row["peak_memory_gib"] > 0.01 and row["gradient_norm"] > 0
            assert row["control_sensitivity"] > 0 and row["lr"] == 1e-3

    def test_a_silent_unet_has_no_sensitivity(self, tmp_path):
        fit(tmp_path, awake=False)  # random weights, of which the output layer is zero
        assert [row["control_sensitivity"] for row in rows(tmp_path)] == [0, 0, 0]

    def test_loss_is_the_mean_since_the_last_row(self, tmp_path):
        fit(tmp_path / "each", "trainer.max_steps=4")
        fit(tmp_path / "pairs", "trainer.max_steps=4", "trainer.log_every_n_steps=2")
        each = [row["loss"] for row in rows(tmp_path / "each")]
        pairs = [row["loss"] for row in rows(tmp_path / "pairs")]
        assert pairs == pytest.approx([sum(each[:2]) / 2, sum(each[2:]) / 2])

    def test_tensorboard(self, tmp_path):
        accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        fit(
            tmp_path,
            "exp_manager.create_tensorboard_logger=True",
            "model.image_logger.max_images=1",
            "model.image_logger.log_first_step=True",
        )
        events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        assert [event.value for event in events.Scalars("loss")] == pytest.approx(
            [row["loss"] for row in rows(tmp_path)]
        )
        assert events.Tags()["images"] == ["samples"]

    def test_grid(self, tmp_path):
        options = ["model.image_logger.max_images=2", "model.image_logger.batch_frequency=2"]
        run = fit(tmp_path, *options, "exp_manager.ema.enable=True", "trainer.precision=bf16")
        assert [path.name for path in (tmp_path / "images").iterdir()] == ["step-00000002.png"]
        picture = np.asarray(Image.open(tmp_path / "images" / "step-00000002.png"))
        # Rows of 16 pixels below labels of 14 and margins of 4; two images of 16 side by side, and margins.
        assert picture.shape == (4 * (16 + 14 + 4) + 4, 2 * (16 + 4) + 4, 3)
        hint, image, reconstruction, sample = (picture[18 + i * 34 : 34 + i * 34, 4:20] for i in range(4))
        first = run.loader.handed_out[2]
        expected, expected_hint, _ = tiny_run.sample(first)
        assert np.array_equal(hint, (expected_hint * 255).byte().permute(1, 2, 0).numpy())
        assert np.abs(image.astype(float) - ((expected + 1) * 127.5).permute(1, 2, 0).numpy()).max() <= 0.51
        assert np.array_equal(reconstruction, image)  # space to depth loses nothing
        assert sample.std() > 5


class TestCommand:
    def config_file(self, tmp_path, **changes):
        from omegaconf import OmegaConf

        path = tmp_path / "config.yaml"
        OmegaConf.save(OmegaConf.merge(tiny_run.BASE, changes), path)
        return str(path)

    @pytest.mark.parametrize(
        "overrides, message",
        [
            (["trainer.precision=bf17"], "error: trainer.precision is 'bf17'"),
            (["trainer.devices=2"], "ask for 2 processes, but 1 runs; start it with `torchrun --nproc_per_node 2 -m"),
            (["model.global_batch_size=3"], "error: model.global_batch_size is 3; expected a multiple of 2"),
            (["model.max_step=4"], "error: model.max_step is not a known key"),
            (["data.train.dataset_path=[]"], "error: data.train.dataset_path is empty"),
            (
                ["optim.name=adamw_8bit"],
                "error: optim.name is adamw_8bit but neither bitsandbytes nor torchao is installed",
            ),
        ],
    )
    def test_bad_input_is_one_line(self, tmp_path, monkeypatch, overrides, message):
        for name in ("bitsandbytes", "torchao"):
            monkeypatch.setitem(sys.modules, name, None)  # not installed
        folder = f"exp_manager.explicit_log_dir={tmp_path}/run"
        with pytest.raises(SystemExit) as caught:
            train.main(["--config", self.config_file(tmp_path), folder, *overrides])
        assert message in str(caught.value) and "\n" not in str(caught.value)

    def test_missing_file(self, tmp_path):
        with pytest.raises(SystemExit, match="error: .*absent.yaml"):
            train.main(["--config", f"{tmp_path}/absent.yaml"])


def test_devices(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    for devices, nodes in ((2, 1), ([0, 1], 1), ("3", 2)):
        with pytest.raises(ConfigError, match="4 run; start it with `torchrun"):
            start(devices, nodes, "cpu")
    with pytest.raises(ConfigError, match="trainer.devices is 'two'; expected a positive number"):
        start("two", 1, "cpu")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert start(1, 1, "cpu") == start("auto", 1, "cpu") == World(0, 1, 0, torch.device("cpu"))
    if not torch.cuda.is_available():
        assert start(None, 1, "auto").device.type == "cpu"
        with pytest.raises(ConfigError, match="trainer.accelerator is 'gpu' but PyTorch finds no GPU"):
            start(1, 1, "gpu")


def test_run_folder():
    assert str(run_folder({"explicit_log_dir": "a/b", "exp_dir": "c", "name": "d"})) == "a/b"
    assert str(run_folder({"explicit_log_dir": None, "exp_dir": "c", "name": "d"})) == "c/d"
    assert str(run_folder({"explicit_log_dir": None, "exp_dir": None, "name": None})) == "runs/controlnet"
