"""`python -m controlnet.shards`: folders, tables and img2dataset's tars become shards that training reads."""

import io
import json
import shlex
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from controlnet import shards
from controlnet.data import build_loader, writing
from controlnet.data.shards import read_wdinfo
from tests.controlnet.shard_files import jpeg, png, write_tar

SIZE = 16


def picture(number):
    return np.random.default_rng(number).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.fixture
def images(tmp_path):
    """Five images with captions and, in another folder, hints."""
    for number in range(5):
        write(tmp_path / "images" / f"{number}.jpg", jpeg(picture(number)))
        write(tmp_path / "images" / f"{number}.txt", f"picture {number}\n")
        write(tmp_path / "maps" / f"{number}.png", png(picture(number)))
    return tmp_path


def run(capsys, *arguments):
    """(exit status, stdout, stderr)"""
    status = shards.main([*map(str, arguments), *([] if "--check" in arguments else ["--workers", "0"])])
    said = capsys.readouterr()
    return status, said.out, said.err


def load(folder, channels=3, **train):
    """The batch of all samples of a folder of shards, by key."""
    data = {
        "train": {"dataset_path": [str(folder / "wdinfo.pkl")], "augmentations": {"center_crop_h_w": SIZE}, **train}
    }
    count = read_wdinfo(str(folder / "wdinfo.pkl"))[1]
    (batch,) = list(build_loader(data, factor=4, batch_size=count, seed=0, hint_channels=channels))
    order = np.argsort(batch["keys"])
    pixels = {name: (batch[name][order].permute(0, 2, 3, 1) * 255).round().numpy() for name in ("hint",)}
    return [batch["keys"][i] for i in order], [batch["captions"][i] for i in order], pixels["hint"]


