"""Colours of class ids: a label map becomes the picture that published segmentation ControlNets were trained on.

The colours are those of MMSegmentation, which the common segmentation annotators draw with; the ids are those of the
annotation files, as they are downloaded.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Mapping

import numpy as np

UNLABELLED = 255  # black in every palette that does not name it
MAX_ID = 65535

# Class 1 first; 0 stands for what is in no class.
_ADE20K = """
    787878 b47878 06e6e6 503232 04c803 787850 8c8c8c cc05ff e6e6e6 04fa07 e005ff ebff07 96053d 787846 08ff33
    ff0652 8fff8c ccff04 ff3307 cc4603 0066c8 3de6fa ff0633 0b66ff ff0747 ff09e0 0907e6 dcdcdc ff095c 7009ff
    08ffd6 07ffe0 ffb806 0aff47 ff290a 07ffff e0ff08 6608ff ff3d06 ffc207 ff7a08 00ff14 ff0829 ff0599 0633ff
    eb0cff a09614 00a3ff 8c8c8c fa0a0f 14ff00 1fff00 ff1f00 ffe000 99ff00 0000ff ff4700 00ebff 00adff 1f00ff
    0bc8c8 ff5200 00fff5 003dff 00ff70 00ff85 ff0000 ffa300 ff6600 c2ff00 008fff 33ff00 0052ff 00ff29 00ffad
    0a00ff adff00 00ff99 ff5c00 ff00ff ff00f5 ff0066 ffad00 ff0014 ffb8b8 001fff 00ff3d 0047ff ff00cc 00ffc2
    00ff52 000aff 0070ff 3300ff 00c2ff 007aff 00ffa3 ff9900 00ff0a ff7000 8fff00 5200ff a3ff00 ffeb00 08b8aa
    8500ff 00ff5c b800ff ff001f 00b8ff 00d6ff ff0070 5cff00 00e0ff 70e0ff 46b8a0 a300ff 9900ff 47ff00 ff00a3
    ffcc00 ff008f 00ffeb 85ff00 ff00eb f500ff ff007a fff500 0abed4 d6ff00 00ccff 1400ff ffff00 0099ff 0029ff
    00ffcc 2900ff 29ff00 ad00ff 00f5ff 4700ff 7a00ff 00ffb8 005cff b8ff00 0085ff ffd600 19c2c2 66ff00 5c00ff
"""

# The 171 classes in the order of their ids.
_COCO_STUFF = """
    00c040 00c040 004060 80c0c0 004040 00c0e0 00c0c0 80c040 00c060 80c040 8020c0 0000e0 000040 00a0c0 800060
    8000c0 0020c0 8080e0 0000c0 80a0c0 808000 800020 802000 800080 408020 00a000 000000 c080a0 002000 008080
    4080a0 80a000 008000 c08020 806080 000080 400020 00e080 800000 c000a0 006080 808080 4000a0 80e080 808040
    c00020 806000 8000c0 008020 40e000 000040 8080a0 406000 0080c0 0080a0 c0e000 008040 808020 c02080 0040c0
    000020 40a080 804040 8000a0 402080 80c0c0 0000a0 c0a080 80c000 800060 c02000 804080 408060 40a000 004000
    c080e0 402000 00c080 4080e0 c0a000 00c000 c08060 c06080 004080 400060 40e080 804000 c000e0 406080 80c080
    4000e0 c0e080 80c040 c00060 c06000 8040c0 008060 00e000 404040 8080e0 006000 40c0c0 0080e0 80e000 40c040
    808060 802080 4000c0 004060 00a080 c00040 8040e0 002080 c080c0 0040e0 80a080 c08000 804020 802040 c00080
    40c020 00a040 400000 c0c0a0 002040 408080 40c0a0 80a040 408000 c0c020 8060c0 400080 404020 00e0c0 c00000
    c040a0 0060c0 c08080 4040a0 80e0c0 c08040 c04020 806040 c000c0 00c020 40e040 400040 80c0a0 406040 4080c0
    00c0a0 c0e040 408040 80c020 c020c0 4040c0 004020 40a0c0 c04040 8040a0 4020c0 c0c0c0 0040a0 c0a0c0 c0c000
    804060 c02040 c04080 40c060 40a040 404000
