"""Which backend serves a call: capability as data, one rule, and a way to force a choice."""

import importlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import torch

from cnkernels import configurations, extension, findings, variables
from cnkernels.findings import size_of

OPS = ("attention", "group_norm_silu", "zero_conv_add", "geglu")
BACKENDS = ("triton", "cuda", "aten", "reference")  # `auto` tries them in this order, but for what was measured
ON_CPU = ("aten", "reference")  # the same on a CPU: there the kernels of the others only run to be tested

_MODULES = {"triton": "triton_kernels", "cuda": "cuda_kernels", "aten": "aten_kernels", "reference": "reference"}


@dataclass(frozen=True)
class Capability:
    """What one backend of one op serves. `head_dims` is for attention alone; None is no limit."""

    dtypes: Collection[torch.dtype]
    compute_capability: tuple[int, int] = (0, 0)  # the least that a GPU must have
    head_dims: Collection[int] | None = None


_ALL = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
_NARROW = frozenset({torch.float16, torch.bfloat16, torch.float32})
_HALF = frozenset({torch.float16, torch.bfloat16})

CAPABILITIES = {
    ("attention", "reference"): Capability(_ALL),
    ("group_norm_silu", "reference"): Capability(_ALL),
    ("zero_conv_add", "reference"): Capability(_ALL),
    ("geglu", "reference"): Capability(_ALL),
    ("attention", "aten"): Capability(_NARROW),
    ("group_norm_silu", "aten"): Capability(_NARROW),
    ("zero_conv_add", "aten"): Capability(_NARROW),
    ("geglu", "aten"): Capability(_NARROW),
    ("attention", "triton"): Capability(_NARROW, compute_capability=(8, 0), head_dims=range(1, 257)),
    ("attention", "cuda"): Capability(_HALF, compute_capability=(8, 0), head_dims=(40, 64, 80, 128, 160)),
    ("group_norm_silu", "triton"): Capability(_NARROW, compute_capability=(8, 0)),
    ("group_norm_silu", "cuda"): Capability(_NARROW, compute_capability=(8, 0)),
    ("zero_conv_add", "cuda"): Capability(_NARROW, compute_capability=(8, 0)),
    ("zero_conv_add", "triton"): Capability(_NARROW, compute_capability=(8, 0)),
    ("geglu", "triton"): Capability(_NARROW, compute_capability=(8, 0)),
}


@dataclass
class _Choice:
    backend: str


def _initial_choice() -> str:
    name = variables.read("CNKERNELS_BACKEND") or "auto"
    if name not in (*BACKENDS, "auto"):
        raise ValueError(f"CNKERNELS_BACKEND must be one of {', '.join(BACKENDS)} or auto, got {name}")
    return name


_choice = _Choice(_initial_choice())


def current() -> str:
    """The backend in force: "auto", or the one that is forced; with the launch configuration that is tried, if any."""
    trial = configurations.state.trial
    return _choice.backend if trial is None else f"{_choice.backend} {trial}"


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Forces one backend for every op called inside the block, or gives the choice back with "auto".

    The choice is process-wide, as torch.backends' flags are: a backward pass runs on autograd's own threads and must
    see it too.

    Args:
        name: "triton", "cuda", "aten" (PyTorch's own kernels, on any device), "reference" or "auto".

    Raises:
        ValueError: `name` is none of these. A backend that cannot serve a call raises at that call, and says why.
    """
    if name not in (*BACKENDS, "auto"):
        raise ValueError(f"backend: `name` must be one of {', '.join(BACKENDS)} or auto, got {name!r}")
    before, _choice.backend = _choice.backend, name
    try:
        yield
    finally:
        _choice.backend = before


def _triton_absent(device: torch.device) -> str | None:
    try:
        import triton
    except ImportError:
        return "triton is not installed"
    if device.type == "cpu" and not triton.knobs.runtime.interpret:
        return "Triton runs on CPU tensors only through its interpreter (TRITON_INTERPRET=1)"
    return None


def _cuda_absent(device: torch.device) -> str | None:
    return extension.why_absent(device) if device.type == "cuda" else extension.why_host_absent()


def why_not(op: str, backend: str, device: torch.device, dtype: torch.dtype, head_dim: int | None = None) -> str | None:
    """Why `backend` cannot serve such a call, in words; None when it can."""
    capability = CAPABILITIES.get((op, backend))
    if capability is None:
        return f"{op} has no {backend} backend"
    if dtype not in capability.dtypes:
        return f"the {backend} backend of {op} does not serve {dtype}"
    if head_dim is not None and capability.head_dims is not None and head_dim not in capability.head_dims:
        return f"the {backend} backend of {op} does not serve head dimension {head_dim}"
    if backend in ON_CPU:  # and on every other device
        return None
    if device.type not in ("cpu", "cuda"):
        return f"the {backend} backend of {op} does not serve device {device.type}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < capability.compute_capability:
        return f"the {backend} backend of {op} needs compute capability {capability.compute_capability} or later"
    return _triton_absent(device) if backend == "triton" else _cuda_absent(device)


# Their products of float32 run on FFMA; PyTorch has 3xTF32 on the matrix units for one and SGEMM for the other.
_FLOAT32_BY_PYTORCH = ("attention", "zero_conv_add")


def _order(op: str, device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """The backends that "auto" tries where nothing was measured."""
    if device.type == "cpu":
        return ON_CPU
    return ("aten", *BACKENDS) if dtype == torch.float32 and op in _FLOAT32_BY_PYTORCH else BACKENDS


def select(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int | None = None,
    size: int | None = None,
    direction: str = "forward",
    first: str | None = None,
) -> str:
    """The name of the backend that serves such a call.

    Forced: that one, or a ValueError that says why it cannot. "auto": the one that was measured to be fastest for calls
    like it (`cnkernels.findings`), else on a CPU the first of `ON_CPU` that can, elsewhere the first of `BACKENDS`;
    attention and zero_conv_add of float32 try PyTorch first. None that a check found wrong, as long as another can.

    Args:
        size: `size_of` the call, where it is known.
        direction: "forward" or "backward".
        first: a backend that "auto" on a GPU tries before all others, in half precision.
    """
    forced = _choice.backend
    if forced != "auto":
        reason = why_not(op, forced, device, dtype, head_dim)
        if reason:
            raise ValueError(f"{op}: backend {forced!r} is forced, but {reason}")
        return forced
    order = _order(op, device, dtype)
    entry = None if size is None else findings.measured(op, device, dtype, size, head_dim, direction)
    order = order if entry is None else (entry["backend"], *order)
    if first is not None and device.type == "cuda" and dtype.itemsize == 2:
        order = (first, *order)
    serving = [name for name in order if why_not(op, name, device, dtype, head_dim) is None]
    return next((name for name in serving if not findings.wrong(op, name, device, dtype)), serving[-1])


def implementation(
    op: str,
    x: torch.Tensor,
    other: torch.Tensor | None = None,
    *,
    head_dim: int | None = None,
    direction: str = "forward",
    first: str | None = None,
) -> ModuleType:
    """The module of kernels that serves a call of `op`: it has `<op>_fwd` and `<op>_bwd`.

    Args:
        x: the first input.
        other: the second, which attention wants: k.
        head_dim: of attention.
        direction: "forward" or "backward".
        first: as for `select`.
    """
    name = select(op, x.device, x.dtype, head_dim, size_of(op, x, other), direction, first)
    return importlib.import_module(f"cnkernels.{op}.{_MODULES[name]}")
