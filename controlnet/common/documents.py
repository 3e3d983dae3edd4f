"""YAML documents that nobody vouches for: bounds, and one kind of error."""

import contextlib
from collections.abc import Iterator
from typing import Any

LARGEST = 1 << 20  # bytes; a configuration has some ten thousand
_DEEPEST, _MOST = 64, 10**6  # nodes, counted as often as aliases name them


@contextlib.contextmanager
def readable(text: str) -> Iterator[None]:
    """Within it the text may be loaded: it is bounded, and whatever is wrong with it is a yaml.YAMLError.

    PyYAML's constructors let an IndexError or AttributeError through for a number or a date that is none.

    Raises:
        yaml.YAMLError: also for a document larger than LARGEST, nested deeply, or made large by its aliases.
    """
    import yaml  # comes with OmegaConf, an optional package

    if len(text) > LARGEST:
        raise yaml.YAMLError(f"it has {len(text)} characters; expected a configuration, below 1 MiB")
    try:
        _check_nodes(yaml.compose(text, Loader=yaml.SafeLoader))
        yield
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error
    except (LookupError, AttributeError, ArithmeticError) as error:
        raise yaml.YAMLError(f"a value is not of the kind that its tag names ({error})") from error


def _check_nodes(root: Any) -> None:
    import yaml

    level, count = [root] if root is not None else [], 0
    for _ in range(_DEEPEST):
        count += len(level)
        if not level:
            return
        if count > _MOST:
            break
        level = [child for node in level for child in _children(node)]
    raise yaml.YAMLError(f"it is nested more than {_DEEPEST} deep, or has more than a million values")


def _children(node: Any) -> list:
    if not isinstance(node.value, list):
        return []
    return [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]
