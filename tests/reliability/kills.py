"""kill -9 of a process that only saves: the newest checkpoint is whole, and the last one reported is there."""

import collections
import functools
import os
import random
import signal
import tempfile
import time
from pathlib import Path

from controlnet.checkpoints import runs

SIZE, FILES = 100_000, 4


def _save_for_ever(folder: Path, step: int, report: int) -> None:
    while True:
        step += 1
        writer = functools.partial(Path.write_bytes, data=bytes([step % 256]) * SIZE)
        runs.write(folder, step, {f"part{i}.bin": writer for i in range(FILES)}, {})
        runs.prune(folder, 2)
        os.write(report, b"%d\n" % step)


def campaign(rounds: int, seed: int) -> dict[str, int]:
    counts: collections.Counter[str] = collections.Counter()
    rng, reached = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for _ in range(rounds):
            reading, writing = os.pipe()
            child = os.fork()
            if child == 0:
                try:
                    _save_for_ever(folder, reached, writing)
                finally:
                    os._exit(1)
            os.close(writing)
            time.sleep(rng.uniform(0, 0.1))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            with os.fdopen(reading, "rb") as file:
                reported = file.read().split()
            reached = int(reported[-1]) if reported else reached
            newest = runs.newest_complete(folder)
            found = int(newest.name.removeprefix("step-")) if newest else 0
            whole = all(runs.fault(path) is None for _, path in runs.checkpoints(folder))
            # The report of the last one may have been cut off.
            counts["survived" if whole and found in (reached, reached + 1) else "lost"] += 1
            reached = found
    return counts
