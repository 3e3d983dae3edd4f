"""Caches of plans: the first call of a kind validates and plans, later ones look the plan up and launch.

A plan is a function with the arguments of the call. It may rely on what is in its key: shape, strides, dtype, device
and 16-byte alignment of each tensor, every option that the kernel is chosen or compiled by, and the backend in force.
It holds no tensor and validates nothing: whatever validation reads is in the key as well.
"""

import threading
from collections.abc import Callable, Hashable
from types import ModuleType
from weakref import WeakSet

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from cnkernels import configurations, findings

LIMIT = 4096  # plans of one kind; the oldest goes first

_all: "WeakSet[Plans]" = WeakSet()
_PLAIN = frozenset({Tensor, torch.nn.Parameter})
_C = torch._C
_dispatch_modes, _function_modes = _C._len_torch_dispatch_stack, _C._len_torch_function_stack
_transforms_active, _tracing_state = _C._are_functorch_transforms_active, _C._get_tracing_state
_profiler_enabled = _C._autograd._profiler_enabled


class Plans:
    """A bounded cache of plans by their keys. Reads take no lock: dictionary look-ups are atomic."""

    def __init__(self):
        self._made: dict[Hashable, Callable] = {}
        self._lock = threading.Lock()
        self.get = self._made.get
        _all.add(self)

    def add(self, key: Hashable, plan: Callable) -> Callable:
        """Keeps the plan, and returns it."""
        with self._lock:
            while len(self._made) >= LIMIT:
                del self._made[next(iter(self._made))]
            self._made[key] = plan
        return plan

    def forget(self) -> None:
        with self._lock:
            self._made.clear()

    def __len__(self) -> int:
        return len(self._made)


def forget() -> None:
    """Drops every plan. Call it when something changes that plans depend on and that is not in their keys.

    Such are the measured tables and findings that backends are chosen by (`cnkernels.findings`).
    """
    for plans in list(_all):
        plans.forget()


findings.on_change.append(forget)


def of(t: Tensor | None) -> Hashable:
    """The part of a key that stands for a tensor."""
    return t if t is None else (t.shape, t.stride(), t.dtype, t.device, t.data_ptr() & 15)


def of_results(first: Tensor, second: Tensor) -> Hashable:
    """The part of a backward's key that stands for results of the forward pass: shapes follow from its inputs."""
    return first.dtype, second.dtype, (first.data_ptr() | second.data_ptr()) & 15


def straight(*tensors: Tensor | None) -> bool:
    """Whether a call may bypass PyTorch's dispatcher, which costs more than the rest of the call.

    False where something must see the registered op, which computes the same: a compiler or exporter, a mode (fake
    tensors, a FLOP counter, a default device), a function transform, forward-mode differentiation, tracing, a profiler;
    and for a subclass of Tensor, a sparse tensor, a negated view or a tensor of zeros without memory.
    """
    if (
        is_compiling()
        or _dispatch_modes()
        or _function_modes()
        or _transforms_active()
        or _tracing_state() is not None
        or _profiler_enabled()
        or forward_ad._current_level >= 0
    ):
        return False
    for t in tensors:
        if t is not None and (
            type(t) not in _PLAIN or t.layout is not torch.strided or t.is_neg() or t._is_zerotensor()
        ):
            return False
    return True


def recorded(*tensors: Tensor | None) -> bool:
    """Whether autograd records an op on these tensors."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def of_backend(kernels: ModuleType, function: str, *arguments: object) -> Callable:
    """`function` of a backend's module, planned for arguments like these where the module has `<function>_plan`."""
    make = getattr(kernels, f"{function}_plan", None)
    if make is None:
        return getattr(kernels, function)
    with configurations.of_plan(kernels.__name__, function, arguments):
        return make(*arguments)
