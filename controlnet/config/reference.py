"""Generates docs/configuration.md: every key with its values, its default and its effect."""

from typing import Any

from controlnet.config.checks import every_key
from controlnet.config.schema import Key, join, word
from controlnet.config.stages import ARGUMENTS, STAGES, TARGETS

HEAD = """# Configuration

Every key of a configuration. `python -m controlnet.config > docs/configuration.md` writes this page, and a test
compares it with the tables in `controlnet/config/`; `python -m controlnet.config FILE key=value ...` checks a file and
prints what it comes to. A file may be in the layout of NeMo's ControlNet configuration (`model.data` and `model.optim`
included) or of the original repository (`target:` and `params:`). Keys that are left out have the defaults below.

Any other key is an error that names the nearest one. A key marked *not read* is accepted, with any value, so that
other systems' files run as they are; the text says why it need not be read. A key marked *only* changes the result
elsewhere and is not built here: the value that asks for nothing is accepted, others are errors.

`${oc.env:NAME}` is the value of an environment variable. It stays a reference in the configuration that a run saves.
"""


def markdown() -> str:
    """Returns the text of the page."""
    parts = [HEAD]
    sections: dict[str, list[tuple[str, Key]]] = {}
    for path, key in every_key():
        top = path.partition(".")[0]
        sections.setdefault(top if "." in path else "top level", []).append((path, key))
    for name, rows in sections.items():
        parts.append(f"## {name}\n\n{_table(rows)}")
    for stage, targets in STAGES.items():
        for target in targets:
            rows = [(join(f"model.{stage}", key), entry) for key, entry in _with_nested(ARGUMENTS[target])]
            parts.append(f"## model.{stage}: {target}\n\n{_names(target)}{_table(rows)}")
    return "\n".join(parts)


def _with_nested(keys: dict[str, Key]) -> list[tuple[str, Key]]:
    rows = []
    for name, key in keys.items():
        rows += [(name, key), *((join(name, inner), entry) for inner, entry in (key.keys or {}).items())]
    return rows


def _names(target: str) -> str:
    names = [f"- `{name}`\n" for name, ours in TARGETS.items() if ours == target]
    return "".join(["Other names of this `_target_`:\n\n", *names, "\n"]) if names else ""


def _table(rows: list[tuple[str, Key]]) -> str:
    lines = ["| key | values | default | effect |", "| --- | --- | --- | --- |"]
    lines += [f"| `{path}` | {_values(key)} | {_default(key)} | {key.effect} |" for path, key in rows]
    return "\n".join(lines) + "\n"


def _values(key: Key) -> str:
    if key.silent:
        return "*not read*"
    if key.only:
        values = ([None] if key.null else []) + list(key.choices)
        return "*only* " + " or ".join(_code(value) for value in values)
    return key.expected().replace("|", "\\|")


def _default(key: Key) -> str:
    if key.silent:
        return ""
    return "*required*" if key.default is ... else _code(key.default)


def _code(value: Any) -> str:
    return f"`{word(value)}`" if value != "" else '`""`'
