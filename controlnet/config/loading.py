"""Reads a YAML configuration in NeMo's layout or the original repository's, checks it, and makes the objects it names.

The keys themselves, with defaults and remarks, are data in `keys.py`.
"""

import importlib
import inspect
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import SequenceMatcher
from os import PathLike
from typing import TYPE_CHECKING, Any

from controlnet.config.keys import (
    CHOICES,
    NO_EFFECT,
    ONLY,
    PARAMETERS,
    PRECISIONS,
    REFUSED_TARGETS,
    SCHEMA,
    STAGE,
    STAGE_NO_EFFECT,
    STAGE_TARGETS,
    TARGET_DEFAULTS,
    TARGETS,
    WEIGHT_KEYS,
    Maybe,
)

if TYPE_CHECKING:
    from omegaconf import DictConfig

logger = logging.getLogger(__name__)


class ConfigError(ValueError):
    """A configuration that cannot be used: names the key, what came and what was expected."""


def load(path: str | PathLike, overrides: Iterable[str] = ()) -> "DictConfig":
    """Reads a YAML file, applies overrides, checks every key and fills in the defaults.

    Arguments:
        path: YAML file in the layout of NeMo's ControlNet configuration, or of the original repository
            (`target:` and `params:`).
        overrides: dotted assignments, "model.unet_config.use_checkpoint=True"; values are YAML. A key may carry
            `.params.` and, as Hydra writes it, a leading + or ++.
    Returns the merged configuration, interpolations resolved: `name`, `trainer`, `exp_manager`, `model`, `data`,
        `optim`. `_target_` names are this package's, `params` are merged into their node, `trainer.precision` is
        "fp32", "fp16" or "bf16"; `model.data` and `model.optim` are found at `data` and `optim`.
    Raises ConfigError for an unknown key or target (with the nearest known one), a value of the wrong kind, or a
        value that asks for something that is not built here; FileNotFoundError.
    Keys that are accepted without effect are logged once, with the reason, and left out of the result.
    """
    omegaconf = _omegaconf()
    try:
        document = omegaconf.OmegaConf.load(path)
    except (omegaconf.errors.OmegaConfBaseException, _yaml_error(), UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a YAML configuration: {error}") from error
    if not isinstance(document, omegaconf.DictConfig):
        raise ConfigError(f"{path} holds a {type(document).__name__}; expected a mapping with a `model` section")
    return compose(document, overrides)


def compose(document: Mapping[str, Any], overrides: Iterable[str] = ()) -> "DictConfig":
    """`load` for a configuration that is already in memory."""
    omegaconf = _omegaconf()
    OmegaConf = omegaconf.OmegaConf
    plain = OmegaConf.to_container(OmegaConf.create(document), resolve=False)
    given = OmegaConf.create(_canonical_tree(plain))
    for override in overrides:
        _apply_override(given, override)
    tree = OmegaConf.to_container(given, resolve=False)
    _check_keys(tree, SCHEMA, "")
    for path, value in _paths(tree):
        if value == "???":
            raise ConfigError(f"{path} is ???; give it a value in the file or as an override")
    try:
        merged = OmegaConf.merge(OmegaConf.create(_defaults(SCHEMA)), OmegaConf.create(tree))
        OmegaConf.resolve(merged)
    except omegaconf.errors.OmegaConfBaseException as error:
        raise ConfigError(f"the configuration cannot be resolved: {str(error).strip()}") from error
    merged.trainer.precision = precision(merged.trainer.precision)
    merged.model._target_ = canonical_target(merged.model._target_)
    for stage in STAGE_TARGETS:
        if merged.model.get(stage) is not None:
            _check_stage(merged.model[stage], stage)
    _check_values(merged, SCHEMA, "")
    _drop_without_effect(merged, tree)
    return merged


def precision(value: Any, key: str = "trainer.precision") -> str:
    """ "fp32", "fp16" or "bf16" for any spelling that Lightning and NeMo know (16, "16-mixed", "bf16", 32, ...).

    `key` names the value in the ConfigError that an unknown spelling raises.
    """
    for name, spellings in PRECISIONS.items():
        if str(value) in spellings:
            return name
    spellings = [spelling for group in PRECISIONS.values() for spelling in group]
    raise ConfigError(
        f"{key} is {value!r}; expected one of {', '.join(spellings)} (nearest: {nearest(str(value), spellings)})"
    )


def instantiate(node: Mapping[str, Any], **extra: Any) -> Any:
    """The object that a node describes: the class or function named by `_target_`, called with the other keys.

    Arguments:
        node: mapping with `_target_` (this package's name, NeMo's, the original's) and the call's arguments.
        extra: further arguments, which win over the node's.
    Raises ConfigError for an unknown target or an argument that it does not take, naming the nearest, and for an
        argument that it wants and does not get.
    """
    tree = _canonical_tree(_plain(node))
    if "_target_" not in tree:
        raise ConfigError(f"no _target_ among the keys {', '.join(map(str, tree)) or '(none)'}")
    name = tree.pop("_target_")
    arguments = {**TARGET_DEFAULTS.get(name, {}), **tree, **extra}
    known = target_arguments(name)
    silent = _without_effect(canonical_target(name))
    arguments = {key: value for key, value in arguments.items() if key in known or key not in silent}
    for key in arguments:
        if key not in known:
            raise ConfigError(
                f"{canonical_target(name)} takes no argument {key!r}; the nearest is {nearest(key, known)}"
            )
    missing = [key for key, parameter in known.items() if parameter.default is parameter.empty and key not in arguments]
    if missing:
        raise ConfigError(f"{canonical_target(name)} wants a value for {', '.join(missing)}")
    return import_target(name)(**arguments)


def canonical_target(name: str) -> str:
    """This package's name for a `_target_`; raises ConfigError naming the nearest for an unknown one."""
    ours = {target for targets in STAGE_TARGETS.values() for target in targets} | set(TARGETS.values())
    if name in ours:
        return name
    if name in TARGETS:
        return TARGETS[name]
    if name in REFUSED_TARGETS:
        raise ConfigError(f"_target_ {name} cannot be built: {REFUSED_TARGETS[name]}")
    raise ConfigError(f"_target_ {name!r} is not known; the nearest known one is {nearest(name, [*TARGETS, *ours])}")


def import_target(name: str) -> Callable[..., Any]:
    """The class or function that a `_target_` names."""
    return _imported(canonical_target(name))


def _imported(name: str) -> Callable[..., Any]:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def target_arguments(name: str) -> Mapping[str, inspect.Parameter]:
    """The arguments that a target takes."""
    name = canonical_target(name)
    return inspect.signature(_imported(PARAMETERS.get(name, name))).parameters


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word most like `word`."""
    return max(sorted(known), key=lambda candidate: SequenceMatcher(None, word, candidate).ratio())


def _omegaconf() -> Any:
    try:
        import omegaconf
        import omegaconf.errors
    except ImportError as error:
        raise ImportError(
            "OmegaConf is not installed; it reads the YAML configurations: pip install 'omegaconf>=2.3'"
        ) from error
    return omegaconf


def _yaml_error() -> type[Exception]:
    import yaml  # comes with OmegaConf

    return yaml.YAMLError


def _plain(node: Any) -> Any:
    """Containers of any kind as dict and list, so that classes see no OmegaConf type."""
    if isinstance(node, Mapping):
        return {key: _plain(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)) or type(node).__name__ == "ListConfig":
        return [_plain(value) for value in node]
    return node


def _canonical_path(path: str) -> str:
    """A dotted path in this package's spelling: no `params`, `_target_` for `target`, data and optim at the top."""
    parts = [part for part in path.split(".") if part != "params"]
    parts = ["_target_" if part == "target" else part for part in parts]
    if parts[0] == "model" and len(parts) > 1 and parts[1] in ("data", "optim"):
        parts = parts[1:]
    return ".".join(parts)


def _canonical_tree(node: Any, path: str = "") -> Any:
    """The tree with every `target`/`params` pair merged into its node and model.data, model.optim at the top."""
    if isinstance(node, list):
        return [_canonical_tree(value, path) for value in node]
    if isinstance(node, str):
        return re.sub(r"\$\{([\w.]+)\}", lambda match: "${" + _canonical_path(match[1]) + "}", node)
    if not isinstance(node, dict):
        return node
    node = dict(node)
    if "target" in node:
        node["_target_"] = node.pop("target")
    parameters = node.pop("params", None) or {}
    if not isinstance(parameters, dict):
        raise ConfigError(f"{_join(path, 'params')} is {parameters!r}; expected a mapping")
    for key, value in parameters.items():
        if key in node and node[key] != value:
            raise ConfigError(f"{_join(path, key)} is {node[key]!r} and, under params, {value!r}; give it once")
        node[key] = value
    node = {key: _canonical_tree(value, _join(path, str(key))) for key, value in node.items()}
    if path == "" and isinstance(node.get("model"), dict):
        for section in ("data", "optim"):
            if section in node["model"]:
                if node.get(section) is not None:
                    raise ConfigError(f"both {section} and model.{section} are given; keep one")
                node[section] = node["model"].pop(section)
    return node


def _apply_override(given: "DictConfig", override: str) -> None:
    omegaconf = _omegaconf()
    OmegaConf = omegaconf.OmegaConf
    key, equals, _ = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"override {override!r} is not of the form key.subkey=value")
    path = _canonical_path(key.strip().lstrip("+"))
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value{override[len(key) :]}"]), resolve=False)
        OmegaConf.update(given, path, _canonical_tree(value["value"]), merge=True, force_add=True)
    except (omegaconf.errors.OmegaConfBaseException, _yaml_error(), TypeError, ValueError) as error:
        raise ConfigError(f"override {override!r} cannot be applied: {error}") from error


