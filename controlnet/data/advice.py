"""The text for samples that cannot be used: the most frequent reason, an example, and the remedy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from controlnet.data.images import IMAGE_FORMATS
from controlnet.data.shards import Drop

_CURES = {
    "no caption": "Name captions KEY.txt after their images, give --captions or --table, or --caption TEXT for all",
    "no hint": "Name hints after their images, give --hints or --table, or compute them: --hint canny, --hint-command",
    "two images of one name": "Give each image a name of its own; dots in a name count as _",
    "format not read": "Convert to JPEG, PNG or WebP",
    "key in two places": "The members of a sample must stand next to each other: write the tar with tar --sort=name",
    "duplicate member": "A sample has one image, one caption and one hint",
    "member is a link": "Write the tar with tar -h --hard-dereference, which stores what links point to",
    "shard compressed": "Samples are read by their place in the file, so a shard must not be compressed: decompress it",
    "shard damaged": "Write the shard anew; `python -m controlnet.shards --check` says what is left of it",
    "caption not UTF-8": "Save captions as UTF-8",
    "smaller than the crop": "Set data.train.augmentations.resize_smallest_side, or filter small images out",
    "image and hint differ in size": "A hint must have the size of its image",
    "image turned by its EXIF orientation, hint not": "Make the hint from the image as it is seen, or strip its EXIF",
    "shard replaced while it was read": "Write new shards under new names",
}


def advice(drops: Sequence[Drop]) -> str:
    """One or two sentences; nothing where nothing was dropped."""
    if not drops:
        return ""
    (reason, count), *others = Counter(drop.reason for drop in drops).most_common()
    example = next(drop for drop in drops if drop.reason == reason)
    more = f", and {len(drops) - count} for other reasons" if others else ""
    return f"{count} left out as '{reason}'{more}; for example: {example}. {cure(example)}".rstrip()


def cure(drop: Drop) -> str:
    """What to do about a drop, or nothing."""
    if drop.reason == "unexpected member":
        return _unexpected(drop.detail.lstrip("."))
    if drop.reason.startswith("missing "):
        return (
            "A sample is an image, a caption and a hint of one name; data.train.extensions says which extension is"
            " which, and `python -m controlnet.shards` makes shards and hints"
        )
    return _CURES.get(drop.reason, "")


def _unexpected(extension: str) -> str:
    last = extension.rpartition(".")[2]
    if "." in extension and (last in IMAGE_FORMATS or last in ("txt", "npy")):
        return (
            f"All after the first dot of a name is its extension, here .{extension}: take the other dots out of the"
            f" names, or, if all have it, set it in data.train.extensions (such as hint: {extension})"
        )
    return (
        f"If .{extension} does not matter, set data.train.ignored_extensions=[{extension}]; if it is the image, caption"
        f" or hint, name it in data.train.extensions"
    )
