"""The batches of ranks and workers: whole, disjoint, equal in number, in an order that is kept and can be resumed."""

import gc
import json
import multiprocessing.process
import os
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter

import pytest
import torch

from controlnet.data import DataError, build_loader
from controlnet.data.shards import index_shard
from tests.controlnet.shard_files import jpeg, members, write_shard, write_tar

pytestmark = pytest.mark.filterwarnings("ignore:a hint is almost black")  # sample 5 has the value 5 everywhere


@pytest.fixture(autouse=True)
def forget_indexes():
    """Tests write different shards under equal names, faster than the clock of a file system ticks."""
    index_shard.cache_clear()


def data_config(folder, *, num_workers=0, train=None, **webdataset):
    augmentations = {"random_crop_h_w": 8, "horizontal_flip": 0.5}
    return {
        "num_workers": num_workers,
        "train": {"dataset_path": ["*.tar"], "augmentations": augmentations, **(train or {})},
        "webdataset": {"local_root_path": str(folder), **webdataset},
    }


def loader(folder, batch_size=2, seed=0, factor=4, rank=0, world_size=1, start=None, **options):
    data = data_config(folder, **options)
    return build_loader(
        data, factor=factor, batch_size=batch_size, seed=seed, rank=rank, world_size=world_size, start=start
    )


def shards(folder, sizes, size=8):
    """Shards of so many samples each, all samples different."""
    folder.mkdir(exist_ok=True)
    start = 0
    for i, count in enumerate(sizes):
        write_shard(folder / f"{i:03d}.tar", range(start, start + count), size)
        start += count
    return folder


def keys(batches):
    return [key for batch in batches for key in batch["keys"]]


def assert_same(some, others):
    assert [batch["keys"] for batch in some] == [batch["keys"] for batch in others]
    for one, other in zip(some, others, strict=True):
        assert one["captions"] == other["captions"]
        assert torch.equal(one["images"], other["images"]) and torch.equal(one["hint"], other["hint"])


def take(source, count):
    """The next `count` batches, over as many epochs as that needs."""
    taken = []
    while len(taken) < count:
        for batch in source:
            taken.append(batch)
            if len(taken) == count:
                break
    return taken


def test_a_batch_holds_whole_samples_in_the_promised_ranges(tmp_path):
    (batch,) = list(loader(shards(tmp_path, [4]), batch_size=4))
    assert batch["images"].shape == batch["hint"].shape == (4, 3, 8, 8)
    assert batch["images"].dtype == batch["hint"].dtype == torch.float32
    for i, key in enumerate(batch["keys"]):
        assert batch["captions"][i] == f"sample {int(key)}"
        assert torch.equal(batch["hint"][i], torch.full((3, 8, 8), int(key) / 255))
        assert (batch["images"][i] - (int(key) / 127.5 - 1)).abs().max() <= 1.01 / 127.5  # JPEG


def test_black_and_white_are_the_ends_of_the_ranges(tmp_path):
    write_tar(tmp_path / "0.tar", [(f"{n:03d}.{e}", d) for n in (0, 255) for e, d in members(n).items()])
    (batch,) = list(loader(tmp_path, shuffle_buffer=0))
    assert batch["images"].flatten(1).tolist() == [[-1.0] * 192, [1.0] * 192]
    assert batch["hint"].flatten(1).tolist() == [[0.0] * 192, [1.0] * 192]


@pytest.mark.parametrize(("world_size", "num_workers", "sharding"), [(1, 0, True), (2, 1, True), (2, 2, False)])
def test_an_epoch_has_every_sample_once_over_all_ranks(tmp_path, world_size, num_workers, sharding):
    folder = shards(tmp_path, [4] * 4)
    options = {"num_workers": num_workers, "world_size": world_size, "train": {"data_sharding": sharding}}
    sources = [loader(folder, rank=rank, **options) for rank in range(world_size)]
    epochs = [[keys(source) for source in sources] for _ in range(6)]
    for of_ranks in epochs:
        assert len({len(of_rank) for of_rank in of_ranks}) == 1
        assert Counter(sum(of_ranks, [])) == Counter(f"{n:05d}" for n in range(16))
    assert epochs[0][0] != epochs[1][0]  # another order
    if world_size > 1:
        assert (len({frozenset(of_ranks[0]) for of_ranks in epochs}) == 1) == sharding


