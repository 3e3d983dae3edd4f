"""Builds the models with their weights, from a configuration or, in `build.opening`, from a trained checkpoint."""

from controlnet.build.models import (
    CLASSES,
    build_conditioning,
    build_model,
    build_schedule,
    check_copy,
    check_vector,
    instantiate,
    load_weights,
    require_part,
)

__all__ = [
    "CLASSES",
    "build_conditioning",
    "build_model",
    "build_schedule",
    "check_copy",
    "check_vector",
    "instantiate",
    "load_weights",
    "require_part",
]
