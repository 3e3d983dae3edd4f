"""One rank of a job of test_distributed.py: `rank.py FOLDER JOB override ...`, in the environment torchrun gives."""

import os
import signal
import sys
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.errors import record

from controlnet import train
from controlnet.training.distributed import StopRequest, start
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


LOADERS = {"nan": Poisoned, "fail": Failing, "announce": Announcing}


@record
def main():
    folder, job, *overrides = sys.argv[1:]
    with StopRequest() as stop:
        world = start(2, 1, "cpu")
        cfg = tiny_run.configuration(folder, *overrides)
        if job == "differ" and world.rank == 1:
            cfg.optim.lr = 0.5
        run = tiny_run.trainer(cfg, world, loader=LOADERS.get(job, tiny_run.Loader), stop=stop)
        train.check_ranks(world, cfg, run.model)
        if job == "signal rank 1" and world.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        stopped = run.fit()
        result = {"step": run.step, "skipped": run.skipped, "seen": run.images_seen, "weights": tiny_run.weights(run)}
        torch.save({**result, "stopped": stopped}, f"{folder}/result-rank{world.rank}.pt")
        world.close()


if __name__ == "__main__":
    main()
