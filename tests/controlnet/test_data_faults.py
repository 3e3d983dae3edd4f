"""Imperfect data: empty and unusable shards, files under other names, the error when nothing can be used."""

import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from controlnet import train
from controlnet.data import DataError, build_loader
from controlnet.data.advice import advice
from controlnet.data.shards import Drop
from tests.controlnet import tiny_run
from tests.controlnet.shard_files import members, png, write_shard, write_tar

pytestmark = pytest.mark.filterwarnings("ignore:a hint is almost black", "ignore:left out")


def loader(
    folder, batch_size=1, rank=0, world_size=1, start=None, hint_channels=3, num_workers=0, train=None, **webdataset
):
    train = {"dataset_path": ["*.tar"], "augmentations": {"center_crop_h_w": 8}, **(train or {})}
    data = {"num_workers": num_workers, "train": train, "webdataset": {"local_root_path": str(folder), **webdataset}}
    ranks = {"rank": rank, "world_size": world_size}
    return build_loader(
        data, factor=4, batch_size=batch_size, seed=0, start=start, hint_channels=hint_channels, **ranks
    )


def keys_of_epochs(source, epochs):
    return [[key for batch in source for key in batch["keys"]] for _ in range(epochs)]


def unreadable(folder, number, count=2):
    """A shard of whole samples, none of whose images is one."""
    files = [(f"bad{number}-{i}.{e}", b"bad" if e == "jpg" else d) for i in range(count) for e, d in members(1).items()]
    return write_tar(folder / f"{number}.tar", files)


def small(folder, number, count=2):
    """A shard of whole samples that a filter leaves out."""
    files = [(f"small{number}-{i}.{e}", d) for i in range(count) for e, d in members(1, size=4).items()]
    return write_tar(folder / f"{number}.tar", files)


FILTER = {"filterings": {"resolution": {"method": "larger", "value": 8}}}


