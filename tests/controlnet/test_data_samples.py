"""One sample: the joint transform moves image and hint alike, and what cannot be decoded is refused."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from controlnet.data.samples import BadSample, Resolution, Transform, read_sample
from controlnet.data.shards import DataError, index_shard
from tests.controlnet.shard_files import jpeg, members, png, write_tar

FORMATS = {"image": "JPEG", "hint": "PNG"}
AS_IT_IS = Transform(None, (8, 8), False, 0.0)


def coordinates(width, height):
    """A picture whose red and green are a pixel's column and row, in steps that use the whole range."""
    grid = np.zeros((height, width, 3), dtype=np.uint8)
    grid[..., 0] = np.arange(width)[None, :] * 255 / (width - 1)
    grid[..., 1] = np.arange(height)[:, None] * 255 / (height - 1)
    return grid


def transformed(transform, pixels, seed):
    image, hint = transform(Image.fromarray(pixels), Image.fromarray(pixels), np.random.default_rng(seed))
    return np.asarray(image).astype(int), np.asarray(hint).astype(int)


@pytest.mark.parametrize("random_crop", [False, True])
def test_without_resizing_image_and_hint_stay_equal(random_crop):
    pixels = coordinates(50, 40)
    for seed in range(20):
        image, hint = transformed(Transform(None, (32, 24), random_crop, 0.5), pixels, seed)
        assert image.shape == (32, 24, 3)
        assert (image == hint).all()


@pytest.mark.parametrize(("size", "resize"), [((96, 64), 48), ((50, 70), 64), ((64, 64), 33), ((33, 47), 66)])
def test_resizing_keeps_every_pixel_of_the_hint_at_its_place_in_the_image(size, resize):
    pixels = coordinates(*size)
    # Nearest neighbour is at most half a source pixel off, bicubic of a ramp is exact but for its border.
    scale = min(size) / resize
    step = [255 / (side - 1) for side in size]
    for seed in range(10):
        image, hint = transformed(Transform(resize, (32, 32), True, 0.5), pixels, seed)
        for channel in (0, 1):
            off = np.abs(image - hint)[..., channel].max()
            assert off <= (0.5 * max(1, scale) + 0.5) * step[channel] + 2, (seed, channel, off)
        # The grid is monotone: a shift by more than the bound, or a flip of one alone, cannot hide in it.
        rising = image[:, -1, 0] > image[:, 0, 0]
        assert rising.all() or not rising.any()
        assert (rising == (hint[:, -1, 0] > hint[:, 0, 0])).all()


def test_labels_stay_labels():
    labels = np.random.default_rng(0).choice([0, 90, 255], size=(37, 53, 3)).astype(np.uint8)
    _, hint = transformed(Transform(64, (48, 48), True, 0.5), labels, 1)
    assert set(np.unique(hint)) == {0, 90, 255}


def test_crops_are_where_they_should_be():
    pixels = np.arange(6 * 4 * 3, dtype=np.uint8).reshape(4, 6, 3)
    center, _ = transformed(Transform(None, (2, 2), False, 0.0), pixels, 0)
    assert (center == pixels[1:3, 2:4]).all()
    corners = {transformed(Transform(None, (2, 2), True, 0.0), pixels, seed)[0][0, 0, 0] for seed in range(200)}
    assert corners == {pixels[top, left, 0] for top in range(3) for left in range(5)}


def test_flips_come_with_their_probability():
    pixels = coordinates(8, 8)
    for probability, low, high in ((0.0, 0, 0), (1.0, 400, 400), (0.25, 70, 130)):  # 100 +- 3.5 standard deviations
        flip = Transform(None, (8, 8), False, probability)
        flipped = sum(transformed(flip, pixels, seed)[0][0, 0, 0] == 255 for seed in range(400))
        assert low <= flipped <= high


@pytest.mark.parametrize(
    ("augmentations", "expected"),
    [
        ({"center_crop_h_w": "64, 32"}, Transform(None, (64, 32), False, 0.0)),
        ({"random_crop_h_w": [64, 32], "horizontal_flip": True}, Transform(None, (64, 32), True, 0.5)),
        (
            {"center_crop_h_w": 64, "resize_smallest_side": 70, "horizontal_flip": 0.2},
            Transform(70, (64, 64), False, 0.2),
        ),
    ],
)
def test_augmentations_are_read(augmentations, expected):
    assert Transform.from_config(augmentations, 8) == expected


@pytest.mark.parametrize(
    ("augmentations", "message"),
    [
        ({}, "exactly one of center_crop_h_w=None"),
        ({"center_crop_h_w": 8, "random_crop_h_w": 8}, "exactly one of"),
        ({"center_crop_h_w": "64, 60"}, "the crop is 64 x 60; expected multiples of the factor 8"),
        ({"center_crop_h_w": "big"}, "the crop is 'big'"),
        ({"center_crop_h_w": [8, 8, 8]}, r"the crop is \[8, 8, 8\]"),
        ({"center_crop_h_w": 0}, "the crop is 0"),
        ({"center_crop_h_w": 64, "resize_smallest_side": 32}, "resize_smallest_side is 32; expected at least the crop"),
        ({"center_crop_h_w": 64, "horizontal_flip": 2}, "horizontal_flip is 2.0"),
    ],
)
def test_augmentations_that_cannot_be(augmentations, message):
    with pytest.raises(DataError, match=message):
        Transform.from_config(augmentations, 8)


