"""Aspect buckets: one size in a batch, image and hint at the same place, an order that is kept and can be resumed."""

import json
from collections import Counter

import numpy as np
import pytest
import torch

from controlnet.data import DataError, build_loader
from controlnet.data.buckets import Buckets
from controlnet.data.samples import BadSample
from tests.controlnet.shard_files import png, write_tar

SIZES = ["16, 16", "16, 24", "24, 16"]
RAMP = 4  # steps of the coordinate grid between two pixels


def grid(width, height):
    """Red is the column, green the row, in equal steps."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.arange(width) * RAMP
    pixels[..., 1] = np.arange(height)[:, None] * RAMP
    return pixels


def write_shards(folder, shapes):
    """Shards of samples 0, 1, 2, ... whose image and hint are the same coordinate grid, without loss."""
    folder.mkdir(exist_ok=True)
    number = 0
    for i, of_shard in enumerate(shapes):
        files = []
        for width, height in of_shard:
            content = png(grid(width, height))
            files += [(f"{number:03d}.jpg", content), (f"{number:03d}.txt", b"grid"), (f"{number:03d}.png", content)]
            number += 1
        write_tar(folder / f"{i}.tar", files)
    return folder


def loader(folder, batch_size=2, num_workers=0, start=None, seed=0, flip=0.5, **buckets):
    buckets = buckets or {"sizes": SIZES, "random_crop": True}
    train = {"dataset_path": ["*.tar"], "buckets": buckets, "augmentations": {"horizontal_flip": flip}}
    data = {"num_workers": num_workers, "train": train, "webdataset": {"local_root_path": str(folder)}}
    return build_loader(data, factor=4, batch_size=batch_size, seed=seed, start=start)


def take(source, count):
    taken = []
    while len(taken) < count:
        for batch in source:
            taken.append(batch)
            if len(taken) == count:
                break
    return taken


MIXED = [[(40, 40), (60, 40), (40, 60), (33, 47)] * 3, [(50, 20), (20, 50), (16, 16), (24, 16)] * 3]


def test_a_batch_has_one_size_that_is_nearest_each_of_its_pictures(tmp_path):
    source = loader(write_shards(tmp_path, MIXED))
    shapes = dict(enumerate(shape for of_shard in MIXED for shape in of_shard))
    expected = {(40, 40): 16 / 16, (16, 16): 1, (60, 40): 1.5, (24, 16): 1.5, (50, 20): 1.5}
    expected |= {(40, 60): 1 / 1.5, (33, 47): 1 / 1.5, (20, 50): 1 / 1.5}
    seen = set()
    for batch in take(source, 3 * len(source)):
        height, width = batch["images"].shape[2:]
        assert batch["images"].shape == batch["hint"].shape == (2, 3, height, width)
        seen.add((height, width))
        for key, time_ids in zip(batch["keys"], batch["time_ids"].tolist(), strict=True):
            shape = shapes[int(key)]
            assert expected[shape] == width / height
            assert time_ids[:2] == [shape[1], shape[0]] and time_ids[4:] == [height, width]
    assert seen == {(16, 16), (16, 24), (24, 16)}


@pytest.mark.parametrize("shape", [(60, 60), (63, 41), (41, 63), (63, 20), (20, 63), (17, 16), (9, 13)])
def test_image_hint_and_time_ids_name_the_same_pixels(tmp_path, shape):
    """The coordinates that the pixels hold are those that the crop should have, in image and hint, to half a pixel."""
    source = loader(write_shards(tmp_path, [[shape] * 4]), batch_size=1)
    flips = set()
    for batch in take(source, 12):
        image = ((batch["images"][0] + 1) * 127.5 / RAMP).numpy()  # in pixels of the original
        hint = (batch["hint"][0] * 255 / RAMP).numpy()
        height, width, top, left, crop_height, crop_width = batch["time_ids"][0].tolist()
        scale = max(crop_width / width, crop_height / height)
        resized = max(crop_width, round(width * scale)), max(crop_height, round(height * scale))
        columns = (np.arange(left, left + crop_width) + 0.5) * width / resized[0] - 0.5
        flipped = hint[0, 0, -1] < hint[0, 0, 0]
        flips.add(bool(flipped))
        if flipped:  # the crop counts in the mirrored picture
            columns = width - 1 - columns
        rows = (np.arange(top, top + crop_height) + 0.5) * height / resized[1] - 0.5
        off = 0.5 * max(1, 1 / scale) + 1e-3  # nearest: half a pixel of the coarser grid
        assert np.abs(hint[0] - columns.clip(0, width - 1)).max() <= off
        assert np.abs(hint[1] - rows.clip(0, height - 1)[:, None]).max() <= off
        inner = np.s_[2:-2, 2:-2]  # bicubic bends at the border of the picture
        assert np.abs(image[0] - columns)[inner].max() <= 0.5
        assert np.abs(image[1] - rows[:, None])[inner].max() <= 0.5
    assert flips == {True, False}


def test_without_rare_shapes_starving_every_sample_is_used(tmp_path):
    """One picture of a rare shape waits over the end of its epoch for a batch to be full."""
    folder = write_shards(tmp_path, [[(40, 40)] * 7 + [(60, 40)]])
    source = loader(folder)
    assert len(source) == 4
    rare = [batch["keys"] for batch in take(source, 16) if batch["images"].shape[3] == 24]
    assert rare == [["007", "007"]] * 2  # once an epoch, two to a batch


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_order_can_be_resumed_with_samples_that_wait(tmp_path, num_workers):
    folder = write_shards(tmp_path, MIXED)
    source = loader(folder, batch_size=3, num_workers=num_workers)
    count = 4 * len(source)
    whole, positions = [], [source.position]
    for _ in range(count):
        whole += take(source, 1)
        positions.append(json.loads(json.dumps(source.position)))
    assert any(cursor[3] for position in positions for cursor in position["cursors"])  # some do wait
    for at in (1, 4, len(source), count - 3) if num_workers == 0 else (5,):
        again = loader(folder, batch_size=3, num_workers=num_workers, start=positions[at])
        rest = take(again, count - at)
        for one, other in zip(rest, whole[at:], strict=True):
            assert one["keys"] == other["keys"]
            assert torch.equal(one["images"], other["images"]) and torch.equal(one["time_ids"], other["time_ids"])
        assert again.position == positions[-1]
    counts = Counter(key for batch in whole for key in batch["keys"])
    assert set(counts) == {f"{number:03d}" for number in range(24)}


def test_other_buckets_start_the_epoch_anew(tmp_path):
    folder = write_shards(tmp_path, MIXED)
    source = loader(folder)
    take(source, 3)
    with pytest.warns(UserWarning, match=r"buckets was \[\[16, 16\], \[16, 24\], \[24, 16\]\], is \[\[16, 16\]\]"):
        loader(folder, start=source.position, sizes=["16"])


def test_sizes_by_area():
    buckets = Buckets.from_config({"area": 1024 * 1024, "step": 64, "max_aspect": 2}, {}, 8)
    assert (1024, 1024) in buckets.sizes and (832, 1216) in buckets.sizes and (1216, 832) in buckets.sizes
    for height, width in buckets.sizes:
        assert height % 64 == width % 64 == 0
        assert height * width <= 1024 * 1024 < height * (width + 64)
        assert max(height / width, width / height) <= 2
    assert len(set(buckets.sizes)) == len(buckets.sizes)
    place = buckets.place((3000, 2000), np.random.default_rng(0))
    assert place.box[3] - place.box[1] == 832 and place.box[2] - place.box[0] == 1216


def test_a_thread_of_a_picture_is_refused():
    buckets = Buckets.from_config({"sizes": ["512"]}, {}, 8)
    with pytest.raises(BadSample, match="^resized, has more than"):
        buckets.place((60000, 1), np.random.default_rng(0))


@pytest.mark.parametrize(
    ("buckets", "augmentations", "message"),
    [
        ({}, {}, "exactly one of sizes=None and area=None"),
        ({"sizes": ["64"], "area": 4096}, {}, "exactly one of"),
        ({"sizes": "64, 64"}, {}, "sizes is '64, 64'; expected a list"),
        ({"sizes": []}, {}, "expected a list"),
        ({"sizes": ["64, 60"]}, {}, "has 64 x 60; expected multiples of the factor 8"),
        ({"sizes": ["64", "64, 64"]}, {}, "has a size twice"),
        ({"sizes": ["big"]}, {}, "data.train.buckets.sizes: the crop is 'big'"),
        ({"sizes": ["64"], "steps": 3}, {}, "has the key 'steps'; expected sizes, area, step, max_aspect, random_crop"),
        ({"sizes": ["64"], "random_crop": 1}, {}, "random_crop is 1; expected true or false"),
        ({"area": "1M"}, {}, "area='1M'"),
        ({"area": 10**18}, {}, "area=1000000000000000000"),
        ({"area": 100, "step": 64}, {}, "no size in steps of 64 has an area of 100"),
        ({"area": -1}, {}, "no size"),
        ({"area": 4096, "step": 12}, {}, "step=12; expected pixels, the step in multiples of 8"),
        ({"area": 4096, "max_aspect": 0.5}, {}, "max_aspect is 0.5; expected 1 or more"),
        ({"sizes": ["64"]}, {"center_crop_h_w": 64}, "augmentations.center_crop_h_w is set, but data.train.buckets"),
        ({"sizes": ["64"]}, {"horizontal_flip": 3}, "horizontal_flip is 3.0"),
    ],
)
def test_settings_that_cannot_be(buckets, augmentations, message):
    with pytest.raises(DataError, match=message):
        Buckets.from_config(buckets, augmentations, 8)