def test_ranks_have_equally_many_batches_whatever_their_shards_hold(tmp_path):
    folder = shards(tmp_path, [9, 2])
    sources = [loader(folder, rank=rank, world_size=2) for rank in (0, 1)]
    batches = [list(source) for source in sources]
    assert [len(each) for each in batches] == [len(source) for source in sources] == [2, 2]
    assert set(keys(batches[0])) <= {f"{n:05d}" for n in range(9)}
    assert Counter(keys(batches[1])) == {"00009": 2, "00010": 2}  # gone through again


def test_the_infinite_sampler_draws_shards_for_ranks_that_would_have_none(tmp_path):
    folder = shards(tmp_path, [2, 2])
    sources = [loader(folder, rank=rank, world_size=3, batch_size=1, infinite_sampler=True) for rank in range(3)]
    batches = [keys(take(source, 40)) for source in sources]
    assert all(set(each) == {"00000", "00001", "00002", "00003"} for each in batches)
    assert len({tuple(each) for each in batches}) == 3


def test_the_order_follows_from_the_seed_and_the_rank(tmp_path):
    folder = shards(tmp_path, [16, 16])
    first = list(loader(folder, seed=1))
    assert_same(first, list(loader(folder, seed=1)))
    assert keys(first) != keys(loader(folder, seed=2))
    assert keys(loader(folder, seed=1, shuffle_buffer=0)) == [f"{n:05d}" for n in range(32)]
    small = keys(loader(folder, seed=1, shuffle_buffer=4))
    assert sorted(small) == sorted(keys(first)) and small != keys(first)


def damaged(folder):
    """Four shards of six, of whose samples some are damaged in different ways."""
    shards(folder, [6] * 4, size=12)
    files = [(f"{n:05d}.{e}", d) for n in range(100, 106) for e, d in members(n, 12).items()]
    files[3] = ("00101.jpg", files[3][1][:-40])
    files[7] = ("00102.txt", b"\xff\xfe\xfa")
    files[9] = ("00103.jpg", jpeg(torch.zeros(9, 12, 3, dtype=torch.uint8).numpy()))
    del files[14]  # hint of 00104
    write_tar(folder / "001.tar", files)
    return folder


DROPS = {
    "image not readable": "00101",
    "caption not UTF-8": "00102",
    "image and hint differ in size": "00103",
    "missing hint": "00104",
}


@pytest.mark.filterwarnings("ignore:left out")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_samples_are_counted_by_reason_and_shard_once_and_never_used(tmp_path, num_workers):
    folder = damaged(tmp_path)
    source = loader(folder, num_workers=num_workers)
    with pytest.warns(UserWarning, match="left out: missing hint, 00104 in .*001.tar"):
        seen = keys(take(source, 4 * len(source)))  # several epochs count nothing twice
    assert source.drops == {reason: {str(folder / "001.tar"): 1} for reason in DROPS}
    whole = {n for n in range(24) if not 6 <= n < 12} | {100, 105}
    assert set(seen) == {f"{n:05d}" for n in whole}


def test_a_shard_that_ends_inside_a_sample_is_never_mixed_with_the_next(tmp_path):
    # The case in which webdataset joins the image of one shard with the caption of the next: same key, cut between.
    first = write_tar(tmp_path / "000.tar", [(f"a.{e}", d) for e, d in members(1).items()])
    write_tar(tmp_path / "001.tar", [(f"{k}.{e}", d) for k, n in (("a", 2), ("b", 3)) for e, d in members(n).items()])
    whole = first.read_bytes()
    expected = {"sample 1": 1, "sample 2": 2, "sample 3": 3}
    for length in range(0, 4096, 256):
        first.write_bytes(whole[:length])
        index_shard.cache_clear()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            batches = take(loader(tmp_path, batch_size=1, train={"max_bad_fraction": 0.5}), 6)
        assert {batch["captions"][0] for batch in batches} <= set(expected)
        assert {"sample 2", "sample 3"} <= {batch["captions"][0] for batch in batches}
        for batch in batches:
            value = expected[batch["captions"][0]]
            assert torch.equal(batch["hint"], torch.full((1, 3, 8, 8), value / 255))
            assert (batch["images"] - (value / 127.5 - 1)).abs().max() <= 1.01 / 127.5