def read(tmp_path, files, transform=AS_IT_IS, resolution=None, formats=FORMATS):
    extensions = (("jpg", "image"), ("txt", "caption"), ("png", "hint"))
    path = write_tar(tmp_path / "one.tar", [(f"key.{extension}", data) for extension, data in files.items()])
    index_shard.cache_clear()
    (sample,) = index_shard(str(path), extensions).samples
    return read_sample(sample, formats, transform, resolution, np.random.default_rng(0))


def test_a_sample_is_read_as_it_was_written(tmp_path):
    red = np.zeros((8, 8, 3), dtype=np.uint8)
    red[..., 0] = 255
    hint = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    files = {"jpg": jpeg(red), "txt": "  ein Wäldchen\n".encode(), "png": png(hint)}
    image, seen, caption = read(tmp_path, files)
    assert np.abs(image.astype(int) - red).max() <= 2  # JPEG
    assert (seen == hint).all()
    assert caption == "ein Wäldchen"


def test_a_hint_of_labels_becomes_rgb(tmp_path):
    labels = np.random.default_rng(0).integers(0, 3, (8, 8), dtype=np.uint8)
    gray = read(tmp_path, {**members(1), "png": png(labels)})[1]
    assert (gray == labels[..., None]).all()
    palette = Image.fromarray(labels).convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    buffer = io.BytesIO()
    palette.save(buffer, "PNG")
    colours = np.array([(10, 20, 30), (40, 50, 60), (70, 80, 90)])
    assert (read(tmp_path, {**members(1), "png": buffer.getvalue()})[1] == colours[labels]).all()


def saved(image, image_format):
    buffer = io.BytesIO()
    image.save(buffer, image_format)
    return buffer.getvalue()


SIXTEEN_BIT = saved(Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000), "PNG")


def huge_png():
    """A PNG that claims to have 60000 x 60000 pixels."""
    data = bytearray(png(np.zeros((8, 8, 3), np.uint8)))
    data[16:24] = struct.pack(">II", 60000, 60000)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ({"jpg": jpeg(np.zeros((8, 9, 3), np.uint8))}, "image and hint differ in size"),
        ({"txt": b"caf\xe9"}, "caption not UTF-8"),
        ({"jpg": b""}, "image not readable"),
        ({"png": b"label map"}, "hint not readable"),
        ({"png": saved(Image.new("RGB", (8, 8)), "GIF")}, "hint not readable"),  # only what the extension says
        ({"png": huge_png()}, "hint not readable"),
        ({"png": SIXTEEN_BIT}, "hint not 8 bits a channel"),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_reason(tmp_path, damage, reason):
    with pytest.raises(BadSample, match=f"^{reason}$"):
        read(tmp_path, {**members(1), **damage})


def test_an_image_smaller_than_the_crop_is_refused(tmp_path):
    with pytest.raises(BadSample, match="^smaller than the crop$"):
        read(tmp_path, members(1), Transform(None, (16, 8), False, 0.0))


def test_an_image_or_hint_cut_anywhere_is_refused_or_whole(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    files = {"jpg": jpeg(pixels), "txt": b"", "png": png(pixels)}
    image, hint, _ = read(tmp_path, files)
    for extension in ("jpg", "png"):
        refused = 0
        for length in range(0, len(files[extension]), 3):
            try:
                again = read(tmp_path, {**files, extension: files[extension][:length]})
            except BadSample:
                refused += 1
            else:  # only an end marker or a trailing chunk was lost
                assert (again[0] == image).all() and (again[1] == hint).all()
        assert refused > 0.9 * len(files[extension]) / 3


def test_damaged_bytes_give_a_refusal_or_a_picture_and_nothing_else(tmp_path):
    rng = np.random.default_rng(0)
    files = {**members(1), "jpg": jpeg(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))}
    for extension in ("jpg", "png"):
        refused = 0
        for _ in range(150):
            damaged = bytearray(files[extension])
            for at in rng.integers(0, len(damaged), size=4):
                damaged[at] = rng.integers(256)
            try:
                result = read(tmp_path, {**files, extension: bytes(damaged)})
                assert result[0].shape == result[1].shape == (8, 8, 3)
            except BadSample:
                refused += 1
        assert refused > 10


def test_filtered_sizes_are_left_out_without_being_bad(tmp_path):
    files = members(1, size=16)
    crop = Transform(None, (8, 8), False, 0.0)
    assert read(tmp_path, files, crop, Resolution("larger", 17)) is None
    assert read(tmp_path, files, crop, Resolution("larger", 16)) is not None
    assert read(tmp_path, files, crop, Resolution("smaller", 15)) is None
    assert read(tmp_path, files, crop, Resolution("smaller", 16)) is not None
    with pytest.raises(DataError, match="resolution is method='bigger', value=3"):
        Resolution.from_config({"resolution": {"method": "bigger", "value": 3}})
