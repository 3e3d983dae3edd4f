"""Two ranks over gloo, as real processes: they are one run, agree on everything, and end together."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from controlnet.checkpoints import runs
from controlnet.training import checkpoint
from controlnet.training.randomness import RandomStreams
from tests.controlnet import tiny_run

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="PyTorch was built without gloo")
SCRIPT = os.path.join(os.path.dirname(__file__), "rank.py")


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def environment(pytestconfig):
    root = str(pytestconfig.rootpath)
    return {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


@pytest.fixture
def run_two(environment):
    """Runs both ranks, or more, to their end; returns exit codes and outputs."""

    def run(folder, job, *overrides, timeout=240, ranks=2):
        folder.mkdir(parents=True, exist_ok=True)
        shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        processes = [
            subprocess.Popen(
                [sys.executable, SCRIPT, str(folder), job, *overrides],
                env={**environment, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(ranks)
        ]
        deadline = time.monotonic() + timeout
        try:
            outputs = [process.communicate(timeout=max(0.1, deadline - time.monotonic()))[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        return [process.returncode for process in processes], outputs

    return run


def results(folder):
    return [torch.load(folder / f"result-rank{rank}.pt", weights_only=True) for rank in range(2)]


class BothRanks(RandomStreams):
    """The streams of ranks 0 and 1 of a job of two, each for its half of a doubled batch."""

    def __init__(self, seed):
        super().__init__(seed, 0, "cpu")
        self.ranks = [RandomStreams(seed, rank, "cpu") for rank in range(2)]

    def noise_and_timesteps(self, latents, timesteps):
        halves = zip(self.ranks, latents.chunk(2), strict=True)
        drawn = [rank.noise_and_timesteps(half, timesteps) for rank, half in halves]
        return tuple(torch.cat(parts) for parts in zip(*drawn, strict=True))

    def dropped_prompts(self, count, rate):
        return torch.cat([rank.dropped_prompts(count // 2, rate) for rank in self.ranks])


@pytest.mark.parametrize("variant", ["locked", "decoder", "only mid control, micro-batches", "ZeRO-1, micro-batches"])
def test_two_ranks_equal_one_with_the_double_batch(tmp_path, run_two, variant):
    """Same samples, same noise, same dropped prompts, same weights after 5 steps up to rounding."""
    overrides = {
        "locked": ["exp_manager.ema.enable=True"],
        "decoder": ["model.sd_locked=False", "trainer.gradient_clip_val=0.1"],
        "ZeRO-1, micro-batches": ["optim.zero=True", "trainer.accumulate_grad_batches=2"],
        "only mid control, micro-batches": ["model.only_mid_control=True", "trainer.accumulate_grad_batches=2"],
    }[variant]
    options = ["trainer.max_steps=5", *tiny_run.LINEAR, *overrides]
    codes, outputs = run_two(tmp_path / "two", "train", *options)
    assert codes == [0, 0], outputs
    first, second = results(tmp_path / "two")
    for name, tensor in first["weights"].items():
        assert torch.equal(tensor, second["weights"][name]), name

    cfg = tiny_run.configuration(tmp_path / "one", "model.micro_batch_size=4", *options)
    one = tiny_run.trainer(cfg, streams=BothRanks(cfg.model.seed))
    one.fit()
    assert one.images_seen == first["seen"] == 20 * one.accumulate
    tiny_run.assert_same_weights(one, first["weights"])
    rows = [tiny_run.rows(tmp_path / name) for name in ("two", "one")]
    for key in ("loss", "gradient_norm"):
        assert [row[key] for row in rows[0]] == pytest.approx([row[key] for row in rows[1]], rel=1e-5)
    assert [row["images_seen"] for row in rows[0]] == [row["images_seen"] for row in rows[1]]


@pytest.mark.parametrize("zero", [False, True])
def test_resumed_on_two_ranks(tmp_path, run_two, zero):
    """To the bit, with micro-batches and an average; with ZeRO-1 on one rank, too, which takes all of the state."""
    overrides = ["exp_manager.resume_if_exists=True", f"optim.zero={zero}", f"model.sd_locked={zero}"]
    overrides += ["trainer.accumulate_grad_batches=2", "exp_manager.ema.enable=True"]
    assert run_two(tmp_path / "whole", "train", *overrides, "trainer.max_steps=4")[0] == [0, 0]
    assert run_two(tmp_path / "parts", "train", *overrides, "trainer.max_steps=2")[0] == [0, 0]
    path = tmp_path / "parts" / "checkpoints" / "step-00000002"
    assert checkpoint.fault(path) is None
    positions = [torch.load(path / f"rng-rank{rank}.pt", weights_only=True)["streams"] for rank in range(2)]
    assert not torch.equal(positions[0]["generator"], positions[1]["generator"])
    assert run_two(tmp_path / "parts", "train", *overrides, "trainer.max_steps=4")[0] == [0, 0]
    whole, parts = results(tmp_path / "whole"), results(tmp_path / "parts")
    for rank in range(2):
        for name, tensor in whole[rank]["weights"].items():
            assert torch.equal(tensor, parts[rank]["weights"][name]), name
    other = ["exp_manager.resume_with_other_world_size=True", "trainer.max_steps=5", "model.micro_batch_size=4"]
    one = tiny_run.trainer(tiny_run.configuration(tmp_path / "parts", *overrides, *other))
    one.resume()
    assert one.step == 4 and len(one.optimizer.state) == len(one.trainable)
    one.fit()
    assert one.step == 5


def test_bad_numbers_on_one_rank_skip_the_step_on_both(tmp_path, run_two):
    codes, outputs = run_two(tmp_path, "nan")
    assert codes == [0, 0], outputs
    first, second = results(tmp_path)
    assert (first["step"], first["skipped"]) == (second["step"], second["skipped"]) == (3, 1)
    for name, tensor in first["weights"].items():
        assert torch.equal(tensor, second["weights"][name]) and bool(torch.isfinite(tensor).all()), name
    records = [json.loads((tmp_path / f"nonfinite-rank{rank}.jsonl").read_text()) for rank in range(2)]
    assert [record["loss_is_finite"] for record in records] == [True, False]


def test_the_first_rank_measures_the_kernels_and_both_follow(tmp_path, run_two, environment):
    environment["CNKERNELS_CACHE"] = str(tmp_path / "cache")
    parts, keys = ("unet_config", "control_stage_config"), ("channel_mult", "attention_resolutions")
    one_level = [f"model.{part}.{key}=[1]" for part in parts for key in keys]
    codes, outputs = run_two(tmp_path, "tune", "model.tune=True", *one_level)
    assert codes == [0, 0], outputs
    first, second = results(tmp_path)
    assert len(first["measured"]) == 1 and first["measured"][0] > 0 and second["measured"] == []
    assert first["choices"] == second["choices"] and set(first["choices"]) >= {"attention", "group_norm_silu"}
    for name, tensor in first["weights"].items():
        assert torch.equal(tensor, second["weights"][name]), name


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_killed_rank_ends_the_others_who_name_it(tmp_path, run_two, ranks):
    every = "exp_manager.checkpoint_callback_params.every_n_train_steps=1"
    codes, outputs = run_two(tmp_path, "kill", "trainer.max_steps=1000", every, ranks=ranks)
    assert codes == [*[1] * (ranks - 1), -signal.SIGKILL], outputs
    for output in outputs[:-1]:
        assert f"rank {ranks - 1} has ended without a word (killed, or out of memory), last heard of in" in output
        assert "step 1 is saved" in output or "step 2 is saved" in output
    assert checkpoint.newest_complete(tmp_path / "checkpoints") is not None


def test_a_rank_that_hangs_is_named_when_the_time_is_up(tmp_path, run_two):
    codes, outputs = run_two(tmp_path, "hang", "trainer.rank_timeout=200", "trainer.max_steps=1000")
    assert 0 not in codes, outputs
    assert "rank 1 is in step 3, its data for" in outputs[0] and "this rank, 0, is in step 3" in outputs[0]


def test_ranks_with_different_settings_do_not_start(tmp_path, run_two):
    codes, outputs = run_two(tmp_path, "differ")
    assert 0 not in codes
    for output in outputs:
        assert "the ranks of this job differ: the configuration (sha256) is" in output
    assert not (tmp_path / "checkpoints").exists()


def test_a_signal_to_one_rank_stops_both_with_a_checkpoint(tmp_path, run_two):
    codes, outputs = run_two(tmp_path, "signal rank 1", "trainer.max_steps=1000")
    assert codes == [0, 0], outputs
    assert [result["stopped"] for result in results(tmp_path)] == [True, True]
    assert [result["step"] for result in results(tmp_path)] == [1, 1]
    assert checkpoint.fault(tmp_path / "checkpoints" / "step-00000001") is None


def test_what_the_ranks_agree_on_is_read_a_step_late(tmp_path, run_two):
    """Without a row of metrics at every step, nothing looks at a step before the next one has its work."""
    options = ["trainer.max_steps=1000", "trainer.log_every_n_steps=100"]
    codes, outputs = run_two(tmp_path, "signal rank 1", *options)
    assert codes == [0, 0], outputs
    first, second = results(tmp_path)
    assert first["stopped"] and second["stopped"] and first["step"] == second["step"] == 2
    assert checkpoint.fault(tmp_path / "checkpoints" / "step-00000002") is None
    for name, tensor in first["weights"].items():
        assert torch.equal(tensor, second["weights"][name]), name


def test_gradients_have_the_strides_of_ddps_buckets(tmp_path, run_two):
    codes, outputs = run_two(tmp_path, "train", "model.channels_last=True", "model.sd_locked=False")
    assert codes == [0, 0], outputs
    assert not any("strides do not match" in output for output in outputs), outputs


@pytest.mark.parametrize("zero", [False, True])
def test_no_rank_waits_in_an_ordinary_step(tmp_path, run_two, zero):
    """DDP, micro-batches that keep their gradients, bf16, ZeRO-1 and the ranks' agreement on each step."""
    options = ["trainer.max_steps=100", "trainer.log_every_n_steps=100", f"optim.zero={zero}"]
    options += ["trainer.precision=bf16", "trainer.accumulate_grad_batches=2", "trainer.gradient_clip_val=1"]
    codes, outputs = run_two(tmp_path, "waits", *options)
    assert codes == [0, 0], outputs
    assert results(tmp_path) == [{"waits": [], "step": 4}] * 2