@pytest.mark.filterwarnings("ignore:left out")
@pytest.mark.parametrize(
    ("num_workers", "options"), [(0, {}), (0, {"infinite_sampler": True}), (2, {}), (0, {"shuffle_buffer": 3})]
)
def test_resuming_gives_the_same_batches_bit_for_bit_also_twice(tmp_path, num_workers, options):
    folder = damaged(tmp_path)
    options = {"num_workers": num_workers, "seed": 3, **options}
    source = loader(folder, **options)
    count = 2 * len(source) + 3
    whole, positions = [], [source.position]
    for _ in range(count):
        whole += take(source, 1)
        positions.append(json.loads(json.dumps(source.position)))  # plain data
    for at in (0, 1, 2, len(source), len(source) + 5) if num_workers == 0 else (5,):
        again = loader(folder, start=positions[at], **options)
        assert again.position == positions[at]
        assert_same(take(again, 2), whole[at : at + 2])
        assert again.position == positions[at + 2]
        twice = loader(folder, start=again.position, **options)
        assert_same(take(twice, count - at - 2), whole[at + 2 :])
        assert twice.position == positions[-1]


def test_a_position_of_another_layout_starts_its_epoch_anew_and_says_so(tmp_path):
    folder = shards(tmp_path, [8, 8])
    source = loader(folder)
    take(source, len(source) + 3)
    with pytest.warns(UserWarning, match="batch_size was 2, is 4.*epoch 1 starts anew"):
        again = loader(folder, batch_size=4, start=source.position)
    assert again.epoch == 1
    assert Counter(keys(again)) == Counter(f"{n:05d}" for n in range(16))


def test_a_position_of_before_there_were_buckets_goes_on(tmp_path):
    folder = shards(tmp_path, [8, 8])
    source = loader(folder)
    whole = take(source, 3)
    position = source.position
    position["cursors"] = [cursor[:3] for cursor in position["cursors"]]
    del position["layout"]["buckets"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the data order")
        assert_same(take(loader(folder, start=position), 5), take(source, 5))
    assert len(whole) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"world_size": 3}, "has 2 shards with samples; expected at least 3, one for each of 3 ranks x 1 workers"),
        (
            {"world_size": 2, "num_workers": 2},
            "has 2 shards with samples; expected at least 4, one for each of 2 ranks x 2 workers",
        ),
        ({"batch_size": 9}, "holds 8 usable samples; expected at least 9"),
        ({"batch_size": 9, "chunk_size": 4}, "holds 8 usable samples; expected at least 9"),
        ({"factor": 16}, "the crop is 8 x 8; expected multiples of the factor 16"),
        ({"train": {"dataset_path": []}}, "data.train.dataset_path is empty"),
        ({"train": {"extensions": {"picture": "jpg"}}}, "extensions names 'picture'; expected image, caption, hint"),
        ({"train": {"extensions": {"image": "pyd"}}}, "extensions.image is 'pyd'; expected image formats of jpg"),
        ({"train": {"extensions": {"image": "png"}}}, "gives one extension two roles"),
        ({"train": {"extensions": {"image": "npy"}}}, "extensions.image is 'npy'; expected image formats of jpg"),
        ({"train": {"hint": {"kind": "labels"}}}, "data.train.hint has kind labels and palette None"),
    ],
)
def test_what_cannot_work_is_one_error_before_the_first_batch(tmp_path, options, message):
    with pytest.raises(DataError, match=message):
        loader(shards(tmp_path, [4, 4]), **options)


def test_other_extensions_are_read(tmp_path):
    renamed = {"jpg": "photo.jpeg", "txt": "caption", "png": "seg.png"}
    files = [(f"{n}.{renamed[e]}", d) for n in (7, 8) for e, d in members(n).items()]
    write_tar(tmp_path / "0.tar", [*files, ("8.json", b"{}")])
    extensions = {"image": "photo.jpg;photo.jpeg", "caption": "caption", "hint": "seg.png"}
    source = loader(tmp_path, train={"extensions": extensions, "ignored_extensions": [".json"]})
    (batch,) = list(source)
    assert sorted(batch["captions"]) == ["sample 7", "sample 8"]
    assert source.drops == {}


@pytest.mark.filterwarnings("ignore:left out")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_too_many_bad_samples_end_the_run_with_their_reason(tmp_path, num_workers):
    files = [(f"{n:03d}.{e}", d) for n in range(120) for e, d in members(n).items() if e != "txt" or n % 10 or n > 50]
    write_tar(tmp_path / "0.tar", files)  # 6 of 120 without caption
    assert len(take(loader(tmp_path, train={"max_bad_fraction": 0.05}), 30)) == 30
    message = r"^6 of 120 samples cannot be used; .*max_bad_fraction=0.045.*6 left out as 'missing caption'"
    train = {"max_bad_fraction": 0.045}
    with pytest.raises(DataError, match=message):  # the headers alone say so
        loader(tmp_path, num_workers=num_workers, train=train)
    source = loader(tmp_path, num_workers=num_workers, train=train, chunk_size=114)  # which are not read at the start
    with pytest.raises(DataError, match=message):
        take(source, 30)


