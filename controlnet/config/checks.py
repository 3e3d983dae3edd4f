"""Checks a configuration against the tables of keys: unknown keys, types and ranges, classes and their arguments."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from controlnet.config.keys import SCHEMA, STAGE
from controlnet.config.schema import (
    ConfigError,
    Key,
    as_key,
    did_you_mean,
    is_list,
    join,
    refuse_unknown,
    shown,
)
from controlnet.config.stages import ARGUMENTS, CONTROLLED, REFUSED, STAGES, TARGET_DEFAULTS, TARGETS

# Every precision, by its name here: the dtype, and the spellings of Lightning and NeMo.
PRECISIONS: dict[str, tuple[torch.dtype, tuple[str, ...]]] = {
    "fp32": (torch.float32, ("32", "32-true", "fp32", "float32")),
    "fp16": (torch.float16, ("16", "16-mixed", "fp16", "fp16-mixed", "float16")),
    "bf16": (torch.bfloat16, ("bf16", "bf16-mixed", "bfloat16")),
}


LONGEST_TEXT = 4096  # of a value: as long as a path can be


def precision(value: Any, key: str = "trainer.precision") -> str:
    """ "fp32", "fp16" or "bf16" for any spelling that Lightning and NeMo know (16, "16-mixed", "bf16", 32, ...).

    `key` names the value in the ConfigError that an unknown spelling raises.
    """
    for name, (_, spellings) in PRECISIONS.items():
        if not isinstance(value, bool) and str(value) in spellings:
            return name
    known = [spelling for _, spellings in PRECISIONS.values() for spelling in spellings]
    raise ConfigError(f"{key} is {shown(value)}; expected one of {', '.join(known)}{did_you_mean(value, known)}")


def dtype(value: Any, key: str = "trainer.precision") -> torch.dtype:
    """Returns the torch dtype of a precision in any of its spellings; raises as `precision`."""
    return PRECISIONS[precision(value, key)][0]


def defaults(schema: Mapping[str, Any] = SCHEMA) -> dict[str, Any]:
    """Returns the tree of all default values."""
    return {
        key: defaults(entry) if isinstance(entry, dict) else None if entry is STAGE else as_key(entry).default
        for key, entry in schema.items()
    }


def every_key(schema: Mapping[str, Any] = SCHEMA, path: str = "") -> Iterator[tuple[str, Key]]:
    """Yields (dotted path, key) of every key except the arguments of the parts."""
    for name, entry in schema.items():
        full = join(path, name)
        if isinstance(entry, dict):
            yield from every_key(entry, full)
        elif entry is not STAGE:
            key = as_key(entry)
            yield full, key
            yield from every_key(key.keys or {}, full)


def check_sections(node: dict, schema: Mapping[str, Any] = SCHEMA, path: str = "") -> None:
    """Raises ConfigError for unknown keys. A section left empty in the file becomes an empty mapping."""
    for key, value in node.items():
        if key not in schema:
            refuse_unknown(path, key, schema)
        expected = schema[key]
        if expected is STAGE and value is not None and not isinstance(value, (dict, str)):
            raise ConfigError(f"{join(path, key)} is {shown(value)}; expected a mapping with a _target_")
        if isinstance(expected, dict):
            if isinstance(value, dict):
                check_sections(value, expected, join(path, key))
            elif value is None:
                node[key] = {}
            elif not (isinstance(value, str) and "${" in value):
                raise ConfigError(f"{join(path, key)} is {shown(value)}; expected a mapping of {', '.join(expected)}")


def check_values(node: Mapping[str, Any], schema: Mapping[str, Any] = SCHEMA, path: str = "") -> None:
    """Raises ConfigError for the first value that does not fit its key."""
    for name, entry in schema.items():
        full = join(path, name)
        if isinstance(entry, dict):
            if not isinstance(node[name], Mapping):
                raise ConfigError(f"{full} is {shown(node[name])}; expected a mapping of {', '.join(entry)}")
            check_values(node[name], entry, full)
        elif entry is not STAGE:
            check_value(full, node[name], as_key(entry))


def check_value(path: str, value: Any, key: Key) -> None:
    """Raises ConfigError unless the key may have this value."""
    if key.silent:
        return
    if isinstance(value, str) and len(value) > LONGEST_TEXT:
        raise ConfigError(f"{path} has {len(value)} characters; expected at most {LONGEST_TEXT}")
    if not key.fits(value):
        if key.only:
            raise ConfigError(f"{path} is {shown(value)}; only {_alternatives(key)} is possible here: {key.effect}")
        more = did_you_mean(value, map(str, key.choices)) if key.choices else ""
        raise ConfigError(f"{path} is {shown(value)}; expected {key.expected()}{more}")
    if key.keys is not None and value is not None:
        for name, inner in value.items():
            if name not in key.keys:
                refuse_unknown(path, name, key.keys)
            check_value(join(path, name), inner, key.keys[name])


def _alternatives(key: Key) -> str:
    values = [*([None] if key.null and key.default is None else []), *key.choices]
    return " or ".join(shown(value) for value in values)


def canonical_target(name: Any) -> str:
    """Translates a `_target_` into this package's name; raises ConfigError, with the nearest known name."""
    ours = {CONTROLLED, *ARGUMENTS}
    if not isinstance(name, str):
        raise ConfigError(f"_target_ is {shown(name)}; expected the name of a class, as {sorted(ours)[0]}")
    if name in ours:
        return name
    if name in TARGETS:
        return TARGETS[name]
    for beginning, reason in REFUSED.items():
        if name.startswith(beginning):
            raise ConfigError(f"_target_ {name} cannot be built: {reason}")
    raise ConfigError(f"_target_ {shown(name)} is not a known class{did_you_mean(name, [*TARGETS, *ours])}")