def _defaults(schema: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, default in schema.items():
        if isinstance(default, dict):
            tree[key] = _defaults(default)
        else:
            tree[key] = None if default is STAGE or isinstance(default, Maybe) else default
    return tree


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _unknown_key(path: str, key: str, known: Iterable[str]) -> ConfigError:
    return ConfigError(f"{_join(path, key)} is not a known key; the nearest is {_join(path, nearest(key, known))}")


def _check_keys(node: dict, schema: Mapping[str, Any], path: str) -> None:
    """Refuses unknown keys; a section left empty in the file becomes an empty mapping, so that its defaults hold."""
    for key, value in node.items():
        if key not in schema:
            raise _unknown_key(path, str(key), schema)
        expected = schema[key]
        if expected is STAGE and value is not None and not isinstance(value, dict):
            raise ConfigError(f"{_join(path, key)} is {value!r}; expected a mapping with a _target_")
        if isinstance(expected, dict):
            if isinstance(value, dict):
                _check_keys(value, expected, _join(path, key))
            elif value is None:
                node[key] = {}
            else:
                raise ConfigError(f"{_join(path, key)} is {value!r}; expected a mapping of {', '.join(expected)}")


def _check_values(node: Mapping[str, Any], schema: Mapping[str, Any], path: str) -> None:
    for key, expected in schema.items():
        full, value = _join(path, key), node[key]
        if isinstance(expected, dict):
            _check_values(value, expected, full)
        elif expected is not STAGE and expected is not None:
            _check_kind(full, value, expected)
        if full in CHOICES and value not in CHOICES[full]:
            raise ConfigError(
                f"{full} is {value!r}; expected one of {', '.join(CHOICES[full])}"
                f" (nearest: {nearest(str(value), CHOICES[full])})"
            )
        if full in ONLY and value != ONLY[full][0]:
            raise ConfigError(f"{full} is {value!r}; only {ONLY[full][0]!r} is possible here: {ONLY[full][1]}")


def _check_kind(path: str, value: Any, expected: Any) -> None:
    if isinstance(expected, Maybe):
        if value is None:
            return
        kind = expected.kind
    else:
        kind = type(expected)
    if kind is list:
        fits = isinstance(value, (list, tuple)) or type(value).__name__ == "ListConfig"
    elif kind is float:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    else:
        fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if not fits:
        raise ConfigError(f"{path} is {value!r}; expected {_KIND_NAMES[kind]}")


_KIND_NAMES = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a text",
    list: "a list",
}


