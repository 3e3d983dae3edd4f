"""YAML configurations: reading and checking them, and making the objects that they name."""

from controlnet.config.loading import (
    ConfigError,
    canonical_target,
    compose,
    import_target,
    instantiate,
    load,
    nearest,
    precision,
    target_arguments,
)

__all__ = [
    "ConfigError",
    "canonical_target",
    "compose",
    "import_target",
    "instantiate",
    "load",
    "nearest",
    "precision",
    "target_arguments",
]
