"""The folder of a run: a second run in it, a full disk, signals during a save or a compilation."""

import errno
import json
import logging
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys

import pytest
import torch

from controlnet.checkpoints import runs
from controlnet.training import checkpoint
from controlnet.training.distributed import Interrupted, StopRequest
from controlnet.training.lock import LockedError, RunLock
from tests.controlnet import tiny_run


def names(folder):
    return sorted(path.name for path in folder.iterdir())


class TestLock:
    def hold(self, folder, script="input()"):
        """A process that holds the lock until its standard input is closed."""
        code = f"from pathlib import Path; from controlnet.training.lock import RunLock; RunLock(Path({str(folder)!r}))"
        code = f"{code}.acquire(); print('held', flush=True); {script}"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        process = subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes)
        assert process.stdout.readline() == "held\n"
        return process

    def test_the_second_run_is_refused_by_the_name_of_the_first(self, tmp_path):
        process = self.hold(tmp_path)
        lock = RunLock(tmp_path)
        with pytest.raises(LockedError, match=f"in use by process {process.pid} on {socket.gethostname()}; wait"):
            lock.acquire()
        lock.release()  # of a lock that it never had: the other's stays
        assert names(tmp_path) == ["run.lock"]
        process.kill()
        process.wait()

    def test_one_left_by_a_dead_process_is_taken_over(self, tmp_path, caplog):
        process = self.hold(tmp_path)
        process.kill()
        process.wait()
        lock = RunLock(tmp_path)
        with caplog.at_level(logging.WARNING):
            lock.acquire()
        assert f"was left by process {process.pid}" in caplog.text and "taken over" in caplog.text
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
        lock.release()
        assert names(tmp_path) == []

    def test_a_process_id_used_again_does_not_keep_it(self, tmp_path):
        own = {"host": socket.gethostname(), "pid": os.getpid(), "started": "another boot 1"}
        (tmp_path / "run.lock").write_text(json.dumps(own))
        RunLock(tmp_path).acquire()

    @pytest.mark.parametrize("content", ["", "[]", '{"host": "elsewhere", "pid": 7, "started": "x"}'])
    def test_one_of_another_host_is_taken_over_when_it_shows_no_sign_of_life(self, tmp_path, content):
        (tmp_path / "run.lock").write_text(content)
        RunLock(tmp_path, beat=0.05).acquire()

    def test_one_of_another_host_that_lives_is_refused(self, tmp_path):
        lock = RunLock(tmp_path, beat=0.02)
        lock.acquire()
        owner = json.loads((tmp_path / "run.lock").read_text())
        (tmp_path / "run.lock").write_text(json.dumps({**owner, "host": "elsewhere"}))
        with pytest.raises(LockedError, match="in use by process .* on elsewhere"):
            RunLock(tmp_path, beat=1.0).acquire()

    def test_on_a_file_system_without_hard_links(self, tmp_path, monkeypatch):
        def link(*_):
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", link)
        process = self.hold(tmp_path / "held")
        with pytest.raises(LockedError, match=f"process {process.pid}"):
            RunLock(tmp_path / "held").acquire()
        process.communicate("\n")
        lock = RunLock(tmp_path / "free")
        lock.acquire()
        assert json.loads(lock.path.read_text())["pid"] == os.getpid()
        lock.release()
        assert names(tmp_path / "free") == []


