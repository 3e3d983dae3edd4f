"""Decoding of hints: pictures, maps of class ids and arrays, with their warnings and errors."""

import io
import json
import warnings

import numpy as np
import pytest
from PIL import Image

from controlnet.data.hints import HintReader, read_hint
from controlnet.data.images import ImageError
from controlnet.data.palettes import PaletteError, palette
from tests.controlnet.shard_files import png

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def saved(image, image_format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def decode(data, reader=None, notes=None):
    reader = reader or HintReader()
    return reader.decode(reader.open(data), notes)


def labels(name="ade20k"):
    return HintReader.from_config({"kind": "labels", "palette": name})


class TestPictures:
    @pytest.mark.parametrize(
        ("channels", "expected"),
        [
            (1, RAMP[..., None]),
            (3, RAMP[..., None].repeat(3, 2)),
            (4, np.dstack([*[RAMP] * 3, np.full_like(RAMP, 255)])),
        ],
    )
    def test_gray_has_the_channels_asked_for(self, channels, expected):
        pixels = decode(png(RAMP), HintReader(channels))
        assert pixels.dtype == np.uint8
        assert (pixels == expected).all()

    def test_colour_becomes_gray_by_its_luminance(self):
        colours = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        gray = decode(png(colours), HintReader(1))
        assert gray.shape == (4, 4, 1)
        assert np.abs(gray[..., 0] - colours @ [0.299, 0.587, 0.114]).max() <= 1

    @pytest.mark.parametrize(("image_format", "dtype"), [("PNG", "<u2"), ("PPM", ">u2")])
    @pytest.mark.parametrize("channels", [1, 3, 4])
    def test_sixteen_bits_are_scaled_and_said(self, image_format, dtype, channels):
        deep = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
        data = (
            saved(Image.fromarray(deep), "PNG")
            if image_format == "PNG"
            else b"P5 8 8 65535 " + deep.astype(dtype).tobytes()
        )
        notes = []
        pixels = decode(data, HintReader(channels), notes)
        assert pixels.dtype == np.float32 and pixels.shape == (8, 8, channels)
        colours = pixels[..., :3]
        assert np.abs(colours - (deep / 65535)[..., None]).max() < 1e-6
        assert channels < 4 or (pixels[..., 3] == 1).all()
        assert notes == ["a hint has 16 bits: 65535 becomes 1"]

    def test_a_hint_keeps_more_than_eight_of_its_sixteen_bits(self):
        near = np.array([[32768, 32769]], dtype=np.uint16)
        pixels = decode(saved(Image.fromarray(near)))
        assert pixels[0, 0, 0] < pixels[0, 1, 0]

    @pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
    def test_transparency_lies_on_the_ground(self, mode):
        strokes = np.zeros((16, 16, 4), np.uint8)
        strokes[4:6, :, 3] = 255  # black strokes on nothing, as drawing programs save a scribble
        if mode == "P":
            indexed = Image.fromarray((strokes[..., 3] > 0).astype(np.uint8)).convert("P")
            indexed.putpalette([9, 9, 9, 0, 0, 0])
            data = saved(indexed, transparency=0)
        else:
            data = saved(Image.fromarray(strokes).convert(mode))
        seen = np.full((16, 16, 3), 255, np.uint8)
        seen[4:6] = 0
        assert (decode(data) == seen).all()
        ground = HintReader.from_config({"ground": "#0000ff"})
        assert (decode(data, ground)[0, 0] == (0, 0, 255)).all()
        assert (decode(data, HintReader(1)) == seen[..., :1]).all()

    def test_four_channels_keep_the_transparency(self):
        pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 4), dtype=np.uint8)
        assert (decode(saved(Image.fromarray(pixels)), HintReader(4)) == pixels).all()

    def test_strokes_that_vanish_in_the_ground_are_noted(self):
        white = np.full((8, 8, 4), 255, np.uint8)
        white[:4, :, 3] = 0
        for reader, count in ((HintReader(), 1), (HintReader.from_config({"ground": "black"}), 0)):
            notes = []
            decode(saved(Image.fromarray(white)), reader, notes)
            assert len(notes) == count
            assert all("data.train.hint.ground" in note for note in notes)

    @pytest.mark.parametrize(
        ("pixels", "noted"),
        [
            (np.array([[0, 1, 7]], np.uint8), True),
            (np.array([[0, 1, 7, 255]], np.uint8), True),  # 255 is unlabelled
            (np.array([[[0, 5, 15]]], np.uint8), True),
            (np.array([[0, 4000]], np.uint16), True),  # a depth in millimetres
            (np.array([[0, 16]], np.uint8), False),
            (np.array([[0, 0]], np.uint8), False),  # nothing there: an edge map without edges
            (np.array([[0, 255]], np.uint8), False),  # a mask
            (np.array([[255, 255]], np.uint8), False),
        ],
    )
    def test_a_hint_that_is_almost_black_is_noted_with_the_option(self, pixels, noted):
        notes = []
        decode(saved(Image.fromarray(pixels)), notes=notes)
        assert any("data.train.hint={kind: labels, palette: ade20k}" in note for note in notes) == noted

    @pytest.mark.parametrize(
        ("data", "channels", "reason"),
        [
            (saved(Image.new("F", (2, 2)), "PPM"), 3, "has floating-point pixels"),
            (saved(Image.new("RGB", (2, 2)), "GIF"), 3, "not readable"),
            (png(RAMP), 2, "is no .npy, which alone can have 2 channels"),
            (png(RAMP)[:-30], 3, "not readable"),
        ],
    )
    def test_what_cannot_be_decoded(self, data, channels, reason):
        with pytest.raises(ImageError, match=f"^{reason}"):
            decode(data, HintReader(channels))


