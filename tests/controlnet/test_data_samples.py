"""One sample: the joint transform moves image and hint alike, and what cannot be decoded is refused."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from controlnet.data.hints import nearest
from controlnet.data.samples import BadSample, Resolution, Transform, read_sample
from controlnet.data.shards import DataError, index_shard
from tests.controlnet.shard_files import jpeg, members, png, write_tar

FORMATS = {"image": "JPEG", "hint": "PNG"}
AS_IT_IS = Transform(None, (8, 8), False, 0.0)


def saved(image, image_format):
    buffer = io.BytesIO()
    image.save(buffer, image_format, lossless=True)
    return buffer.getvalue()


def coordinates(width, height):
    """A picture whose red and green are a pixel's column and row, in steps that use the whole range."""
    grid = np.zeros((height, width, 3), dtype=np.uint8)
    grid[..., 0] = np.arange(width)[None, :] * 255 / (width - 1)
    grid[..., 1] = np.arange(height)[:, None] * 255 / (height - 1)
    return grid


def transformed(transform, pixels, seed):
    picture = Image.fromarray(pixels)
    placement = transform.place(picture.size, np.random.default_rng(seed))
    return placement.image(picture).astype(int), placement.hint(pixels).astype(int)


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


@pytest.mark.parametrize("random_crop", [False, True])
@pytest.mark.parametrize(("size", "resize"), [((97, 65), 48), ((50, 70), 63), ((33, 47), 67), ((101, 67), 61)])
def test_only_the_crop_is_resized_and_it_is_that_of_the_whole_resized(size, resize, random_crop):
    # Half contrast: Pillow clips between the two directions, in an order that depends on the sizes.
    pixels = np.random.default_rng(0).integers(64, 192, (size[1], size[0], 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    for seed in range(5):
        placement = Transform(resize, (32, 40), random_crop, 0.0).place(picture.size, np.random.default_rng(seed))
        assert min(placement.size) == resize
        whole = picture.resize(placement.size, Image.Resampling.BICUBIC).crop(placement.box)
        assert np.abs(placement.image(picture).astype(int) - np.asarray(whole)).max() <= 2  # a rounding per direction
        nearest = picture.resize(placement.size, Image.Resampling.NEAREST).crop(placement.box)
        assert (placement.hint(pixels) == np.asarray(nearest)).all()


def test_time_ids_say_where_a_pixel_of_the_crop_was():
    """The corner that they name, in the resized and mirrored picture, is the corner of the crop."""
    pixels = coordinates(96, 64)
    picture = Image.fromarray(pixels)
    flips = set()
    for seed in range(20):
        placement = Transform(48, (32, 40), True, 0.5).place(picture.size, np.random.default_rng(seed))
        height, width, top, left, crop_height, crop_width = placement.time_ids(picture.size)
        assert (height, width, crop_height, crop_width) == (64, 96, 32, 40)
        resized = nearest(pixels, placement.size, (0, 0, *placement.size))
        resized = resized[:, ::-1] if placement.flip else resized
        assert (placement.hint(pixels) == resized[top : top + crop_height, left : left + crop_width]).all()
        flips.add(placement.flip)
    assert flips == {True, False}


@pytest.mark.parametrize("size", [(60000, 1), (1, 60000), (60000, 2), (30000, 3)])
def test_a_thread_of_a_picture_is_refused_before_it_is_resized(size):
    with pytest.raises(BadSample, match=r"^resized, has more than \d+ pixels$"):
        Transform(512, (512, 512), False, 0.0).place(size, np.random.default_rng(0))


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
    sample = read(tmp_path, files)
    assert np.abs(sample.image.astype(int) - red).max() <= 2  # JPEG
    assert (sample.hint == hint).all()
    assert sample.caption == "ein Wäldchen"
    assert sample.time_ids == (8, 8, 0, 0, 8, 8)


def test_a_byte_order_mark_is_no_text(tmp_path):
    assert read(tmp_path, {**members(1), "txt": b"\xef\xbb\xbfa red house\r\n"})[2] == "a red house"


def test_the_content_says_what_a_picture_is_and_not_its_name(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image, hint, *_ = read(tmp_path, {"jpg": png(pixels), "txt": b"", "png": saved(Image.fromarray(pixels), "WEBP")})
    assert (image == pixels).all()
    assert hint.shape == (8, 8, 3)


def exif(orientation):
    block = Image.Exif()
    block[0x0112] = orientation
    return block


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("role", ["jpg", "png"])
def test_image_and_hint_are_turned_as_their_exif_says(tmp_path, orientation, role):
    """The stored picture is what turns into the seen one; both sides are compared with the seen one."""
    seen = np.zeros((8, 12, 3), np.uint8)
    seen[:4, :6], seen[4:, :6], seen[:4, 6:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's number of the transposition that stores it
    stored = Image.fromarray(seen)
    stored = stored if orientation == 1 else stored.transpose(undo[orientation])
    buffer = io.BytesIO()
    stored.save(buffer, "PNG", exif=exif(orientation))
    files = {"jpg": png(seen), "txt": b"", "png": png(seen), role: buffer.getvalue()}
    image, hint, *_ = read(tmp_path, files, Transform(None, (8, 12), False, 0.0))
    assert (image == seen).all() and (hint == seen).all()


def test_a_hint_made_without_the_exif_of_its_image_is_a_reason_of_its_own(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(coordinates(12, 8)).save(buffer, "JPEG", exif=exif(6))
    files = {"jpg": buffer.getvalue(), "txt": b"", "png": png(coordinates(12, 8))}
    with pytest.raises(BadSample, match="^image turned by its EXIF orientation, hint not$"):
        read(tmp_path, files)


def test_sizes_are_compared_before_anything_is_decoded(tmp_path, monkeypatch):
    large = Image.new("L", (4000, 3000))
    monkeypatch.setattr(Image.Image, "convert", None)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)
    with pytest.raises(BadSample, match="^image and hint differ in size$"):
        read(tmp_path, {**members(1), "png": saved(large, "PNG")})


def test_a_member_of_more_bytes_than_a_picture_has_is_not_read(tmp_path):
    path = write_tar(tmp_path / "one.tar", [(f"key.{extension}", data) for extension, data in members(1).items()])
    (sample,) = index_shard(str(path), (("jpg", "image"), ("txt", "caption"), ("png", "hint"))).samples
    sample.members["hint"] = (sample.members["hint"][0], (1 << 30) + 1)
    with pytest.raises(BadSample, match=r"^hint has more than \d+ bytes$"):
        read_sample(sample, FORMATS, AS_IT_IS, None, np.random.default_rng(0))


def test_another_file_of_the_shards_name_is_not_read_by_the_old_places(tmp_path):
    extensions = (("jpg", "image"), ("txt", "caption"), ("png", "hint"))
    path = write_tar(tmp_path / "one.tar", [(f"key.{extension}", data) for extension, data in members(1).items()])
    (sample,) = index_shard(str(path), extensions).samples
    write_tar(tmp_path / "two.tar", [(f"other.{extension}", data) for extension, data in members(2).items()])
    (tmp_path / "two.tar").replace(path)
    with pytest.raises(BadSample, match="^shard replaced while it was read$"):
        read_sample(sample, FORMATS, AS_IT_IS, None, np.random.default_rng(0))
    assert [found.key for found in index_shard(str(path), extensions).samples] == ["other"]


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
        ({"png": saved(Image.new("RGB", (8, 8)), "GIF")}, "hint not readable"),  # a format that is not tried
        ({"png": huge_png()}, r"hint has more than \d+ pixels"),
        ({"jpg": huge_png()}, r"image has more than \d+ pixels"),
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
    image, hint, *_ = read(tmp_path, files)
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
