"""What a training set is made of: images, captions and hints, in folders, in a table, or in the tars of img2dataset."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from controlnet.data.images import IMAGE_FORMATS
from controlnet.data.shards import DataError, Drop, index_shard

HINT_SUFFIXES = ("png", "npy", "jpg", "jpeg", "webp")
CAPTION_SUFFIXES = ("txt", "caption")
# Extensions of common picture formats that are not read.
OTHER_IMAGES = ("avif", "bmp", "gif", "heic", "heif", "jfif", "jp2", "jxl", "tif", "tiff")

# Column names of tables as they are found: ours, Hugging Face's metadata, the original ControlNet's prompt.json.
IMAGE_COLUMNS = ("image", "file_name", "file", "path", "target")
CAPTION_COLUMNS = ("caption", "text", "prompt")
HINT_COLUMNS = ("hint", "conditioning_image", "control", "source")

_TAR_ROLES = (("jpg", "image"), ("jpeg", "image"), ("webp", "image"), ("png", "image"), ("txt", "caption"))
_TAR_ROLES_WITH_HINT = (*_TAR_ROLES[:3], ("png", "hint"), ("npy", "hint"), ("txt", "caption"))


class Ref(NamedTuple):
    """Bytes of a file: all, or `length` from `at` on."""

    path: str
    at: int = 0
    length: int | None = None

    def read(self) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(self.at)
            return file.read() if self.length is None else file.read(self.length)


class Item(NamedTuple):
    """A sample to be: its key, and where its parts lie. A hint of None is to be computed."""

    key: str
    image: Ref
    caption: Ref | str
    hint: Ref | None


class Listing(NamedTuple):
    """What was found, in the order in which it is written, and what cannot become a sample."""

    items: list[Item]
    drops: list[Drop]


class Wanted(NamedTuple):
    """What is looked for.

    Attributes:
        captions: folder of KEY.txt; None looks beside the images.
        caption: of images without one; None leaves those out.
        hints: folder of hints named as their images; None looks beside the images.
        computed: hints are computed from the images alone.
    """

    captions: str | None = None
    caption: str | None = None
    hints: str | None = None
    computed: bool = False


def list_source(source: str, table: str | None, wanted: Wanted) -> Listing:
    """The samples of a folder of images, of the rows of a table, or of the tars that img2dataset wrote.

    Args:
        source: the folder, which a table's relative paths start from.
        table: a .csv, .tsv, .json (a list, or a line for each row) or .jsonl; None takes all images of the folder.
        wanted: captions and hints.

    Raises:
        DataError: nothing is there, or the table is none.
    """
    if not os.path.isdir(source):
        raise DataError(f"{source} is no folder; expected one with images, or with the tars of img2dataset")
    for folder in (wanted.captions, wanted.hints):
        if folder is not None and not os.path.isdir(folder):
            raise DataError(f"{folder} is no folder")
    tars = sorted(name for name in os.listdir(source) if name.endswith(".tar"))
    if table is not None:
        listing = _of_table(source, table, wanted)
    elif tars:
        listing = _of_tars([os.path.join(source, name) for name in tars], wanted)
    else:
        listing = _of_folder(source, wanted)
    first: dict[str, Item] = {}
    for item in listing.items:
        if first.setdefault(item.key, item) is not item:
            listing.drops.append(Drop("two images of one name", item.image.path, item.key))
    return Listing(list(first.values()), listing.drops)


def _of_folder(source: str, wanted: Wanted) -> Listing:
    listing, images = Listing([], []), {}
    for path in _files(source, [folder for folder in (wanted.hints, wanted.captions) if folder]):
        stem, _, suffix = os.path.relpath(path, source).rpartition(".")
        if suffix.lower() in IMAGE_FORMATS:
            images.setdefault(stem, []).append(path)
        elif suffix.lower() in OTHER_IMAGES:
            listing.drops.append(Drop("format not read", path, stem, f".{suffix.lower()}"))
    for stem, paths in sorted(images.items()):
        hint = None
        if not wanted.computed and wanted.hints is None and len(paths) == 2:
            hint = next((Ref(path) for path in paths if path.lower().endswith(".png")), None)
            paths = [path for path in paths if hint is None or path != hint.path]
        if len(paths) > 1:
            listing.drops.append(Drop("two images of one name", paths[1], stem))
            continue
        _add(listing, stem, paths[0], _beside(wanted.captions or source, stem, CAPTION_SUFFIXES), hint, wanted)
    return listing


def _files(source: str, without: Sequence[str]) -> Iterator[str]:
    """All files below a folder but hidden ones and those of other folders, in a fixed order."""
    left_out = {os.path.realpath(folder) for folder in without} - {os.path.realpath(source)}
    for folder, folders, names in os.walk(source):
        inside = sorted(name for name in folders if not name.startswith((".", "__")))
        folders[:] = [name for name in inside if os.path.realpath(os.path.join(folder, name)) not in left_out]
        yield from (os.path.join(folder, name) for name in sorted(names) if not name.startswith("."))


def _beside(folder: str, stem: str, suffixes: Sequence[str]) -> Ref | None:
    for suffix in suffixes:
        for spelled in (suffix, suffix.upper()):
            path = os.path.join(folder, f"{stem}.{spelled}")
            if os.path.isfile(path):
                return Ref(path)
    return None


def _add(listing: Listing, stem: str, image: str, caption: Ref | str | None, hint: Ref | None, wanted: Wanted) -> None:
    """Adds a sample, or the reason why it is none."""
    if hint is None and wanted.hints is not None:
        hint = _beside(wanted.hints, stem, HINT_SUFFIXES)
    caption = wanted.caption if caption is None else caption
    if caption is None:
        listing.drops.append(Drop("no caption", image, stem))
    elif hint is None and not wanted.computed:
        listing.drops.append(Drop("no hint", image, stem))
    else:
        # A key ends at the first dot of a member's name.
        key = stem.replace(os.sep, "/").replace(".", "_")
        listing.items.append(Item(key, Ref(image), caption, None if wanted.computed else hint))


def _of_table(source: str, table: str, wanted: Wanted) -> Listing:
    listing, seen = Listing([], []), set()
    rows = _rows(table)
    if not rows:
        raise DataError(f"the table {table} has no row")
    columns = {
        role: next((name for name in names if name in rows[0]), None)
        for role, names in (("image", IMAGE_COLUMNS), ("caption", CAPTION_COLUMNS), ("hint", HINT_COLUMNS))
    }
    if columns["image"] is None:
        raise DataError(
            f"the table {table} has the columns {', '.join(map(str, rows[0]))}; expected one of"
            f" {', '.join(IMAGE_COLUMNS)} for the image, {', '.join(CAPTION_COLUMNS)} for the caption and"
            f" {', '.join(HINT_COLUMNS)} for the hint"
        )
    for row in rows:
        value = {role: row.get(name) if name else None for role, name in columns.items()}
        stem = os.path.splitext(str(value["image"]))[0]
        image = os.path.join(source, str(value["image"]))
        if stem in seen:
            listing.drops.append(Drop("two images of one name", image, stem))
        elif not os.path.isfile(image):
            listing.drops.append(Drop("no image", image, stem))
        else:
            seen.add(stem)
            hint = None if wanted.computed or not value["hint"] else Ref(os.path.join(source, str(value["hint"])))
            if hint is not None and not os.path.isfile(hint.path):
                listing.drops.append(Drop("no hint", hint.path, stem))
                continue
            caption = value["caption"]
            _add(listing, os.path.normpath(stem), image, caption if isinstance(caption, str) else None, hint, wanted)
    return listing


def _rows(table: str) -> list[dict[str, Any]]:
    expected = "a .csv or .tsv with a line of column names, a .jsonl, or a .json with a list of objects"
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            text = file.read()
        if table.lower().endswith((".csv", ".tsv")):
            dialect = "excel-tab" if table.lower().endswith(".tsv") else "excel"
            return list(csv.DictReader(io.StringIO(text, newline=""), dialect=dialect))
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except OSError as error:
        raise DataError(f"the table {table} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error, RecursionError) as error:
        raise DataError(f"the table {table} cannot be read ({error}); expected {expected}") from error
    if not all(isinstance(row, dict) for row in rows):
        raise DataError(f"the table {table} has a row that is no object; expected {expected}")
    return rows


def _of_tars(tars: Sequence[str], wanted: Wanted) -> Listing:
    """Samples of shards with images and captions, as img2dataset writes them; other members are not read."""
    listing = Listing([], [])
    in_tar = not wanted.computed and wanted.hints is None
    roles = _TAR_ROLES_WITH_HINT if in_tar else _TAR_ROLES
    ignored = ("json", "cls", "parquet")
    for tar in tars:
        index = index_shard(tar, roles, ignored)
        captions = {sample.key: Ref(tar, *sample.members["caption"]) for sample in index.samples}
        if wanted.caption is not None:  # samples without a caption are whole, too
            without = tuple(pair for pair in roles if pair[1] != "caption")
            index = index_shard(tar, without, (*ignored, "txt"))
        listing.drops.extend(index.drops)
        for sample in index.samples:
            refs = {role: Ref(tar, *place) for role, place in sample.members.items()}
            hint = refs.get("hint") or (wanted.hints and _beside(wanted.hints, sample.key, HINT_SUFFIXES))
            if hint is None and not wanted.computed:
                listing.drops.append(Drop("no hint", tar, sample.key))
                continue
            caption = captions.get(sample.key, wanted.caption)
            listing.items.append(Item(sample.key, refs["image"], caption, hint or None))
    return listing
