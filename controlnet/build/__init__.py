"""From a configuration, or a trained checkpoint (`build.opening`), to the models with their weights."""

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