class TestArrays:
    @pytest.mark.parametrize("order", ["C", "F"])
    @pytest.mark.parametrize("channels", [1, 2, 3, 7])
    def test_any_number_of_channels(self, channels, order):
        array = np.random.default_rng(0).random((5, 4, channels)).astype(np.float32)
        assert (decode(npy(np.asarray(array, order=order)), HintReader(channels)) == array).all()
        if channels == 1:
            assert (decode(npy(array[..., 0]), HintReader(1)) == array).all()

    @pytest.mark.parametrize(
        ("dtype", "white"), [(np.uint8, 255), (np.uint16, 65535), (bool, True), (np.float64, 1.0), (">f4", 1.0)]
    )
    def test_white_is_white_in_every_dtype(self, dtype, white):
        pixels = decode(npy(np.array([[0, white]]).astype(dtype)), HintReader(1))
        assert (pixels / (255 if pixels.dtype == np.uint8 else 1)).flatten().tolist() == [0, 1]

    @pytest.mark.parametrize(
        ("data", "reason"),
        [
            (npy(np.zeros((4, 4, 2), np.uint8)), "has 2 channels, where hint_channels is 3"),
            (npy(np.zeros((4, 4, 3), np.int64)), "is an array of int64"),
            (npy(np.full((4, 4, 3), np.nan)), "is an array with NaN or infinity"),
            (npy(np.zeros((4,), np.uint8)), r"is an array \(4,\) of uint8"),
            (npy(np.zeros((0, 4, 3), np.uint8)), r"is an array \(0, 4, 3\)"),
            (npy(np.array([[[print]]], dtype=object)), r"is an array \(1, 1, 1\) of object"),
            (npy(np.zeros((4, 4, 3), np.uint8))[:-1], "not readable"),
            (npy(np.zeros((4, 4, 3), np.uint8)) + b"x", "not readable"),
            (b"\x93NUMPY", "not readable"),
            (npy(np.zeros((4, 4, 3), np.uint8)).replace(b"(4, 4", b"\x00(4,4"), "not readable"),
            (
                npy(np.zeros((4, 4, 3), np.uint8)).replace(b"'fortran", b"(fortran").replace(b"(4", b"'4"),
                "not readable",
            ),
            (b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535, "not readable"),
        ],
    )
    def test_what_cannot_be_used(self, data, reason):
        with pytest.raises(ImageError, match=f"^{reason}"):
            decode(data)

    def test_a_claimed_shape_costs_nothing(self):
        data = npy(np.zeros((4, 4, 3), np.uint8)).replace(b"(4, 4, 3)", b"(9999, 9999, 3)".ljust(9))
        with pytest.raises(ImageError, match="^(not readable|has more than)"):
            decode(data)