def test_both_ranks_draw_the_grid(tmp_path, run_two):
    options = ["model.image_logger.max_images=3", "model.image_logger.batch_frequency=2", "trainer.max_steps=2"]
    codes, outputs = run_two(tmp_path, "train", *options)
    assert codes == [0, 0], outputs
    picture = np.asarray(Image.open(tmp_path / "images" / "step-00000002.png"))
    assert picture.shape == (4 * (16 + 14 + 4) + 4, 4 * (16 + 4) + 4, 3)  # 2 images of each rank
    for column, number in enumerate((4, 5, 6, 7)):  # batch 1 of rank 0, then of rank 1
        hint = picture[18:34, 4 + 20 * column : 20 + 20 * column]
        assert np.array_equal(hint, (tiny_run.sample(number)[1] * 255).byte().permute(1, 2, 0).numpy())


def torchrun(environment, folder, job, *overrides):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", SCRIPT]
    return subprocess.Popen(
        [*command, str(folder), job, *overrides],
        env={**environment, "ANNOUNCE": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_an_exception_on_one_rank_ends_the_job_with_an_error(tmp_path, environment):
    process = torchrun(environment, tmp_path, "fail", "trainer.max_steps=1000")
    output, _ = process.communicate(timeout=240)
    assert process.returncode != 0
    assert "no such sample" in "".join(output.splitlines()[-3:])  # the last words, after torchrun's own traceback
    assert not (tmp_path / "result-rank0.pt").exists()


def test_sigterm_to_torchrun_saves_and_ends(tmp_path, environment):
    process = torchrun(environment, tmp_path, "announce", "trainer.max_steps=100000")
    deadline = time.monotonic() + 200
    while not all((tmp_path / f"rank{rank}").exists() for rank in range(2)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    first, second = results(tmp_path)
    assert first["stopped"] and second["stopped"] and first["step"] == second["step"] > 0
    newest = checkpoint.newest_complete(tmp_path / "checkpoints")
    assert newest.name == runs.folder_name(first["step"])


def test_two_nodes(tmp_path, environment):
    """Two agents of torchrun, as on two machines, of one rank each."""
    port = str(free_port())
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    agents = [
        subprocess.Popen(
            [*command, "--node_rank", node, "--master_addr", "127.0.0.1", "--master_port", port]
            + [SCRIPT, str(tmp_path), "train", "trainer.max_steps=2"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in ("0", "1")
    ]
    outputs = [agent.communicate(timeout=240)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    first, second = results(tmp_path)
    assert first["step"] == second["step"] == 2
    for name, tensor in first["weights"].items():
        assert torch.equal(tensor, second["weights"][name]), name
