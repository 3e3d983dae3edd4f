"""A loader over fifty epochs: memory and open files as flat at the end as after the first."""

import gc
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from controlnet.data import build_loader
from tests.controlnet.shard_files import members, write_tar

EPOCHS, WARM_UP = 50, 10
SHARDS, SAMPLES = 18, 2  # more shards than the index keeps


@pytest.fixture
def folder(tmp_path):
    for shard in range(SHARDS):
        numbers = range(100 + shard * SAMPLES, 100 + (shard + 1) * SAMPLES)
        files = [(f"{number}.{e}", data) for number in numbers for e, data in members(number % 256).items()]
        if shard == 3:  # a sample that is dropped in every epoch, once counted
            files[0] = (files[0][0], b"no picture")
        write_tar(tmp_path / f"{shard}.tar", files)
    return tmp_path


def loader(folder, num_workers):
    train = {"dataset_path": ["*.tar"], "buckets": {"sizes": ["8, 8", "8, 12"]}, "data_sharding": False}
    data = {"num_workers": num_workers, "train": train, "webdataset": {"local_root_path": str(folder)}}
    return build_loader(data, factor=4, batch_size=3, seed=0)


def slope(values):
    """Growth per epoch, by least squares."""
    return np.polyfit(np.arange(len(values)), values, 1)[0]


def resident(pid):
    """Bytes of memory that a process has in use."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:left out")
def test_memory_of_the_reading_process_is_flat(folder):
    source = loader(folder, 0)
    held, objects = [], []
    gc.collect()
    gc.freeze()  # what is there already is looked at no more: a collection is 50 times faster
    tracemalloc.start()
    try:
        for epoch in range(EPOCHS):
            for _ in source:
                pass
            gc.collect()
            if epoch >= WARM_UP:
                held.append(tracemalloc.get_traced_memory()[0])
                objects.append(len(gc.get_objects()))
    finally:
        tracemalloc.stop()
        gc.unfreeze()
    assert slope(objects) < 0.5, objects
    # Python keeps some of the small objects that are given back, for the next of their size.
    assert slope(held) < 64 * SHARDS * SAMPLES, held  # less than two numbers that stay of each sample


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:left out")
@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="reads /proc")
def test_files_and_memory_of_the_workers_are_flat(folder):
    source = loader(folder, 2)
    files, memory = [], []
    for epoch in range(EPOCHS):
        for _ in source:
            pass
        if epoch >= WARM_UP:
            pids = [os.getpid(), *(worker.pid for worker in source._messages._workers)]
            files.append(sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids))
            memory.append(sum(resident(pid) for pid in pids[1:]))
    source.close()
    # A batch on its way to this process holds a file for each of its three tensors on either side; up to four are.
    assert max(files[-10:]) - min(files[:10]) < 4 * 3 * 2 + 6, files
    assert max(memory[-10:]) - max(memory[:10]) < 8 << 20, memory  # the allocator's; the test above counts bytes