@pytest.mark.filterwarnings("ignore:left out")
def test_shards_without_a_usable_sample_are_an_error_and_not_an_endless_search(tmp_path):
    write_tar(tmp_path / "0.tar", [(f"{n}.{e}", d) for n in range(3) for e, d in members(n).items() if e != "png"])
    source = loader(tmp_path, chunk_size=3, train={"max_bad_fraction": 1})
    with pytest.raises(DataError, match="no sample for rank 0, worker 0 is whole .* 3 left out as 'missing hint'"):
        take(source, 1)
    shards(tmp_path, [3])
    filterings = {"resolution": {"method": "larger", "value": 9}, "estimated_portion": 1}
    source = loader(tmp_path, chunk_size=3, train={"dataset_path": ["000.tar"], "filterings": filterings})
    with pytest.raises(DataError, match="admitted by the filters; none was dropped as bad"):
        take(source, 1)


def test_filtered_samples_shorten_the_epoch_by_their_estimated_portion(tmp_path):
    small, large = (
        [(f"{n}.{e}", d) for n in ns for e, d in members(n, s).items()] for ns, s in ((range(4), 8), ((4, 5, 6, 7), 12))
    )
    write_tar(tmp_path / "0.tar", small + large)
    filterings = {"resolution": {"method": "larger", "value": 9}, "estimated_portion": 0.5}
    source = loader(tmp_path, train={"filterings": filterings})
    assert len(source) == 2
    assert sorted(keys(source)) == ["4", "5", "6", "7"]
    assert source.drops == {}


def test_workers_outlive_sigterm_and_sigint(tmp_path, monkeypatch):
    """From the first moment on: a signal that meets a process while it starts does not end it either."""
    start = multiprocessing.process.BaseProcess.start

    def start_and_signal(process):
        start(process)
        os.kill(process.pid, signal.SIGTERM)
        os.kill(process.pid, signal.SIGINT)

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", start_and_signal)
    source = loader(shards(tmp_path, [8, 8]), num_workers=2)
    before = take(source, 1)
    workers = source._messages._workers
    for worker in workers:
        os.kill(worker.pid, signal.SIGTERM)
        os.kill(worker.pid, signal.SIGINT)
    rest = take(source, 2 * len(source) - 1)
    assert all(worker.is_alive() for worker in workers)
    assert Counter(keys(before + rest)) == Counter({f"{n:05d}": 2 for n in range(16)})
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGTERM, signal.SIGINT}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_closed_loader_goes_on_where_it_stood(tmp_path, num_workers):
    folder = shards(tmp_path, [8, 8])
    whole = take(loader(folder, num_workers=num_workers), 12)
    source = loader(folder, num_workers=num_workers)
    batches = []
    for count in (1, 2, 9):
        batches += take(source, count)
        workers = getattr(source._messages, "_workers", [])
        source.close()
        assert not any(worker.is_alive() for worker in workers)
    assert_same(batches, whole)


def test_workers_end_with_a_loader_that_only_the_garbage_collector_finds(tmp_path):
    source = loader(shards(tmp_path, [8, 8]), num_workers=2)
    take(source, 1)
    workers = list(source._messages._workers)
    source.cycle = source
    del source
    begin = time.monotonic()
    gc.collect()
    for worker in workers:
        worker.join(20)
        assert not worker.is_alive()
    assert time.monotonic() - begin < 4.5  # PyTorch waits 5 s before it resorts to SIGTERM


def test_a_process_ends_soon_though_its_workers_ignore_signals(tmp_path):
    shards(tmp_path, [8, 8])
    code = f"""
import time
from controlnet.data import build_loader
data = {data_config(tmp_path, num_workers=2)!r}
source = build_loader(data, factor=4, batch_size=2, seed=0)
kept = [source, next(iter(source))]
kept.append(kept)  # a cycle: nothing is freed before the interpreter ends
print(time.time(), flush=True)
raise SystemExit(7)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 7, result.stderr
    assert time.time() - float(result.stdout) < 30