class TestSources:
    def test_a_folder_with_hints_in_another(self, images, capsys):
        status, said, _ = run(capsys, images / "images", images / "out", "--hints", images / "maps", "--shard-size", 2)
        assert status == 0
        assert "5 samples can be used, 0 cannot" in said
        assert read_wdinfo(str(images / "out" / "wdinfo.pkl")) == (["00000.tar", "00001.tar", "00002.tar"], 5)
        keys, captions, hints = load(images / "out")
        assert keys == list("01234")
        assert captions == [f"picture {number}" for number in range(5)]
        assert (hints == np.stack([picture(number) for number in range(5)])).all()

    def test_image_caption_and_hint_of_one_name_in_subfolders(self, tmp_path, capsys):
        for name in ("a/1", "b/1.v2"):
            write(tmp_path / "data" / f"{name}.jpg", jpeg(picture(1)))
            write(tmp_path / "data" / f"{name}.txt", "\ufeffa red house")
            write(tmp_path / "data" / f"{name}.png", png(picture(2)))
        write(tmp_path / "data" / ".thumbnails" / "x.jpg", b"hidden")
        status, *_ = run(capsys, tmp_path / "data", tmp_path / "out")
        assert status == 0
        keys, captions, hints = load(tmp_path / "out")
        assert (keys, captions) == (["a/1", "b/1_v2"], ["a red house"] * 2)
        assert (hints == picture(2)).all()

    @pytest.mark.parametrize(
        ("name", "table"),
        [
            ("t.csv", 'image,caption,hint\n1.jpg,"a, ""big""\nhouse",../maps/1.png\n2.jpg,two,../maps/2.png\n'),
            (
                "metadata.tsv",
                'file_name\ttext\tcontrol\n1.jpg\t"a, ""big""\nhouse"\t../maps/1.png\n2.jpg\ttwo\t../maps/2.png\n',
            ),
            (
                "prompt.json",  # the original ControlNet's: a line for each sample
                '{"source": "../maps/1.png", "target": "1.jpg", "prompt": "a, \\"big\\"\\nhouse"}\n'
                '{"source": "../maps/2.png", "target": "2.jpg", "prompt": "two"}\n',
            ),
            (
                "metadata.jsonl",  # Hugging Face's; no column of hints
                '{"file_name": "1.jpg", "text": "a, \\"big\\"\\nhouse"}\n\n{"file_name": "2.jpg", "text": "two"}\n',
            ),
            (
                "list.json",
                json.dumps([{"path": "1.jpg", "prompt": 'a, "big"\nhouse'}, {"path": "2.jpg", "prompt": "two"}]),
            ),
        ],
    )
    def test_a_table(self, images, capsys, name, table):
        write(images / name, "\ufeff" + table)
        hints = [] if "maps" in table else ["--hints", images / "maps"]
        status, said, _ = run(capsys, images / "images", images / "out", "--table", images / name, *hints)
        assert status == 0, said
        keys, captions, pixels = load(images / "out")
        assert (keys, captions) == (["1", "2"], ['a, "big"\nhouse', "two"])
        assert (pixels == np.stack([picture(1), picture(2)])).all()

    def test_what_img2dataset_wrote(self, tmp_path, capsys):
        (tmp_path / "laion").mkdir()
        for tar in (0, 1):
            files = []
            for number in (0, 1):
                key = f"{tar:05d}{number:04d}"
                files += [
                    (f"{key}.jpg", jpeg(picture(number))),
                    (f"{key}.txt", f"{key}".encode()),
                    (f"{key}.json", b"{}"),
                ]
            write_tar(tmp_path / "laion" / f"{tar:05d}.tar", files)
        (tmp_path / "laion" / "00000.parquet").write_bytes(b"")
        (tmp_path / "laion" / "00000_stats.json").write_text("{}")
        status, *_ = run(capsys, tmp_path / "laion", tmp_path / "out", "--hint", "canny")
        assert status == 0
        keys, captions, hints = load(tmp_path / "out")
        assert keys == captions == ["000000000", "000000001", "000010000", "000010001"]
        assert set(np.unique(hints)) == {0, 255}

    def test_tars_with_hints_and_some_captions(self, tmp_path, capsys):
        files = [("a.jpg", jpeg(picture(1))), ("a.txt", b"a red house"), ("a.png", png(picture(1)))]
        files += [("b.jpg", jpeg(picture(2))), ("b.png", png(picture(2)))]
        (tmp_path / "tars").mkdir()
        write_tar(tmp_path / "tars" / "0.tar", files)
        assert run(capsys, tmp_path / "tars", tmp_path / "one")[0] == 0
        assert load(tmp_path / "one")[:2] == (["a"], ["a red house"])
        assert run(capsys, tmp_path / "tars", tmp_path / "two", "--caption", "a picture")[0] == 0
        keys, captions, hints = load(tmp_path / "two")
        assert (keys, captions) == (["a", "b"], ["a red house", "a picture"])
        assert (hints == np.stack([picture(1), picture(2)])).all()

    def test_images_in_every_format_that_is_read_and_a_caption_for_all(self, tmp_path, capsys):
        for number, image_format in enumerate(("JPEG", "PNG", "WEBP")):
            (tmp_path / "images").mkdir(exist_ok=True)
            Image.fromarray(picture(number)).save(
                tmp_path / "images" / f"{number}.{image_format.lower()}", lossless=True
            )
        arguments = ["--hint", "canny", "--caption", ""]
        status, *_ = run(capsys, tmp_path / "images", tmp_path / "out", *arguments)
        assert status == 0
        assert load(tmp_path / "out")[:2] == (["0", "1", "2"], [""] * 3)

    def test_what_cannot_become_a_sample_is_said_with_its_cure(self, images, capsys):
        folder = images / "images"
        (folder / "0.txt").unlink()
        (images / "maps" / "1.png").unlink()
        write(folder / "2.jpg", b"no picture")
        write(images / "maps" / "3.png", png(picture(3)[:8]))
        write(folder / "x.tiff", b"")
        write(folder / "4.png", png(picture(4)))
        status, said, err = run(capsys, folder, images / "out", "--hints", images / "maps")
        assert status == 1
        for reason, cure in (
            ("no caption: for example 0 in", "--captions or --table"),
            ("no hint: for example 1 in", "--hint canny"),
            ("image not readable: for example 2 in", ""),
            ("image and hint differ in size: for example 3 in", "the size of its image"),
            ("two images of one name: for example 4 in", "a name of its own"),
            ("format not read: for example x in", "(.tiff)"),
        ):
            assert f"1 x {reason}" in said and cure in said
        assert "0 samples can be used, 6 cannot" in said
        assert "nothing of" in err
        assert not (images / "out" / "wdinfo.pkl").exists()