class TestLabelMaps:
    def test_ade20k_has_the_colours_that_published_models_know(self):
        """Wall, building, sky and the last class as MMSegmentation draws them; 0 and 255 are in no class."""
        ids = np.array([[1, 2, 3, 150, 0, 255]], np.uint8)
        colours = [(120, 120, 120), (180, 120, 120), (6, 230, 230), (92, 0, 255), (0, 0, 0), (0, 0, 0)]
        assert decode(png(ids), labels()).tolist() == [[list(colour) for colour in colours]]

    def test_cocostuff_skips_the_ids_that_coco_never_annotated(self):
        """Person, traffic light, fire hydrant (after one unused id) and the last class."""
        ids = np.array([[0, 9, 10, 12, 181, 255]], np.uint8)
        colours = [(0, 192, 64), (128, 192, 64), (128, 32, 192), (0, 0, 224), (64, 64, 0), (0, 0, 0)]
        assert decode(png(ids), labels("cocostuff")).tolist() == [[list(colour) for colour in colours]]
        with pytest.raises(ImageError, match="^has class id 11, which the palette cocostuff does not colour$"):
            decode(png(np.array([[11]], np.uint8)), labels("cocostuff"))

    @pytest.mark.parametrize("name", ["colours.json", "object.json", "colours.csv", "names.csv"])
    def test_a_palette_from_a_file(self, tmp_path, name):
        content = {
            "colours.json": json.dumps([[1, 2, 3], [4, 5, 6]]),
            "object.json": json.dumps({"0": [1, 2, 3], "1": [4, 5, 6]}),
            "colours.csv": "\ufeff0,1,2,3\n1,4,5,6\n",
            "names.csv": "id,red,green,blue\r\n0, 1, 2, 3\r\n\r\n1,4,5,6\r\n",
        }[name]
        (tmp_path / name).write_text(content, encoding="utf-8")
        reader = labels(str(tmp_path / name))
        assert decode(png(np.array([[1, 0, 255]], np.uint8)), reader).tolist() == [[[4, 5, 6], [1, 2, 3], [0, 0, 0]]]

    def test_ids_are_the_indices_of_a_palette_picture_and_may_have_16_bits(self, tmp_path):
        ids = np.array([[0, 300]], np.uint16)
        (tmp_path / "wide.json").write_text(json.dumps({"0": [0, 0, 0], "300": [7, 8, 9]}))
        wide = labels(str(tmp_path / "wide.json"))
        assert decode(saved(Image.fromarray(ids)), wide).tolist() == [[[0, 0, 0], [7, 8, 9]]]
        assert decode(npy(ids), wide).tolist() == [[[0, 0, 0], [7, 8, 9]]]
        indexed = Image.fromarray(np.array([[1, 2]], np.uint8)).convert("P")
        indexed.putpalette([9, 9, 9] * 3)
        assert decode(saved(indexed), labels())[0, 0].tolist() == [120, 120, 120]

    def test_no_note_calls_a_label_map_almost_black(self):
        notes = []
        decode(png(np.array([[1, 2]], np.uint8)), labels(), notes)
        assert notes == []

    @pytest.mark.parametrize(
        ("data", "reason"),
        [
            (png(np.zeros((2, 2, 3), np.uint8)), "is a picture of mode RGB; a label map has one channel"),
            (png(np.array([[151]], np.uint8)), "has class id 151, which the palette ade20k does not colour"),
            (npy(np.zeros((2, 2, 3), np.uint8)), "is an array"),
            (npy(np.array([[-1]])), "is an array"),
        ],
    )
    def test_what_is_no_label_map(self, data, reason):
        with pytest.raises(ImageError, match=f"^{reason}"):
            decode(data, labels())

    @pytest.mark.parametrize(
        "content",
        ["", "[]", "[[1, 2]]", "[[1, 2, 256]]", '{"-1": [1, 2, 3]}', '{"70000": [1, 2, 3]}', "{", "1,2,3\n", "7"],
    )
    def test_what_is_no_palette(self, tmp_path, content):
        (tmp_path / "p").write_text(content)
        with pytest.raises(PaletteError, match="expected a JSON list"):
            palette(str(tmp_path / "p"))

    def test_a_palette_that_is_not_there(self):
        with pytest.raises(PaletteError, match="'ade' is neither ade20k, nor cocostuff, nor a file"):
            palette("ade")


@pytest.mark.parametrize(
    ("hint", "channels", "message"),
    [
        ({"kind": "label"}, 3, "data.train.hint.kind is 'label'; expected picture or labels"),
        ({"kind": "labels"}, 3, "a palette belongs to kind labels"),
        ({"palette": "ade20k"}, 3, "a palette belongs to kind labels"),
        ({"kind": "labels", "palette": "ade20k"}, 1, "hint_channels is 1, not 3"),
        ({"kind": "labels", "palette": "cityscapes"}, 3, "data.train.hint.palette: .*'cityscapes' is neither"),
        ({"ground": "transparent-ish"}, 3, "data.train.hint.ground is 'transparent-ish'"),
        ({"ground": 3}, 3, "data.train.hint.ground is 3"),
        ({"colour": "white"}, 3, "data.train.hint has the key 'colour'"),
        ({}, 0, "hint_channels is 0"),
    ],
)
def test_settings_that_cannot_be(hint, channels, message):
    with pytest.raises(ValueError, match=message):
        HintReader.from_config(hint, channels)


class TestReadHint:
    def test_it_is_what_training_decodes(self, tmp_path):
        colours = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)
        (tmp_path / "a.png").write_bytes(png(colours))
        hint = read_hint(tmp_path / "a.png")
        assert hint.shape == (1, 3, 6, 4)
        assert (hint[0].permute(1, 2, 0).numpy() == colours.astype(np.float32) / 255).all()
        larger = read_hint(tmp_path / "a.png", (8, 12))
        assert (larger[0, :, ::2, ::2] == hint[0]).all() and (larger[0, :, 1::2, 1::2] == hint[0]).all()

    def test_what_is_noted_is_a_warning_with_the_file(self, tmp_path):
        (tmp_path / "a.png").write_bytes(png(np.array([[1, 2]], np.uint8)))
        with pytest.warns(UserWarning, match=r"a\.png: a hint is almost black"):
            read_hint(tmp_path / "a.png")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert read_hint(tmp_path / "a.png", reader=labels())[0, :, 0, 0].mul(255).tolist() == [120, 120, 120]

    def test_what_cannot_be_read_names_the_file(self, tmp_path):
        (tmp_path / "a.png").write_bytes(b"text")
        with pytest.raises(
            ValueError, match=r"a\.png cannot be read as an image: it is no JPEG, PNG, WebP, PNM or \.npy"
        ):
            read_hint(tmp_path / "a.png")
        with pytest.raises(FileNotFoundError):
            read_hint(tmp_path / "absent.png")
