"""One rank of a job of test_distributed.py: `rank.py FOLDER JOB override ...`, in the environment torchrun gives."""

import datetime
import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch.distributed.distributed_c10d import _get_default_group, _set_pg_timeout
from torch.distributed.elastic.multiprocessing.errors import record

from cnkernels import check, findings, tune
from cnkernels.tune import first_call
from controlnet.training.distributed import RankError, StopRequest, start
from controlnet.training.run import check_ranks
from tests.controlnet import tiny_run


class Poisoned(tiny_run.Loader):
    """Rank 1's second batch is NaN."""

    def __iter__(self):
        for batch in super().__iter__():
            if self.rank == 1 and self.next == 2:
                batch["images"].fill_(float("nan"))
            yield batch


class Failing(tiny_run.Loader):
    """Rank 1 fails at its second batch."""

    def __iter__(self):
        for batch in super().__iter__():
            if self.rank == 1 and self.next == 2:
                raise KeyError("no such sample")
            yield batch


class Announcing(tiny_run.Loader):
    """Says which batch it hands out, so that the test knows when to send its signal."""

    def __iter__(self):
        for batch in super().__iter__():
            Path(os.environ["ANNOUNCE"], f"rank{self.rank}").write_text(str(self.next))
            yield batch


class Killed(tiny_run.Loader):
    """The last rank is killed at its third batch."""

    def __iter__(self):
        for batch in super().__iter__():
            if self.rank == self.world_size - 1 and self.next == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch


class Hanging(tiny_run.Loader):
    """The last rank waits for its third batch until the first has given up waiting for it and knows why.

    How long a rank waits for another is the configuration's until then, and three seconds from then on.
    """

    watch = None  # this rank's, of its World

    def __iter__(self):
        for batch in super().__iter__():
            if self.next == 3:
                _set_pg_timeout(datetime.timedelta(seconds=3))
                while self.rank == self.world_size - 1 and not self.watch.store.check(["has read/0"]):
                    time.sleep(0.1)
            yield batch


LOADERS = {"nan": Poisoned, "fail": Failing, "announce": Announcing, "kill": Killed, "hang": Hanging}


def count_tuning() -> list[int]:
    """Notes how many calls this rank is to measure each time, and measures one of each op; checks nothing."""
    counts = []

    def counted(calls, device, **options):
        counts.append(len(calls))
        one_of_each = list({call.op: call for call in calls}.values())
        return tune.tune(one_of_each, device, **{**options, "rounds": 1})

    check.ensure = lambda ops, dtypes, device: []
    first_call.tune = counted
    return counts


@record
def main():
    folder, job, *overrides = sys.argv[1:]
    with StopRequest() as stop:
        cfg = tiny_run.configuration(folder, *overrides)
        world = start("auto", 1, "cpu", cfg.trainer.rank_timeout)
        Hanging.watch = world.watch
        backend = _get_default_group()._get_backend(world.device)
        assert backend.options._timeout == datetime.timedelta(seconds=cfg.trainer.rank_timeout)
        if job == "differ" and world.rank == 1:
            cfg.optim.lr = 0.5
        run = tiny_run.trainer(cfg, world, loader=LOADERS.get(job, tiny_run.Loader), stop=stop)
        check_ranks(world, cfg, run.model)
        measured = count_tuning() if job == "tune" else []
        if job == "signal rank 1" and world.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if job == "waits":
            from tests.controlnet.waiting import begun, waits  # imports transformers, which takes seconds

            result = {"waits": waits(begun(run), 3), "step": run.step + run._settle()}
            torch.save(result, f"{folder}/result-rank{world.rank}.pt")
            world.close()
            return
        try:
            stopped = run.fit()
        except RankError as error:
            sys.exit(f"error: step {run.saved_step} is saved; {error}")
        result = {"step": run.step, "skipped": run.skipped, "seen": run.images_seen, "weights": tiny_run.weights(run)}
        result |= {"measured": measured, "choices": findings.record(world.device)["choices"]}
        torch.save({**result, "stopped": stopped}, f"{folder}/result-rank{world.rank}.pt")
        world.close()


if __name__ == "__main__":
    main()