class TestShardsWithoutASample:
    @pytest.mark.parametrize("content", [b"", bytes(512), bytes(10240)])
    @pytest.mark.parametrize("chunk_size", [None, 6])
    def test_empty_ones_are_left_out_at_the_start(self, tmp_path, content, chunk_size):
        (tmp_path / "0.tar").write_bytes(content)
        for number in (1, 2, 3):
            write_shard(tmp_path / f"{number}.tar", range(number * 6, number * 6 + 6))
        with pytest.warns(
            UserWarning, match=r"1 of 4 shards hold no whole sample and are left out; the first is .*0\.tar"
        ):
            source = loader(tmp_path, num_workers=3, chunk_size=chunk_size, shuffle_buffer=4)
        for _ in range(5):  # the shards are dealt to the workers anew in each
            assert len(list(source)) == len(source)
        source.close()

    def test_ones_without_a_whole_sample_are_left_out_and_counted(self, tmp_path):
        lacking = write_tar(
            tmp_path / "0.tar", [(f"{n}.{e}", d) for n in (1, 2) for e, d in members(n).items() if e != "txt"]
        )
        write_shard(tmp_path / "1.tar", range(16, 20))
        with pytest.warns(UserWarning, match="1 of 2 shards .*: missing caption, 1 in"):
            source = loader(tmp_path)
        assert sorted(sum(keys_of_epochs(source, 1), [])) == [f"{n:05d}" for n in range(16, 20)]
        assert source.drops == {"missing caption": {str(lacking): 2}}
        ranks = [loader(tmp_path, rank=rank, world_size=2, infinite_sampler=True) for rank in (0, 1)]
        assert [sum(sum(of.values()) for of in rank.drops.values()) for rank in ranks] == [2, 0]  # counted by one

    def test_too_few_left_for_the_workers_is_an_error_at_the_start(self, tmp_path):
        write_tar(tmp_path / "0.tar", [])
        write_shard(tmp_path / "1.tar", range(6))
        with (
            pytest.raises(DataError, match="has 1 shards with samples; expected at least 2"),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            loader(tmp_path, num_workers=2)

    @pytest.mark.parametrize("useless", [unreadable, small])
    @pytest.mark.parametrize("shuffle_buffer", [0, 4])
    def test_a_worker_with_nothing_reads_its_ranks_others(self, tmp_path, useless, shuffle_buffer):
        useless(tmp_path, 0)
        write_shard(tmp_path / "1.tar", range(16, 22))
        options = {"num_workers": 2, "shuffle_buffer": shuffle_buffer, "train": {"max_bad_fraction": 1, **FILTER}}
        source = loader(tmp_path, **options)
        for keys in keys_of_epochs(source, 4):
            assert len(keys) == len(source) == 8
            assert set(keys) <= {f"{n:05d}" for n in range(16, 22)}
        source.close()

    def test_a_borrowed_lap_is_resumed_bit_for_bit(self, tmp_path):
        unreadable(tmp_path, 0)
        write_shard(tmp_path / "1.tar", range(16, 22))
        options = {"num_workers": 2, "train": {"max_bad_fraction": 1}}
        source = loader(tmp_path, **options)
        whole, positions = [], []
        for _ in range(3):
            for batch in source:
                whole += batch["keys"]
                positions.append(json.loads(json.dumps(source.position)))
        source.close()
        for at in (2, 5, 13):
            again = loader(tmp_path, start=positions[at], **options)
            rest = [key for _ in range(3) for batch in again for key in batch["keys"]]
            again.close()
            assert rest[: len(whole) - at - 1] == whole[at + 1 :]

    def test_a_rank_with_nothing_is_an_error_unless_shards_are_dealt_anew(self, tmp_path):
        unreadable(tmp_path, 0)
        write_shard(tmp_path / "1.tar", range(16, 22))
        bad = {"max_bad_fraction": 1}
        source = loader(tmp_path, world_size=2, train=bad)
        with pytest.raises(DataError, match="no sample for rank 0, worker 0 .* 2 left out as 'image not readable'"):
            next(iter(source))
        for options in ({"train": {**bad, "data_sharding": False}}, {"train": bad, "infinite_sampler": True}):
            for rank in (0, 1):
                for keys in keys_of_epochs(loader(tmp_path, rank=rank, world_size=2, **options), 8):
                    assert len(keys) == 4 and all(key.startswith("000") for key in keys)


A = members(1)
WHOLE = [("jpg", A["jpg"]), ("txt", A["txt"]), ("png", A["png"])]


class TestNothingUsable:
    """Five mistakes of the first day, each with its cause, an example and its cure in the one error there is."""

    @pytest.mark.parametrize(
        ("files", "parts"),
        [
            (
                [(f"{n}.{e}", d) for e, d in WHOLE for n in range(4)],
                ["12 left out as 'key in two places'", "tar --sort=name"],
            ),
            (
                [(f"photo.{n}.{e}", d) for n in range(4) for e, d in WHOLE],
                ["photo in", "(.0.jpg)", "after the first dot", "data.train.extensions"],
            ),
            (
                [(f"{n}.{e}", d) for n in range(4) for e, d in [*WHOLE, ("json", b"{}")]],
                ["unexpected member (.json), 0 in", "data.train.ignored_extensions=[json]"],
            ),
            (
                [(f"{n}.{e}", d) for n in range(4) for e, d in [("bmp", A["jpg"]), *WHOLE[1:]]],
                ["unexpected member (.bmp), 0 in", "data.train.extensions"],
            ),
            (
                [(f"{n}.{e}", d) for n in range(4) for e, d in WHOLE[:2]],
                ["4 left out as 'missing hint'", "data.train.extensions", "python -m controlnet.shards"],
            ),
            (
                [(f"{n}.{e}", d) for n in range(4) for e, d in [*WHOLE, ("webp", A["jpg"])]],
                ["duplicate member (.jpg and .webp), 0 in", "one image"],
            ),
        ],
    )
    def test_the_error_names_the_commonest_reason_and_the_cure(self, tmp_path, files, parts):
        write_tar(tmp_path / "0.tar", files)
        with pytest.raises(DataError) as caught, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loader(tmp_path)
        assert "holds 0 usable samples" in str(caught.value)
        for part in parts:
            assert part in str(caught.value)

    @pytest.mark.parametrize("chunk_size", [None, 4])
    def test_a_compressed_shard_is_said_to_be_so(self, tmp_path, chunk_size):
        import gzip

        data = write_shard(tmp_path / "0.tar", range(4)).read_bytes()
        (tmp_path / "1.tar").write_bytes(gzip.compress(data))
        with pytest.raises(DataError, match=r"1\.tar is compressed \(gzip\); .* decompress it"):
            loader(tmp_path, chunk_size=chunk_size)

    @pytest.mark.parametrize("chunk_size", [None, 4])
    def test_a_git_lfs_pointer_is_said_to_be_one(self, tmp_path, chunk_size):
        write_shard(tmp_path / "0.tar", range(4))
        (tmp_path / "1.tar").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4096\n")
        with pytest.raises(DataError, match=r"1\.tar is a Git LFS pointer.* git lfs pull"):
            loader(tmp_path, chunk_size=chunk_size)

    def test_captions_are_not_searched_in_json(self, tmp_path):
        write_shard(tmp_path / "0.tar", range(4))
        with pytest.raises(DataError, match="extensions.caption is 'txt;json'; expected text"):
            loader(tmp_path, train={"extensions": {"caption": "txt;json"}})

    def test_the_commonest_of_several_reasons_comes_first(self):
        drops = [Drop("missing hint", "a.tar", "1"), *[Drop("shard damaged", f"{n}.tar", "") for n in range(2)]]
        text = advice(drops)
        assert text.startswith(
            "2 left out as 'shard damaged', and 1 for other reasons; for example: shard damaged, the tar"
        )
        assert "python -m controlnet.shards --check" in text
        assert advice([]) == ""


@pytest.mark.parametrize("extension", ["jpg", "jpeg", "webp"])
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_an_image_is_read_under_every_usual_name_and_in_every_format(tmp_path, extension, image_format):
    Image.fromarray(np.full((8, 8, 3), 200, np.uint8)).save(tmp_path / "picture", image_format)
    content = (tmp_path / "picture").read_bytes()
    write_tar(tmp_path / "0.tar", [(f"a.{extension}", content), ("a.txt", b"gray"), ("a.png", members(200)["png"])])
    source = loader(tmp_path)
    (batch,) = list(source)
    assert ((batch["images"] + 1) / 2 - 200 / 255).abs().max() < 0.02
    assert source.drops == {}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_note_is_one_warning_however_many_samples_and_workers_find_it(tmp_path, num_workers):
    for number in (0, 1):
        write_shard(tmp_path / f"{number}.tar", range(number * 4 + 1, number * 4 + 5))  # hints of value 1 to 8
    source = loader(tmp_path, num_workers=num_workers)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        keys_of_epochs(source, 3)
    source.close()
    noted = [str(warning.message) for warning in caught if "almost black" in str(warning.message)]
    assert len(noted) == 1
    assert "kind: labels" in noted[0] and "(first: 0000" in noted[0]


def test_label_maps_are_coloured_and_stay_pure_when_resized(tmp_path):
    ids = np.random.default_rng(0).choice([1, 2, 255], (5, 7)).astype(np.uint8)
    files = [("a.jpg", png(np.zeros((5, 7, 3), np.uint8))), ("a.txt", b"wall"), ("a.png", png(ids))]
    write_tar(tmp_path / "0.tar", files)
    settings = {"hint": {"kind": "labels", "palette": "ade20k"}}
    settings["augmentations"] = {"resize_smallest_side": 12, "center_crop_h_w": 12}
    (batch,) = list(loader(tmp_path, train=settings))
    colours = {tuple(colour) for colour in (batch["hint"][0] * 255).round().int().flatten(1).T.tolist()}
    assert colours == {(120, 120, 120), (180, 120, 120), (0, 0, 0)}


def hint_files(channels):
    """(extension, content) of a hint with so many channels, 16 x 16."""
    pixels = np.random.default_rng(channels).integers(0, 256, (16, 16, channels), dtype=np.uint8)
    if channels in (1, 3, 4):
        return "png", png(pixels[..., 0] if channels == 1 else pixels), pixels
    import io

    buffer = io.BytesIO()
    np.save(buffer, pixels)
    return "npy", buffer.getvalue(), pixels


@pytest.mark.parametrize("channels", [1, 3, 4, 6])
def test_hints_have_the_channels_that_the_controlnet_asks_for_and_train(tmp_path, channels):
    extension, content, pixels = hint_files(channels)
    files = {"jpg": members(40, size=16)["jpg"], "txt": b"red", extension: content}
    write_tar(tmp_path / "0.tar", [(f"{n}.{e}", data) for n in range(4) for e, data in files.items()])
    settings = {"augmentations": {"center_crop_h_w": 16}}
    batch = next(iter(loader(tmp_path, batch_size=2, hint_channels=channels, train=settings)))
    assert batch["hint"].shape == (2, channels, 16, 16)
    assert torch.equal(batch["hint"][0], torch.from_numpy(pixels).permute(2, 0, 1) / 255)

    (tmp_path / "run.yaml").write_text(json.dumps(tiny_run.BASE))
    overrides = [f"exp_manager.explicit_log_dir={tmp_path / 'run'}", "trainer.max_steps=2"]
    overrides += [
        f"model.control_stage_config.hint_channels={channels}",
        f"data.train.dataset_path=['{tmp_path}/0.tar']",
    ]
    train.main(["--config", str(tmp_path / "run.yaml"), *overrides, "data.train.augmentations={center_crop_h_w: 16}"])
    assert [np.isfinite(row["loss"]) for row in tiny_run.rows(tmp_path / "run")] == [True, True]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_shard_replaced_while_it_is_read_never_mixes_two_samples(tmp_path, num_workers):
    """The new file has other samples at the old places; those of an old key are read where they are now."""
    for number in (0, 1):
        write_shard(tmp_path / f"{number}.tar", range(16 + number * 20, 36 + number * 20))
    source = loader(tmp_path, num_workers=num_workers, shuffle_buffer=50, train={"max_bad_fraction": 0.5})
    batches = iter(source)
    seen = [next(batches)]
    for number in (0, 1):  # every second sample is there, in another order; others are new
        numbers = [*range(100, 110), *reversed(range(16 + number * 20, 36 + number * 20, 2))]
        write_shard(tmp_path / "new", numbers).replace(tmp_path / f"{number}.tar")
    seen += list(batches)
    for _ in range(2):
        seen += list(source)
    source.close()
    for batch in seen:
        (key,) = batch["keys"]
        assert batch["captions"] == [f"sample {int(key)}"]
        assert torch.equal(batch["hint"], torch.full((1, 3, 8, 8), int(key) / 255))
    assert {int(key) for batch in seen[-40:] for key in batch["keys"]} & set(range(100, 110))  # the new file is in use
    assert set(source.drops) == {"shard replaced while it was read"}
