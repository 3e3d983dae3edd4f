"""What `python -m controlnet.generate` is asked for: pairs of hints and prompts, and NeMo's inference files."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from controlnet.config import ConfigError, did_you_mean, precision, shown

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".ppm", ".pgm", ".pbm", ".pnm", ".npy"}


@dataclasses.dataclass(frozen=True)
class Job:
    """A name for files, a hint for each ControlNet, and a prompt."""

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
    """The lines of a text file, without empty ones."""
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


# Of NeMo's controlnet_infer.yaml: the option that a key of `infer` or `model` sets.
INFER = {
    "prompts": "prompt", "control": "hint", "unconditional_guidance_scale": "guidance_scale",
    "num_images_per_prompt": "num_images", "inference_steps": "steps", "eta": "eta", "seed": "seed",
    "strength": "strength", "guess_mode": "guess_mode", "restore_from_path": "checkpoint", "out_path": "images",
}  # fmt: skip
KINDS: dict[str, tuple[type, ...]] = {
    "unconditional_guidance_scale": (int, float), "num_images_per_prompt": (int,), "inference_steps": (int,),
    "eta": (int, float), "seed": (int,), "strength": (int, float), "guess_mode": (bool,), "restore_from_path": (str,),
    "out_path": (str,), "prompts": (str, list), "control": (str, list), "height": (int,), "width": (int,),
    "hint_image_size": (int,), "sampler_type": (str,),
}  # fmt: skip
# Keys that take one value, which asks for nothing.
ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "control_image_preprocess": ((None,), "hints are given ready-made; python -m controlnet.shards computes some"),
    "output_type": (("pil",), "images are written as PNG"),
    "save_to_file": ((True,), "images are always written"),
}
SILENT = ("down_factor",)  # the first stage decides
SAMPLERS = {"DDIM": None, "UNIPC": "UniPC", "EULER": "Euler"}


def nemo_options(tree: dict[str, Any]) -> dict[str, Any]:
    """The options of generate that a file in the layout of NeMo's controlnet_infer.yaml sets.

    Raises ConfigError for an unknown key, or one that asks for something that is not done.
    """
    options: dict[str, Any] = {}
    model = {key: value for key, value in (tree.get("model") or {}).items() if key != "precision"}
    for section, keys in (("infer", tree["infer"]), ("model", model)):
        for key, value in keys.items():
            path = f"{section}.{key}"
            if key in ONLY:
                if value not in ONLY[key][0]:
                    raise ConfigError(f"{path} is {shown(value)}; expected {ONLY[key][0][0]}: {ONLY[key][1]}")
            elif key not in (*KINDS, *SILENT):
                raise ConfigError(f"{path} is not a known key{did_you_mean(key, [*KINDS, *ONLY, *SILENT])}")
            elif key in INFER and value is not None:
                options[INFER[key]] = _checked(path, value, KINDS[key])
    infer = tree["infer"]
    side = infer.get("hint_image_size")
    sides = [_checked(f"infer.{key}", value, (int,)) for key in ("width", "height") if (value := infer.get(key, side))]
    if len(sides) == 2:
        options["size"] = tuple(sides)
    sampler = str(infer.get("sampler_type") or "DDIM").upper()
    if sampler not in SAMPLERS:
        raise ConfigError(f"infer.sampler_type is {sampler}; expected one of {', '.join(SAMPLERS)}")
    options["scheduler"] = SAMPLERS[sampler]
    trainer = tree.get("trainer") or {}
    for key in ("devices", "num_nodes"):
        if trainer.get(key, 1) not in (1, "auto", [0]):
            raise ConfigError(f"trainer.{key} is {trainer[key]}; images are drawn by one process: set it to 1")
    if trainer.get("precision") is not None:
        options["precision"] = precision(trainer["precision"])
    for key in ("prompt", "hint"):
        if key in options:
            options[key] = options[key] if isinstance(options[key], list) else [options[key]]
    if "hint" in options:
        options["hint"] = [[Path(path) for path in options["hint"]]]
    if "checkpoint" in options:
        options["checkpoint"] = [Path(options["checkpoint"])]
    if "images" in options:
        options["images"] = Path(options["images"])
    return options


def _checked(path: str, value: Any, kinds: tuple[type, ...]) -> Any:
    fits = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
    if not fits or (isinstance(value, list) and not all(isinstance(item, str) for item in value)):
        raise ConfigError(f"{path} is {shown(value)}; expected {' or '.join(kind.__name__ for kind in kinds)}")
    return value
