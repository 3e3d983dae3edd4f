"""Reads a YAML configuration in NeMo's layout or the original repository's, and checks it."""

import contextlib
import io
import re
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from controlnet.common import documents
from controlnet.common.extras import require
from controlnet.config import checks, rules
from controlnet.config.references import resolve
from controlnet.config.schema import ConfigError, join, plain, shown
from controlnet.config.stages import STAGES

if TYPE_CHECKING:
    from omegaconf import DictConfig


def load(path: str | PathLike, overrides: Iterable[str] = (), *, sections: Iterable[str] | None = None) -> "DictConfig":
    """Reads a YAML file, applies overrides, checks every key and fills in the defaults.

    Args:
        path: YAML file in the layout of NeMo's ControlNet configuration, or of the original repository
            (`target:` and `params:`).
        overrides: dotted assignments, "model.unet_config.use_checkpoint=True"; values are YAML. A key may carry
            `.params.` and, as Hydra writes it, a leading + or ++.
        sections: those that the caller reads, "model" for inference; an environment variable that another one refers
            to need not be set. None for all.
    Returns the merged configuration, interpolations resolved: `trainer`, `exp_manager`, `model`, `data`, `optim`.
        `_target_` names are this package's, `params` are merged into their node, `trainer.precision` is "fp32", "fp16"
        or "bf16"; `model.data` and `model.optim` are found at `data` and `optim`; keys that nothing reads are left out.
        What refers to an environment variable (`${oc.env:TOKEN}`) still does: reading it gives the variable's value,
        saving the configuration the reference.
    Raises ConfigError for an unknown key or target, a value of the wrong kind or out of range, or one that asks for
        something that is not built here; FileNotFoundError.
    """
    return compose(read(path), overrides, sections=sections)


def read(path: str | PathLike) -> dict[str, Any]:
    """Reads a YAML file as it stands, interpolations unresolved; raises as `load`."""
    _omegaconf()
    if Path(path).stat().st_size > documents.LARGEST:
        raise ConfigError(f"{path} has {Path(path).stat().st_size} bytes; expected a configuration, below 1 MiB")
    with _readable(f"{path} is not a YAML configuration"):
        return parse(Path(path).read_text(encoding="utf-8-sig"), path)


def parse(text: str, path: str | PathLike) -> dict[str, Any]:
    """`read` for the text of a file; `path` names it in errors."""
    omegaconf = _omegaconf()
    with _readable(f"{path} is not a YAML configuration"):
        with documents.readable(text):
            document = omegaconf.OmegaConf.load(io.StringIO(text))
        if not isinstance(document, omegaconf.DictConfig):
            raise ConfigError(f"{path} holds a {type(document).__name__}; expected a mapping with a `model` section")
        return omegaconf.OmegaConf.to_container(document, resolve=False)


def compose(
    document: Mapping[str, Any], overrides: Iterable[str] = (), *, sections: Iterable[str] | None = None
) -> "DictConfig":
    """`load` for a configuration that is already in memory."""
    OmegaConf = _omegaconf().OmegaConf
    with _readable("the configuration cannot be read"):
        given = OmegaConf.create(_canonical_tree(OmegaConf.to_container(OmegaConf.create(document), resolve=False)))
    for override in overrides:
        _apply_override(given, override)
    tree = OmegaConf.to_container(given, resolve=False)
    if checks.too_deep(tree):
        raise ConfigError("the configuration is nested more than 32 deep, or has more than 200000 values")
    checks.check_sections(tree)
    for path, value in _paths(tree):
        if value == "???":
            raise ConfigError(f"{path} is ???; give it a value in the file or as an override")
    with _readable("the configuration cannot be resolved"):
        defaults = OmegaConf.create(checks.defaults())
        return _checked(resolve(OmegaConf.merge(defaults, OmegaConf.create(tree)), defaults, sections), tree)


def save(cfg: "DictConfig", path: str | PathLike) -> None:
    """Writes a configuration that `load` reads again. Values from environment variables stay references."""
    _omegaconf().OmegaConf.save(cfg, path, resolve=False)


