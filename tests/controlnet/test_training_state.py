"""Checkpoints: whole or absent, the newest complete one wins, and a resumed run is the same run to the bit."""

import functools
import json
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from controlnet.checkpoints import CheckpointError
from controlnet.config import ConfigError
from controlnet.training import checkpoint
from controlnet.training.distributed import World
from tests.controlnet import tiny_run

CONTENT = {"a.bin": lambda path: path.write_bytes(b"x" * 1000), "b.txt": lambda path: path.write_text("words")}


def save(folder, step, content=CONTENT):
    return checkpoint.write(folder, step, content, {"world_size": 1})


def steps(folder):
    return [step for step, _ in checkpoint.checkpoints(folder)]


def test_a_written_checkpoint_is_complete_and_names_its_files(tmp_path):
    path = save(tmp_path, 12)
    assert path.name == "step-00000012"
    assert checkpoint.fault(path) is None
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["step"] == 12 and manifest["world_size"] == 1
    assert manifest["files"]["a.bin"]["size"] == 1000
    assert set(manifest["files"]) == {"a.bin", "b.txt"}


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda path: (path / "a.bin").unlink(), "a.bin is missing"),
        (lambda path: (path / "a.bin").write_bytes(b"x" * 999), "a.bin has 999 bytes; expected 1000"),
        (lambda path: (path / "a.bin").write_bytes(b"x" * 999 + b"y"), "a.bin is damaged"),
        (lambda path: (path / "manifest.json").unlink(), "has no manifest.json"),
        (lambda path: (path / "manifest.json").write_text('{"format": 1, "fil'), "manifest.json is damaged"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(tmp_path, damage, message):
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    damage(newer)
    reports = []
    assert checkpoint.newest_complete(tmp_path, reports.append) == older
    assert len(reports) == 1 and message in reports[0]


def test_nothing_complete_is_none(tmp_path):
    assert checkpoint.newest_complete(tmp_path) is None
    assert checkpoint.newest_complete(tmp_path / "absent") is None
    (tmp_path / "step-00000009").mkdir()
    assert checkpoint.newest_complete(tmp_path) is None


def test_a_failed_write_leaves_what_was_there(tmp_path):
    save(tmp_path, 1)

    def no_space(path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="the disk is full: .* are free"):
        save(tmp_path, 2, {"a.bin": CONTENT["a.bin"], "b.bin": no_space})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert checkpoint.fault(tmp_path / "step-00000001") is None


def test_a_step_saved_again_is_replaced(tmp_path):
    save(tmp_path, 1)
    path = save(tmp_path, 1, {"a.bin": lambda path: path.write_bytes(b"new")})
    assert (path / "a.bin").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_prune_keeps_two_at_least_and_removes_leftovers(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step)
    (tmp_path / "step-00000003.tmp-999999").mkdir()
    checkpoint.prune(tmp_path, 0)
    assert steps(tmp_path) == [1, 2, 3, 4, 5]
    assert not (tmp_path / "step-00000003.tmp-999999").exists()
    checkpoint.prune(tmp_path, 3)
    assert steps(tmp_path) == [3, 4, 5]
    checkpoint.prune(tmp_path, 1)
    assert steps(tmp_path) == [4, 5]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000005"]


SAVE_FOREVER = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from controlnet.training import checkpoint
folder = Path({folder!r})
step = int(sys.argv[1])
while True:
    step += 1
    write = lambda path: path.write_bytes(bytes([step % 256]) * 200_000)
    content = {{f"part{{i}}.bin": write for i in range(5)}}
    checkpoint.write(folder, step, content, {{}})
    checkpoint.prune(folder, 2)
    print(step, flush=True)
"""


def test_kill_9_during_save_never_loses_the_previous_one(tmp_path, pytestconfig):
    """A process that does nothing but save is killed at random moments, again and again."""
    folder = tmp_path / "checkpoints"
    script = SAVE_FOREVER.format(root=str(pytestconfig.rootpath), folder=str(folder))
    randomness, reached = random.Random(0), 0
    for _ in range(6):
        process = subprocess.Popen([sys.executable, "-c", script, str(reached)], stdout=subprocess.PIPE, text=True)
        reached = int(process.stdout.readline())  # the first save is done: the imports are over
        time.sleep(randomness.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        reported = process.stdout.read().split()
        process.wait()
        reached = int(reported[-1]) if reported else reached
        newest = checkpoint.newest_complete(folder)
        # The step it reported last is there, or the next one, whose report was cut off.
        assert newest is not None and int(newest.name.removeprefix("step-")) in (reached, reached + 1)
        # Everything that bears a checkpoint's name is complete.
        assert all(checkpoint.fault(path) is None for _, path in checkpoint.checkpoints(folder))
        reached = int(newest.name.removeprefix("step-"))


def test_random_state_round_trip(tmp_path):
    device = torch.device("cpu")
    torch.save(checkpoint.random_state(device), tmp_path / "rng.pt")
    expected = random.random(), np.random.normal(), torch.rand(3)
    state = torch.load(tmp_path / "rng.pt", weights_only=True)
    checkpoint.set_random_state(state, device)
    assert random.random() == expected[0] and np.random.normal() == expected[1]
    assert torch.equal(torch.rand(3), expected[2])


RESUME_CASES = {
    "plain": [],
    "average, decoder, dropout": [
        "model.sd_locked=False",
        "exp_manager.ema.enable=True",
        "model.unet_config.dropout=0.1",
        "model.control_stage_config.dropout=0.1",
    ],
    "fp16, accumulation": ["trainer.precision=16", "trainer.accumulate_grad_batches=2"],
}


@pytest.mark.parametrize("overrides", RESUME_CASES.values(), ids=RESUME_CASES.keys())
def test_six_steps_equal_two_and_two_and_two(tmp_path, overrides):
    """Two resumes, across the end of an epoch (5 batches), with samples drawn on the side in one run only."""

    class ShortEpochs(tiny_run.Loader):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, epoch_batches=5, **kwargs)

    def run(folder, last, *more):
        cfg = tiny_run.configuration(tmp_path / folder, f"trainer.max_steps={last}", *overrides, *more)
        trainer = tiny_run.trainer(cfg, loader=ShortEpochs)
        trainer.fit()
        return trainer

    whole = run("whole", 6, "optim.sched.max_steps=6", "optim.sched.name=cosine")
    samples = ["model.image_logger.max_images=1", "model.image_logger.batch_frequency=1"]
    parts = []
    for last in (2, 4, 6):
        resume = ["exp_manager.resume_if_exists=True", "optim.sched.max_steps=6", "optim.sched.name=cosine"]
        parts.append(run("parts", last, *resume, *samples))
    assert [part.loader.handed_out for part in parts] != [[], [], []]
    assert sum((part.loader.handed_out for part in parts), []) == whole.loader.handed_out
    assert parts[-1].scaler.state_dict() == whole.scaler.state_dict()
    expected = tiny_run.weights(whole)
    for name, tensor in tiny_run.weights(parts[-1]).items():
        assert torch.equal(tensor, expected[name]), name
    last = [tmp_path / folder / "checkpoints" / "step-00000006" for folder in ("whole", "parts")]
    names = {path.name for path in last[0].iterdir()}
    assert names == {path.name for path in last[1].iterdir()}
    averaged = "exp_manager.ema.enable=True" in overrides
    assert ("ema.safetensors" in names) == ("unet.safetensors" in names) == averaged
    for name in names:
        if name.endswith(".safetensors"):
            first, second = (load_file(path / name) for path in last)
            assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    rows = [tiny_run.rows(tmp_path / folder) for folder in ("whole", "parts")]
    for key in ("step", "loss", "gradient_norm", "lr", "images_seen", "epoch", "control_sensitivity"):
        assert [row[key] for row in rows[0]] == [row[key] for row in rows[1]], key


def test_files_have_the_originals_names_and_load_into_a_model(tmp_path):
    trainer = tiny_run.trainer(tiny_run.configuration(tmp_path, "trainer.max_steps=1", "model.sd_locked=False"))
    trainer.fit()
    path = tmp_path / "checkpoints" / "step-00000001"
    control, unet = load_file(path / "control.safetensors"), load_file(path / "unet.safetensors")
    assert control.keys() == {f"control_model.{name}" for name in trainer.model.control.state_dict()}
    assert unet.keys() == {f"model.diffusion_model.{name}" for name in trainer.model.unet.state_dict()}
    assert torch.equal(control["control_model.zero_convs.0.0.weight"], trainer.model.control.zero_convs[0][0].weight)
    other = tiny_run.trainer(tiny_run.configuration(tmp_path / "other", "model.sd_locked=False", "model.seed=7"))
    checkpoint.load_model(other.model, path)
    for name, tensor in tiny_run.weights(trainer).items():
        assert torch.equal(tensor, dict(other.model.named_parameters())[name])


def test_pickles_of_a_checkpoint_load_with_weights_only(tmp_path):
    tiny_run.trainer(tiny_run.configuration(tmp_path, "trainer.max_steps=1")).fit()
    path = tmp_path / "checkpoints" / "step-00000001"
    assert torch.load(path / "state.pt", weights_only=True)["step"] == 1
    assert torch.load(path / "rng-rank0.pt", weights_only=True)["position"] == {"next": 1}


def test_a_crash_during_save_resumes_from_the_one_before(tmp_path):
    cfg = tiny_run.configuration(tmp_path, "exp_manager.checkpoint_callback_params.every_n_train_steps=1")
    tiny_run.trainer(cfg).fit()
    (tmp_path / "checkpoints" / "step-00000003" / "state.pt").write_bytes(b"half")
    cfg.exp_manager.resume_if_exists = True
    trainer = tiny_run.trainer(cfg)
    trainer.resume()
    assert trainer.step == 2


def test_metrics_after_the_resumed_step_are_dropped(tmp_path):
    cfg = tiny_run.configuration(tmp_path, "exp_manager.checkpoint_callback_params.every_n_train_steps=1")
    tiny_run.trainer(cfg).fit()
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000003")
    cfg.exp_manager.resume_if_exists = True
    cfg.trainer.max_steps = 4
    tiny_run.trainer(cfg).fit()
    assert [row["step"] for row in tiny_run.rows(tmp_path)] == [1, 2, 3, 4]


class TestRefused:
    @pytest.fixture
    def run(self, tmp_path):
        cfg = tiny_run.configuration(tmp_path, "trainer.max_steps=1")
        tiny_run.trainer(cfg).fit()
        cfg.trainer.max_steps = 2
        return cfg

    def test_an_old_run_is_not_overwritten(self, run):
        with pytest.raises(
            ConfigError, match="already holds step-00000001 of an earlier run; set exp_manager.resume_if"
        ):
            tiny_run.trainer(run).fit()

    def test_missing_checkpoint(self, tmp_path):
        cfg = tiny_run.configuration(
            tmp_path / "new", "exp_manager.resume_if_exists=True", "exp_manager.resume_ignore_no_checkpoint=False"
        )
        with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
            tiny_run.trainer(cfg).fit()

    def test_explicit_checkpoint_that_is_not_one(self, tmp_path):
        cfg = tiny_run.configuration(tmp_path / "new", f"exp_manager.resume_from_checkpoint={tmp_path}/absent")
        with pytest.raises(CheckpointError, match="absent has no manifest.json"):
            tiny_run.trainer(cfg).fit()

    def test_another_width(self, run, tmp_path):
        for key in ("unet_config", "control_stage_config"):
            run.model[key].model_channels = 64
        run.exp_manager.resume_if_exists = True
        with pytest.raises(
            CheckpointError, match=r"control.safetensors does not fit the model: \S+ is \[.*; expected \["
        ):
            tiny_run.trainer(run).fit()

    def test_another_sd_locked(self, run):
        run.model.sd_locked = False
        run.exp_manager.resume_if_exists = True
        with pytest.raises(CheckpointError, match="unet.safetensors is missing.*model.sd_locked"):
            tiny_run.trainer(run).fit()

    def test_another_number_of_ranks(self, run):
        run.exp_manager.resume_if_exists = True
        trainer = tiny_run.trainer(run)
        path = checkpoint.newest_complete(trainer.folder / "checkpoints")
        trainer.world = World(0, 2, 0, torch.device("cpu"))
        with pytest.raises(CheckpointError, match="saved by 1 ranks and 2 run now"):
            trainer.load(path)
        run.exp_manager.resume_with_other_world_size = True
        assert trainer.load(path) is None
        assert trainer.step == 1

    @pytest.mark.parametrize(
        "name, content",
        [
            ("control.safetensors", b"\xff" * 99),
            ("state.pt", b"no pickle"),
            ("state.pt", pickle.dumps(print)),
            ("state.pt", {"step": 1}),
            ("state.pt", []),
            ("rng-rank0.pt", {"global": {}}),
            ("rng-rank0.pt", {"global": {"python": 3, "numpy": [1] * 5}}),
        ],
    )
    def test_one_that_is_complete_and_of_another_content(self, run, name, content):
        """As another version of the package may have saved it: the manifest is right, what it names is not."""
        run.exp_manager.resume_if_exists = True
        trainer = tiny_run.trainer(run)
        path = checkpoint.newest_complete(trainer.folder / "checkpoints")

        def foreign(file):
            if isinstance(content, bytes):
                file.write_bytes(content)
            else:
                torch.save(content, file)

        kept = {file.name: file.read_bytes() for file in path.iterdir() if file.name != checkpoint.MANIFEST}
        writers = {other: functools.partial(Path.write_bytes, data=data) for other, data in kept.items()}
        save(path.parent, 1, {**writers, name: foreign})
        with pytest.raises(CheckpointError, match="step-00000001 is complete, but not what this version .* saves"):
            trainer.resume()