def _without_effect(target: str) -> Mapping[str, str]:
    """The silent keys of the stage that a target belongs to."""
    for stage, targets in STAGE_TARGETS.items():
        if target in targets:
            return STAGE_NO_EFFECT[stage]
    return {}


def _check_stage(node: "DictConfig", stage: str) -> None:
    """Checks a part's target and keys in place, and gives the target this package's name."""
    path = f"model.{stage}"
    if "_target_" not in node:
        if len(STAGE_TARGETS[stage]) > 1:
            raise ConfigError(f"{path} has no _target_; expected one of {', '.join(STAGE_TARGETS[stage])}")
        node["_target_"] = STAGE_TARGETS[stage][0]
    name = node["_target_"]
    target = canonical_target(name)
    if target not in STAGE_TARGETS[stage]:
        raise ConfigError(f"{path}._target_ is {name}; expected one of {', '.join(STAGE_TARGETS[stage])}")
    for key, value in TARGET_DEFAULTS.get(name, {}).items():
        node.setdefault(key, value)
    node["_target_"] = target
    known = {
        "_target_",
        *target_arguments(target),
        *STAGE_NO_EFFECT[stage],
        *WEIGHT_KEYS.get(stage, ()),
    }
    for key in node:
        if key not in known:
            raise _unknown_key(path, key, known)


def _drop_without_effect(merged: "DictConfig", given: dict) -> None:
    """Removes the keys that nothing reads, so that nothing can, and says which of them the user has set."""
    silent = dict(NO_EFFECT)
    for stage, reasons in STAGE_NO_EFFECT.items():
        silent.update({f"model.{stage}.{key}": reason for key, reason in reasons.items()})
    found = [f"{path} ({silent[path]})" for path, _ in _paths(given) if path in silent]
    if found:
        logger.info("accepted without effect: %s", "; ".join(found))
    for path in silent:
        parent, _, key = path.rpartition(".")
        node = _omegaconf().OmegaConf.select(merged, parent) if parent else merged
        if node is not None:
            node.pop(key, None)


def _paths(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted path below a node, with its value."""
    if path:
        yield path, node
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _paths(value, _join(path, str(key)))