class TestFullDisk:
    def run(self, folder, *overrides):
        every = "exp_manager.checkpoint_callback_params.every_n_train_steps=1"
        return tiny_run.trainer(tiny_run.configuration(folder, every, *overrides))

    def test_space_is_checked_before(self, tmp_path, monkeypatch):
        run = self.run(tmp_path)
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
        with pytest.raises(
            OSError, match=r"the disk is full: a checkpoint takes \d\.\d MB, 1.0 MB are free.*on disk: no"
        ):
            run.fit()
        assert run.step == 3  # the run went on, and only its last save is an error
        assert names(tmp_path / "checkpoints") == []

    @pytest.mark.parametrize(
        "error",
        [
            OSError(errno.ENOSPC, "No space left on device"),
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 1088 vs 982"),
        ],
    )
    def test_a_disk_that_fills_meanwhile_costs_one_checkpoint(self, tmp_path, monkeypatch, caplog, error):
        run, save, calls = self.run(tmp_path), torch.save, []

        def fails_at_first(*arguments, **options):
            calls.append(0)
            if len(calls) == 3:  # of step 2: state.pt and rng-rank0.pt of step 1 came before
                raise error
            return save(*arguments, **options)

        monkeypatch.setattr(torch, "save", fails_at_first)
        with caplog.at_level(logging.WARNING):
            run.fit()
        assert names(tmp_path / "checkpoints") == ["step-00000001", "step-00000003"]
        line = next(record.getMessage() for record in caplog.records if "was not saved" in record.getMessage())
        assert "step 2 was not saved: [Errno 28] the disk is full:" in line and "MB are free" in line
        assert f"newest checkpoint on disk: {tmp_path}/checkpoints/step-00000001; training goes on" in line

    @pytest.mark.parametrize("failing", [0, 1])
    def test_a_disk_that_fills_at_the_very_last_leaves_the_checkpoint_of_the_same_step(
        self, tmp_path, monkeypatch, failing
    ):
        before = runs.write(tmp_path, 1, {"x": lambda path: path.write_text("before")}, {})
        replace, calls = os.replace, []

        def full(*paths):
            calls.append(paths)
            if len(calls) == failing + 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            replace(*paths)

        monkeypatch.setattr(os, "replace", full)
        with pytest.raises(OSError, match=r"the disk is full: 0.0 MB were written, .* are free"):
            runs.write(tmp_path, 1, {"x": lambda path: path.write_text("after")}, {})
        assert names(tmp_path) == [before.name]
        assert runs.fault(before) is None and (before / "x").read_text() == "before"

    def test_a_file_system_that_cannot_sync_folders(self, tmp_path, monkeypatch):
        fsync = os.fsync

        def sync(descriptor):
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                raise OSError(errno.EINVAL, "Invalid argument")
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", sync)
        path = runs.write(tmp_path, 1, {"x": lambda path: path.write_text("abc")}, {})
        assert runs.fault(path) is None

    def test_an_error_that_is_not_the_disks_is_raised(self, tmp_path, monkeypatch):
        def fails(*arguments, **options):
            raise RuntimeError("out of ideas")

        monkeypatch.setattr(torch, "save", fails)
        with pytest.raises(RuntimeError, match="out of ideas"):
            self.run(tmp_path).fit()

    def test_metrics_and_pictures_that_cannot_be_written_end_no_run(self, tmp_path, caplog):
        (tmp_path / "images").write_text("a file where the folder of pictures should be")
        (tmp_path / "metrics.jsonl").mkdir()
        options = ["model.image_logger.max_images=1", "model.image_logger.batch_frequency=1"]
        with caplog.at_level(logging.WARNING):
            run = self.run(tmp_path, *options)
            run.fit()
        assert run.step == 3 and checkpoint.newest_complete(tmp_path / "checkpoints") is not None
        assert caplog.text.count("cannot be written, training goes on") == 1  # once, and not at every step


class TestSignals:
    def test_signals_within_the_save_are_ignored_until_it_is_done(self, tmp_path, monkeypatch):
        """As a scheduler and torchrun send them: one to every process, and one more."""
        write = checkpoint.write

        def interrupted(*arguments, **options):
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            return write(*arguments, **options)

        monkeypatch.setattr(checkpoint, "write", interrupted)
        with StopRequest() as stop:
            run = tiny_run.trainer(tiny_run.configuration(tmp_path, "trainer.max_steps=1"), stop=stop)
            signal.raise_signal(signal.SIGTERM)
            assert run.fit() is True
        assert checkpoint.fault(tmp_path / "checkpoints" / "step-00000001") is None

    def test_torchrun_sends_one_interrupt_more(self, monkeypatch):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        with pytest.raises(KeyboardInterrupt), StopRequest():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            reached = True
            signal.raise_signal(signal.SIGINT)
        assert reached

    def test_after_the_grace_time_a_signal_ends(self):
        with pytest.raises(KeyboardInterrupt), StopRequest(grace=0.0):
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)

    def test_the_first_compilation_is_interrupted(self, tmp_path, monkeypatch):
        def compiles_for_minutes(module, **options):
            def call(*arguments):
                signal.raise_signal(signal.SIGTERM)
                raise AssertionError("the signal was not answered")

            module._compiled_call_impl = call

        monkeypatch.setattr(torch.nn.Module, "compile", compiles_for_minutes)
        with StopRequest() as stop:
            run = tiny_run.trainer(tiny_run.configuration(tmp_path, "model.inductor=True"), stop=stop)
            with pytest.raises(Interrupted):
                run.fit()
        assert stop.reason == "SIGTERM" and run.step == 0

    def test_max_time_per_run(self, tmp_path):
        with StopRequest() as stop:
            run = tiny_run.trainer(tiny_run.configuration(tmp_path, "trainer.max_steps=1000"), stop=stop)
            stop.limit(0.0)
            assert run.fit() is True
        assert run.step == 1 and stop.reason == "exp_manager.max_time_per_run"
        assert names(tmp_path / "checkpoints") == ["step-00000001"]
