"""Pairs hints with prompts for `python -m controlnet.generate`."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".ppm", ".pgm", ".pbm", ".pnm", ".npy"}


@dataclasses.dataclass(frozen=True)
class Job:
    """One drawing: the name of its files, a hint for each ControlNet, and the prompt."""

    name: str
    hints: tuple[Path, ...]
    prompt: str


def jobs(hints: Sequence[Sequence[Path]], prompts: Sequence[str], controls: int = 1) -> list[Job]:
    """Pairs hints with prompts: as many of each, or one of either for all of the other.

    Args:
        hints: for each ControlNet, or once for all of them, its hints: files, or a folder of files; those of several
            ControlNets go together by their order, and have equal names. With no prompts, that of NAME.png is in
            NAME.txt beside it.
        prompts: texts.
    Raises ValueError for numbers that do not go together; FileNotFoundError.
    """
    if len(hints) not in (1, controls):
        raise ValueError(
            f"--hint is given {len(hints)} times for {controls} ControlNets; expected one, or one for each"
        )
    columns = [[file for path in paths for file in _files(path)] for paths in hints]
    for column in columns[1:]:
        names, others = ([file.stem for file in each] for each in (columns[0], column))
        if len(names) != len(others) or (len(names) > 1 and names != others):
            differing = sorted(set(names) ^ set(others)) or ["their order"]
            raise ValueError(
                f"the ControlNets have {len(names)} and {len(others)} hints; expected the same names, which differ in"
                f" {', '.join(differing[:3])}"
            )
    columns = columns if len(columns) == controls else columns * controls
    rows = list(zip(*columns, strict=True))
    texts = list(prompts) or [_caption(row[0]) for row in rows]
    if len(texts) != len(rows) and 1 not in (len(texts), len(rows)):
        raise ValueError(f"{len(rows)} hints and {len(texts)} prompts; expected as many of each, or one of either")
    count = max(len(rows), len(texts))
    rows, texts = rows * (count // len(rows)), texts * (count // len(texts))
    return [
        Job(f"{number:04d}-{row[0].stem}", row, text)
        for number, (row, text) in enumerate(zip(rows, texts, strict=True))
    ]


def read_prompts(path: Path) -> list[str]:
    """Reads the non-empty lines of a text file."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    if not any(lines):
        raise ValueError(f"--prompts {path} is empty; expected one prompt a line")
    return [line for line in lines if line]


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        if not path.exists():
            raise FileNotFoundError(f"no hint at {path}: No such file or folder")
        return [path]
    found = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
    if not found:
        raise FileNotFoundError(f"the folder {path} holds no hint ({', '.join(sorted(SUFFIXES))})")
    return found


def _caption(hint: Path) -> str:
    file = hint.with_suffix(".txt")
    if not file.is_file():
        raise ValueError(f"no prompt: give --prompt or --prompts FILE, or write the one of {hint.name} to {file}")
    return file.read_text(encoding="utf-8-sig").strip()
