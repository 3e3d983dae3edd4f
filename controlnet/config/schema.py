"""Describes a configuration key as data: its type, range, default and effect."""

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

LARGEST = 2**63 - 1  # the largest integer; a key may have a lower maximum


class ConfigError(ValueError):
    """An invalid configuration. The message names the key, the value and what was expected."""


@dataclass(frozen=True)
class Key:
    """The accepted values, the default and the effect of one key.

    Attributes:
        kinds: accepted types of bool, int, float, str, list, dict; an int is accepted as a float. Empty: any value.
        default: value of a missing key; `...` for a required key.
        effect: what the key does here, in a few words, for the table in docs/configuration.md.
        null: whether null is accepted, too.
        low, high: bounds of numbers, inclusive; `above` and `below` exclude their value.
        choices: the only values.
        only: other systems have more values than `choices`, for features that are missing here; `effect` says why.
        silent: the key is accepted, so that other systems' files run unchanged, and ignored; `effect` says why.
        items: accepted values of a list's entries.
        length, longest: exact and greatest number of a list's entries.
        keys: accepted keys of a mapping.
    """

    kinds: tuple[type, ...]
    default: Any
    effect: str
    null: bool = False
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[Any, ...] = ()
    only: bool = False
    silent: bool = False
    items: "Key | None" = None
    length: int | None = None
    longest: int | None = None
    keys: Mapping[str, "Key"] | None = None

    def fits(self, value: Any) -> bool:
        if value is None and (self.null or not (self.kinds or self.only)):
            return True
        if self.choices or self.only:
            return any(_same(plain(value), choice) for choice in self.choices)
        return not self.kinds or any(self._fits(kind, value) for kind in self.kinds)

    def _fits(self, kind: type, value: Any) -> bool:
        if kind is list:
            right = is_list(value) and (self.length is None or len(value) == self.length)
            right = right and (self.longest is None or len(value) <= self.longest)
            return right and (self.items is None or all(self.items.fits(item) for item in value))
        if kind is dict:
            return isinstance(value, Mapping)
        if kind is str:
            return isinstance(value, str) and "\0" not in value
        if kind is bool:
            return isinstance(value, bool)
        if not is_number(value) or (kind is int and not isinstance(value, int)):
            return False
        return self._in_range(value) and (kind is float or abs(value) <= LARGEST)

    def _in_range(self, value: float) -> bool:
        return (
            (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def expected(self) -> str:
        """The accepted values in words: "an integer from 1 to 64", "a list of 2 numbers at least 0 and below 1"."""
        if self.choices:
            words = [word(choice) for choice in self.choices]
            return f"one of {', '.join(words)}" if len(words) > 1 else words[0]
        return " or ".join([self._words(kind) for kind in self.kinds] + ["null"] * self.null) or "any value"

    def _words(self, kind: type) -> str:
        if kind is list:
            return "a list" if self.items is None else f"a list of {self._entries()}, each {self.items.expected()}"
        if kind is dict:
            return f"a mapping of {', '.join(self.keys)}" if self.keys else "a mapping"
        words = {bool: "true or false", int: "an integer", float: "a number", str: "a text"}[kind]
        return words + self._range() if kind in (int, float) else words

    def _entries(self) -> str:
        if self.length is not None:
            return f"{self.length} entries"
        return "entries" if self.longest is None else f"at most {self.longest} entries"

    def _range(self) -> str:
        if self.low is not None and self.high is not None:
            return f" from {self.low} to {self.high}"
        bounds = {"at least": self.low, "above": self.above, "at most": self.high, "below": self.below}
        given = [f"{name} {bound}" for name, bound in bounds.items() if bound is not None]
        return " " + " and ".join(given) if given else ""


def flag(default: Any, effect: str, **how: Any) -> Key:
    return Key((bool,), default, effect, **how)


def integer(default: Any, effect: str, **how: Any) -> Key:
    return Key((int,), default, effect, null=default is None, **how)


def number(default: Any, effect: str, **how: Any) -> Key:
    return Key((float,), default, effect, null=default is None, **how)


def text(default: Any, effect: str, **how: Any) -> Key:
    return Key((str,), default, effect, null=default is None, **how)


def several(default: Any, effect: str, items: Key | None = None, **how: Any) -> Key:
    return Key((list,), default, effect, null=default is None, items=items, **how)


def mapping(effect: str, keys: Mapping[str, Key] | None = None) -> Key:
    return Key((dict,), None, effect, null=True, keys=keys)


def only(default: Any, why: str, *others: Any) -> Key:
    """A key of another system for a feature that is not implemented: accepts only values that leave it off."""
    values = (default, *others)
    return Key((), default, why, null=None in values, choices=tuple(v for v in values if v is not None), only=True)


def silent(default: Any, why: str) -> Key:
    """A key that is accepted and ignored, whatever its value; see `Key.silent`."""
    return Key((), default, why, silent=True)


def as_key(entry: Any) -> Key:
    """Makes a Key of a bare default, whose type it takes."""
    if isinstance(entry, Key):
        return entry
    return Key(() if entry is None else (type(entry),), entry, "")


def is_number(value: Any) -> bool:
    """True for a finite int or float, but no bool."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return isinstance(value, int) or math.isfinite(value)


def _same(value: Any, choice: Any) -> bool:
    """True for equal values of the same kind: 0 equals 0.0, but not False."""
    return value == choice and (type(value) is type(choice) or (is_number(value) and is_number(choice)))


def is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) or type(value).__name__ == "ListConfig"


def word(value: Any) -> str:
    """Formats an expected value for a message: text as it is, anything else as YAML, shortened."""
    plain = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return plain[value]
    return value if isinstance(value, str) else shown(value)


def shown(value: Any) -> str:
    """Formats a given value for a message: its repr, shortened."""
    text = repr(plain(value))
    return text if len(text) <= 200 else text[:197] + "..."


def plain(node: Any) -> Any:
    """Converts OmegaConf containers to dict and list."""
    if isinstance(node, Mapping):
        return {key: plain(value) for key, value in node.items()}
    if is_list(node):
        return [plain(value) for value in node]
    return node


def join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def nearest(word: str, known: Iterable[str]) -> str:
    """Returns the known word that is most similar to `word`."""
    return difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.0)[0]


def did_you_mean(word: Any, known: Iterable[str]) -> str:
    """ " (nearest: KNOWN)" to append to a message, if a known word is similar; else an empty text."""
    found = difflib.get_close_matches(str(word)[:200], sorted(known), n=1)
    return f" (nearest: {found[0]})" if found else ""


def refuse_unknown(path: str, key: Any, known: Iterable[str]) -> None:
    """Raises ConfigError for an unknown key."""
    known = list(known)
    close = difflib.get_close_matches(str(key)[:200], sorted(known), n=1)
    if close:
        more = f"; the nearest is {join(path, close[0])}"
    elif len(known) <= 12:
        more = f"; expected one of {', '.join(known)}" + (f" in {path}" if path else "")
    else:
        more = ", nor is any like it; `python -m controlnet.config` lists all"
    raise ConfigError(f"{shown(key) if not isinstance(key, str) else join(path, key[:200])} is not a known key{more}")
