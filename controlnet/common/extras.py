"""Checks for optional packages where they are needed, with an error that says how to install them."""

import importlib.util
import os

NAMES = {"yaml": "PyYAML"}  # module -> distribution, where the names differ


def require(*modules: str, extra: str, wanted_by: str) -> None:
    """Raises ImportError, naming all that are missing, unless these modules are installed.

    Args:
        extra: of this project's pyproject.toml; installing it brings them.
        wanted_by: what needs them, the end of the message.
    """
    missing = [name for name in modules if not _installed(name)]
    if missing:
        names = [NAMES.get(name, name) for name in missing]
        verb = "is" if len(names) == 1 else "are"
        raise ImportError(
            f"{' and '.join(names)} {verb} not installed: {wanted_by}. pip install {' '.join(names)}, or, in the"
            f" repository, pip install -e '.[{extra}]'"
        )


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # blocked: sys.modules has None for it
        return False


def quiet_libraries() -> None:
    """Silences notices of diffusers and transformers. Entry points call it before these are imported.

    They read these variables when they are imported; a user who has set one keeps what was set.
    """
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