def check_stage(node: Any, stage: str) -> dict[str, Any]:
    """Checks the arguments of a part; returns them without ignored ones, `_target_` under this package's name.

    Args:
        node: the mapping of a part, `target` and `params` already resolved.
        stage: "unet_config" and so on.
    Raises ConfigError that names the key by its whole path.
    """
    path = f"model.{stage}"
    if not isinstance(node, Mapping):
        raise ConfigError(f"{path} is {shown(node)}; expected a mapping with a _target_")
    arguments = dict(node)
    if "_target_" not in arguments:
        if len(STAGES[stage]) > 1:
            raise ConfigError(f"{path} has no _target_; expected one of {', '.join(STAGES[stage])}")
        arguments["_target_"] = STAGES[stage][0]
    name = arguments.pop("_target_")
    try:
        target = canonical_target(name)
    except ConfigError as error:
        raise ConfigError(f"{path}.{error}") from None
    if target not in STAGES[stage]:
        raise ConfigError(f"{path}._target_ is {name}; expected one of {', '.join(STAGES[stage])}")
    known = ARGUMENTS[target]
    for key, value in arguments.items():
        if key not in known:
            refuse_unknown(path, key, known)
        check_value(join(path, key), value, known[key])
    arguments = {**TARGET_DEFAULTS.get(name, {}), **arguments}
    read = {key: value for key, value in arguments.items() if not (known[key].silent or known[key].only)}
    return {"_target_": target, **read}


def stage_of(target: str) -> str:
    """Returns the section that a class belongs in, such as unet_config."""
    return next(stage for stage, targets in STAGES.items() if target in targets)


def too_deep(node: Any, limit: int = 32, most: int = 200_000) -> bool:
    """True for a tree that is nested deeper than `limit` or has more than `most` values."""
    level, count = [node], 0
    for _ in range(limit):
        level = [child for parent in level for child in _children(parent)]
        count += len(level)
        if not level or count > most:
            return count > most
    return True


def _children(node: Any) -> list:
    if isinstance(node, Mapping):
        return list(node.values())
    return list(node) if is_list(node) else []