class TestHints:
    def test_canny_finds_the_edge_and_nothing_else(self, tmp_path, capsys):
        half = np.zeros((SIZE, SIZE, 3), np.uint8)
        half[:, SIZE // 2 :] = 255
        write(tmp_path / "images" / "a.png", png(half))
        status, *_ = run(capsys, tmp_path / "images", tmp_path / "out", "--hint", "canny", "--caption", "half")
        assert status == 0
        (hint,) = load(tmp_path / "out")[2]
        columns = np.unique(np.nonzero(hint[2:-2, :, 0])[1])
        assert len(columns) and set(columns) <= {SIZE // 2 - 1, SIZE // 2}  # the step lies between the two

    def test_edges_are_those_of_the_picture_as_it_is_seen(self, tmp_path, capsys):
        half = np.zeros((SIZE, SIZE, 3), np.uint8)
        half[: SIZE // 2] = 255  # seen: light above
        exif = Image.Exif()
        exif[0x0112] = 6
        (tmp_path / "images").mkdir()
        stored = Image.fromarray(half).transpose(Image.Transpose.ROTATE_90)
        stored.save(tmp_path / "images" / "a.jpg", exif=exif, quality=100)
        run(capsys, tmp_path / "images", tmp_path / "out", "--hint", "canny", "--caption", "half")
        (hint,) = load(tmp_path / "out")[2]
        rows = np.unique(np.nonzero(hint[:, 2:-2, 0])[0])
        assert len(rows) and set(rows) <= {SIZE // 2 - 1, SIZE // 2}

    def test_label_maps_are_coloured(self, images, capsys):
        for number in range(5):
            write(images / "ids" / f"{number}.png", png(np.full((SIZE, SIZE), number, np.uint8)))
        arguments = ["--hints", images / "ids", "--palette", "ade20k"]
        assert run(capsys, images / "images", images / "out", *arguments)[0] == 0
        colours = [tuple(hint[0, 0].astype(int)) for hint in load(images / "out")[2]]
        assert colours == [(0, 0, 0), (120, 120, 120), (180, 120, 120), (6, 230, 230), (80, 50, 50)]

    def test_arrays_keep_their_channels(self, images, capsys):
        for number in range(5):
            buffer = io.BytesIO()
            np.save(buffer, np.full((SIZE, SIZE, 5), number, np.uint8))
            write(images / "arrays" / f"{number}.npy", buffer.getvalue())
        arguments = ["--hints", images / "arrays", "--hint-channels", 5]
        status, said, _ = run(capsys, images / "images", images / "out", *arguments)
        assert status == 0
        assert "model.control_stage_config.hint_channels=5" in said
        assert [hint.max() for hint in load(images / "out", 5)[2]] == [0, 1, 2, 3, 4]

    def test_a_command_writes_the_hint(self, images, capsys):
        script = (
            "import sys; from PIL import Image, ImageOps; image = Image.open(sys.argv[1]);"
            " sys.exit('too dark') if sys.argv[3:] and image.getpixel((0, 0))[0] < 99 else None;"
            " ImageOps.invert(image).save(sys.argv[2])"
        )
        order = f"{shlex.quote(sys.executable)} -c {shlex.quote(script)} {{image}} {{hint}}"
        assert run(capsys, images / "images", images / "out", "--hint-command", order)[0] == 0
        with Image.open(images / "images" / "1.jpg") as image:
            assert (load(images / "out")[2][1] == 255 - np.asarray(image)).all()
        status, said, _ = run(capsys, images / "images", images / "strict", "--hint-command", f"{order} strict")
        dark = sum(np.asarray(Image.open(images / "images" / f"{n}.jpg"))[0, 0, 0] < 99 for n in range(5))
        assert 0 < dark < 5 and status == 0
        assert f"{dark} x hint command ended with 1: too dark" in said

    def test_the_work_is_the_same_in_processes(self, images, capsys):
        contents = []
        for workers in (0, 2):
            folder = images / f"out{workers}"
            status = shards.main([str(images / "images"), str(folder), "--hint", "canny", "--workers", str(workers)])
            assert status == 0
            contents.append((folder / "00000.tar").read_bytes())
        assert contents[0] == contents[1]


class TestResuming:
    def arguments(self, images):
        return [images / "images", images / "out", "--hints", images / "maps", "--shard-size", 2]

    def test_finished_shards_are_not_made_again(self, images, capsys, monkeypatch):
        write(images / "images" / "4.jpg", b"no picture")
        _, first, _ = run(capsys, *self.arguments(images))
        whole = {path.name: path.read_bytes() for path in (images / "out").iterdir()}
        (images / "out" / "00001.tar").unlink()
        (images / "out" / "00000.tar.part").write_bytes(b"half")
        made = []
        make = writing.make
        monkeypatch.setattr(writing, "make", lambda item, making: (made.append(item.key), make(item, making))[1])
        status, again, _ = run(capsys, *self.arguments(images))
        assert status == 0
        assert made == ["2", "3"]
        assert again == first  # also what was left out by the first call
        assert "4 samples can be used, 1 cannot" in again
        for name in ("00000.tar", "00001.tar", "wdinfo.pkl"):
            assert (images / "out" / name).read_bytes() == whole[name]

    def test_a_call_killed_while_it_wrote_its_journal_goes_on(self, images, capsys):
        run(capsys, *self.arguments(images))
        journal = images / "out" / "shards.jsonl"
        whole = journal.read_bytes()
        for cut in range(whole.index(b"\n") + 1, len(whole), 37):
            journal.write_bytes(whole[:cut])
            status, said, _ = run(capsys, *self.arguments(images))
            assert status == 0 and "5 samples can be used" in said
            assert load(images / "out")[0] == list("01234")

    def test_other_samples_or_settings_in_one_folder_are_refused(self, images, capsys):
        run(capsys, *self.arguments(images))
        before = {path.name: path.read_bytes() for path in (images / "out").iterdir()}
        for change in (["--shard-size", 3], ["--hints", images / "images"], ["--caption", "x", "--hint-channels", 1]):
            status, _, err = run(capsys, *self.arguments(images), *change)
            assert status == 1 and "holds shards of other samples or settings" in err
        assert {path.name: path.read_bytes() for path in (images / "out").iterdir()} == before


class TestCheck:
    def test_it_says_what_cannot_be_used_and_why(self, tmp_path, capsys):
        good = [("a.jpg", jpeg(picture(0))), ("a.txt", b"a"), ("a.png", png(picture(0)))]
        path = write_tar(tmp_path / "0.tar", [*good, *((name.replace("a.", "b."), data) for name, data in good)])
        assert run(capsys, "--check", path)[:2] == (0, "2 samples can be used, 0 cannot\n")
        bad = [("c.jpg", b"x"), ("c.txt", b"c"), ("c.png", png(picture(0))), ("d.json", b"{}"), ("e.jpg", b"")]
        write_tar(tmp_path / "1.tar", [*good, *bad])
        (tmp_path / "2.tar").write_bytes(path.read_bytes()[:1000])
        status, said, _ = run(capsys, "--check", str(tmp_path / "*.tar"))
        assert status == 1
        assert said.startswith("3 samples can be used, ")
        for part in ("1 x image not readable: for example c in", "1 x unexpected member: for example d in", "(.json)"):
            assert part in said
        assert (
            "2 x missing caption: for example e in" in said and "shard damaged: for example the tar itself in" in said
        )
        status, said, _ = run(capsys, "--check", tmp_path / "1.tar", "--ignored", "json")
        assert "unexpected" not in said

    def test_label_maps_are_noted(self, tmp_path, capsys):
        ids = png(np.full((8, 8), 3, np.uint8))
        path = write_tar(
            tmp_path / "0.tar", [("a.jpg", jpeg(np.zeros((8, 8, 3), np.uint8))), ("a.txt", b""), ("a.png", ids)]
        )
        assert "almost black" in run(capsys, "--check", path)[1]
        assert "almost black" not in run(capsys, "--check", path, "--palette", "ade20k")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent", "out"], "absent is no folder"),
        (["images", "out", "--hints", "absent"], "absent is no folder"),
        (["images", "out", "--palette", "ade"], "'ade' is neither ade20k, nor cocostuff, nor a file"),
        (["images", "out", "--hint", "canny", "--hints", "maps"], "leave one of the two out"),
        (["images", "out", "--hint-command", "cp {image}"], "expected a command with {image} and {hint}"),
        (
            ["images", "out", "--hint-command", "no-such-program {image} {hint}"],
            "there is no command 'no-such-program'",
        ),
        (["images", "out", "--hint-command", "sh -c '{image} {hint} {}'"], "cannot be read"),
        (
            ["images", "out", "--table", "t.csv"],
            "the table t.csv has the columns a, b; expected one of image, file_name",
        ),
        (["images", "out", "--table", "bad.json"], "the table bad.json cannot be read"),
        (["images", "out", "--table", "list.json"], "has a row that is no object"),
        (["images", "out", "--table", "none.csv"], "the table none.csv cannot be read: No such file"),
        (["images", "out", "--table", "empty.csv"], "the table empty.csv has no row"),
        (["--check", "absent.tar"], "1 of 1 shards are missing"),
    ],
)
def test_one_error_for_what_cannot_work(images, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(images)
    for name, content in (("t.csv", "a,b\n1,2\n"), ("bad.json", "{"), ("list.json", "[1]"), ("empty.csv", "image\n")):
        write(images / name, content)
    status, _, err = run(capsys, *arguments)
    assert status == 1
    assert err.startswith("error: ") and message in err
    assert not (images / "out" / "wdinfo.pkl").exists()


def test_names_that_are_no_text_become_samples_and_can_be_printed(tmp_path, capsys):
    name = b"\xff\xfe1".decode("utf-8", "surrogateescape")
    write(tmp_path / "images" / f"{name}.jpg", jpeg(picture(1)))
    write(tmp_path / "images" / f"{name}x.jpg", b"bad")
    status, said, _ = run(capsys, tmp_path / "images", tmp_path / "out", "--hint", "canny", "--caption", "x")
    assert status == 0
    assert "1 x image not readable" in said
    with tarfile.open(tmp_path / "out" / "00000.tar") as archive:
        assert f"{name}.jpg" in archive.getnames()
    assert load(tmp_path / "out")[0] == [name]


def test_the_command_at_the_end_trains(images, capsys, tmp_path):
    """Its settings are those of a configuration, and its shards are found from any folder."""
    from controlnet import config, train
    from tests.controlnet import tiny_run

    _, said, _ = run(capsys, images / "images", images / "out", "--hint", "canny", "--shard-size", 2)
    words = shlex.split(said.partition("To train on them:")[2].replace("\\\n", " "))
    assert words[:4] == ["python", "-m", "controlnet.train", "--config"]
    settings = words[5:]
    assert config.load(words[4], settings).data.num_workers == 3
    (tmp_path / "run.yaml").write_text(json.dumps(tiny_run.BASE))
    more = [f"exp_manager.explicit_log_dir={tmp_path / 'run'}", "trainer.max_steps=1", "data.num_workers=0"]
    more += ["data.train.augmentations={center_crop_h_w: 16}"]
    train.main(["--config", str(tmp_path / "run.yaml"), *settings, *more])
    assert len(tiny_run.rows(tmp_path / "run")) == 1
