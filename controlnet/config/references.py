"""Resolves interpolations, except those of environment variables.

A value from the environment may be a secret, and a run saves its configuration with each checkpoint.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from controlnet.config.schema import ConfigError, is_list, join

if TYPE_CHECKING:
    from omegaconf import DictConfig

_MARK, _END = "CNREFERENCE", "ECNEREFERENC"
# The resolvers of OmegaConf that are looked up in a copy of the tree under another name, whose result is a mark.
_RESOLVERS = {"oc.env": "controlnet.env", "oc.decode": "controlnet.decode"}


def resolve(config: "DictConfig", defaults: "DictConfig", sections: Iterable[str] | None = None) -> "DictConfig":
    """The configuration with every interpolation replaced by its value, except for `${oc.env:...}`.

    A value that goes back to an environment variable, by however many other keys, becomes a reference to that variable
    itself; OmegaConf resolves it where the value is read.

    Args:
        defaults: what a key has whose variable is not set, outside the sections.
        sections: top-level keys of which a variable that is not set is an error; None for all.
    Raises ConfigError for a variable that is not set, and OmegaConf's errors for other interpolations.
    """
    from omegaconf import OmegaConf

    _register()
    marked = OmegaConf.create(_map(OmegaConf.to_container(config, resolve=False), _renamed))
    OmegaConf.resolve(marked)
    resolved = OmegaConf.create(_map(OmegaConf.to_container(marked), _unmarked))
    needed = None if sections is None else set(sections)
    for path, reason in list(_unset(resolved)):
        if needed is None or path.partition(".")[0] in needed:
            raise ConfigError(f"{path} cannot be resolved: {reason}")
        OmegaConf.update(resolved, path, OmegaConf.select(defaults, path), merge=False)
    return resolved


def _register() -> None:
    from omegaconf import OmegaConf

    register = getattr(OmegaConf, "register_resolver", None) or OmegaConf.register_new_resolver  # its older name
    for name, function in (("controlnet.env", _env), ("controlnet.decode", _decode)):
        register(name, function, replace=True)


def _mark(text: str) -> str:
    return f"{_MARK}{text.encode().hex()}{_END}"


def _env(*arguments: Any) -> str:
    return _mark("${oc.env:" + ",".join(_argument(argument) for argument in arguments) + "}")


def _decode(text: Any) -> Any:
    from omegaconf.resolvers import oc

    if isinstance(text, str) and _MARK in text:
        return _mark("${oc.decode:" + _unmarked(text) + "}")
    return oc.decode(text)


def _argument(value: Any) -> str:
    if value is None:
        return "null"
    text = _unmarked(str(value))
    return text if "${" in text or text.replace("_", "").isalnum() else '"' + text.replace('"', '\\"') + '"'


def _renamed(value: str) -> str:
    for name, ours in _RESOLVERS.items():
        value = value.replace(f"{name}:", f"{ours}:")
    return value


def _unmarked(value: str) -> str:
    while _MARK in value:
        before, _, rest = value.partition(_MARK)
        code, _, after = rest.partition(_END)
        value = before + bytes.fromhex(code).decode() + after
    return value


def _map(node: Any, change: Any) -> Any:
    if isinstance(node, dict):
        return {key: _map(value, change) for key, value in node.items()}
    if isinstance(node, list):
        return [_map(value, change) for value in node]
    return change(node) if isinstance(node, str) else node


def _unset(node: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yields (dotted path, reason) of every key whose value cannot be resolved."""
    from omegaconf.errors import OmegaConfBaseException

    for key in list(node) if isinstance(node, Mapping) else range(len(node)):
        full = join(path, str(key)) if isinstance(node, Mapping) else path
        try:
            value = node[key]
        except OmegaConfBaseException as error:
            yield full, str(error).strip().splitlines()[0]
            continue
        if isinstance(value, Mapping) or is_list(value):
            yield from _unset(value, full)
