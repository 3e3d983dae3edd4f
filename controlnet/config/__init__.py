"""YAML configurations: reading and checking them. `keys.py` and `stages.py` list every key."""

from controlnet.config.checks import canonical_target, check_stage, dtype, precision, stage_of
from controlnet.config.loading import canonical_node, compose, load, parse, read, save
from controlnet.config.rules import seconds
from controlnet.config.schema import ConfigError, did_you_mean, nearest, refuse_unknown, shown

__all__ = [
    "ConfigError",
    "canonical_node",
    "canonical_target",
    "check_stage",
    "compose",
    "did_you_mean",
    "dtype",
    "load",
    "nearest",
    "parse",
    "precision",
    "read",
    "refuse_unknown",
    "save",
    "seconds",
    "shown",
    "stage_of",
]