def _checked(merged: "DictConfig", tree: dict) -> "DictConfig":
    """Checks the values of the merged configuration, applies `rules`, and drops ignored keys."""
    OmegaConf = _omegaconf().OmegaConf
    merged.model._target_ = checks.canonical_target(merged.model._target_)
    if merged.model._target_ in checks.ARGUMENTS:
        raise ConfigError(f"model._target_ is {merged.model._target_}; expected {checks.CONTROLLED}")
    checks.check_values(merged)
    for stage in STAGES:
        if merged.model[stage] is not None:
            node = checks.check_stage(merged.model[stage], stage)
            for key in set(merged.model[stage]) - set(node):
                merged.model[stage].pop(key)
            for key in set(node) - set(merged.model[stage]) | {"_target_"}:
                merged.model[stage][key] = node[key]
    rules.apply(merged, {path: OmegaConf.select(merged, path) for path, _ in _paths(tree)})
    for path, key in checks.every_key():
        parent, _, name = path.rpartition(".")
        node = OmegaConf.select(merged, parent) if parent else merged
        if (key.silent or path in _MOVED) and node is not None:
            node.pop(name, None)
    return merged


# Keys whose value `rules` has brought where it is read.
_MOVED = {
    "trainer.strategy", "trainer.max_time", "exp_manager.checkpoint_callback_params.monitor",
    "model.precision", "model.channels", "model.learning_rate", "model.base_learning_rate", "model.use_ema",
    "model.nsys_profile", "model.restore_from_path",
}  # fmt: skip


def _omegaconf() -> Any:
    require("omegaconf", "yaml", extra="train", wanted_by="configurations are YAML files, read by OmegaConf")
    import omegaconf
    import omegaconf.errors

    return omegaconf


@contextlib.contextmanager
def _readable(what: str) -> Iterator[None]:
    """Turns errors of OmegaConf and YAML into a ConfigError that begins with `what`."""
    import yaml  # comes with OmegaConf

    errors = _omegaconf().errors
    try:
        yield
    except ConfigError:
        raise
    except (errors.OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError, KeyError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error).strip()
        raise ConfigError(f"{what}: {reason[:500]}") from error


def _canonical_path(path: str) -> str:
    """Translates a dotted path to our layout: no `params`, `_target_` for `target`, data and optim at the top."""
    parts = [part for part in path.split(".") if part != "params"]
    parts = ["_target_" if part == "target" else part for part in parts]
    if len(parts) > 1 and parts[0] == "model" and parts[1] in ("data", "optim"):
        parts = parts[1:]
    return ".".join(parts)


def _canonical_tree(node: Any, path: str = "") -> Any:
    """Merges every `target`/`params` pair into its node and moves model.data and model.optim to the top."""
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
        raise ConfigError(f"{join(path, 'params')} is {shown(parameters)}; expected a mapping")
    for key, value in parameters.items():
        if key in node and node[key] != value:
            raise ConfigError(
                f"{join(path, key)} is {shown(node[key])} and, under params, {shown(value)}; give it once"
            )
        node[key] = value
    node = {key: _canonical_tree(value, join(path, str(key))) for key, value in node.items()}
    if path == "" and isinstance(node.get("model"), dict):
        for section in ("data", "optim"):
            if section in node["model"]:
                if node.get(section) is not None:
                    raise ConfigError(f"both {section} and model.{section} are given; keep one")
                node[section] = node["model"].pop(section)
    return node


def _apply_override(given: "DictConfig", override: str) -> None:
    OmegaConf = _omegaconf().OmegaConf
    key, equals, _ = override.partition("=")
    path = _canonical_path(key.strip().lstrip("+"))
    if not equals or not all(path.split(".")):
        raise ConfigError(f"override {override!r} is not of the form key.subkey=value")
    with _readable(f"override {override[:200]!r} cannot be applied"):
        with documents.readable(override[len(key) + 1 :]):
            value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value{override[len(key) :]}"]), resolve=False)
        OmegaConf.update(given, path, _canonical_tree(value["value"]), merge=True, force_add=True)


def canonical_node(node: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a part's mapping in this package's layout, in plain containers."""
    return _canonical_tree(plain(node))


def _paths(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields every dotted path below a node with its value."""
    if path:
        yield path, node
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _paths(value, join(path, str(key)))