"""
# stuffthingmaps numbers COCO's categories from 0; these 11 are named and never annotated.
_COCO_UNUSED = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)


class PaletteError(ValueError):
    """This palette cannot be used; the message names the file and what was expected."""


class Palette:
    """The colour of each class id.

    Args:
        colours: id (0 to 65535) -> (red, green, blue).
        name: for messages.
    """

    def __init__(self, colours: Mapping[int, Iterable[int]], name: str):
        self.name = name
        colours = {UNLABELLED: (0, 0, 0), **{key: tuple(colour) for key, colour in colours.items()}}
        self._known = np.zeros(max(colours) + 1, dtype=bool)
        self._table = np.zeros((max(colours) + 1, 3), dtype=np.uint8)
        for key, colour in colours.items():
            self._known[key], self._table[key] = True, colour

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 3] of ids [H, W].

        Raises:
            PaletteError: an id has no colour.
        """
        known = ids < len(self._known)
        known &= self._known[np.where(known, ids, 0)]
        if not known.all():
            raise PaletteError(f"has class id {ids[~known].flat[0]}, which the palette {self.name} does not colour")
        return self._table[ids]


def palette(name: str) -> Palette:
    """`ade20k`, `cocostuff`, or the palette in a file.

    Args:
        name: `ade20k` colours the ids of SceneParsing's annotations, 0 (none) to 150; `cocostuff` those of COCO-Stuff's
            stuffthingmaps, 0 to 181. A file is JSON (a list of [red, green, blue], the first of id 0, or an object
            id -> [red, green, blue]) or CSV of the columns id, red, green, blue. 255 is black where nothing else is
            said.

    Raises:
        PaletteError: there is no such file, or it holds something else.
    """
    if name == "ade20k":
        return Palette({0: (0, 0, 0), **dict(enumerate(_colours(_ADE20K), start=1))}, name)
    if name == "cocostuff":
        colours = _colours(_COCO_STUFF)
        used = [key for key in range(len(colours) + len(_COCO_UNUSED)) if key not in _COCO_UNUSED]
        return Palette(dict(zip(used, colours, strict=True)), name)
    expected = (
        "a JSON list of [red, green, blue], a JSON object id -> [red, green, blue], or a CSV of id, red, green, blue"
    )
    if not os.path.isfile(name):
        raise PaletteError(f"the palette {name!r} is neither ade20k, nor cocostuff, nor a file; expected {expected}")
    try:
        colours = _read(name)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, csv.Error) as error:
        raise PaletteError(f"the palette {name} cannot be read ({error}); expected {expected}") from error
    wrong = [(key, colour) for key, colour in colours.items() if not _is_colour(key, colour)]
    if wrong or not colours:
        what = f"has {wrong[0][1]} for id {wrong[0][0]}" if wrong else "is empty"
        raise PaletteError(f"the palette {name} {what}; expected {expected}, ids 0 to {MAX_ID}, colours 0 to 255")
    return Palette(colours, name)


def _colours(table: str) -> list[tuple[int, ...]]:
    return [tuple(bytes.fromhex(colour)) for colour in table.split()]


def _read(path: str) -> dict[int, list[int]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        text = file.read()
    if text.lstrip()[:1] in ("[", "{"):
        content = json.loads(text)
        pairs = content.items() if isinstance(content, dict) else enumerate(content)
        return {int(key): list(colour) for key, colour in pairs}
    rows = [row for row in csv.reader(text.splitlines()) if row]
    if rows and not rows[0][0].strip().isdigit():
        rows = rows[1:]  # the names of the columns
    return {int(row[0]): [int(value) for value in row[1:]] for row in rows}


def _is_colour(key: int, colour: list[int]) -> bool:
    return 0 <= key <= MAX_ID and len(colour) == 3 and all(type(value) is int and 0 <= value <= 255 for value in colour)
