"""What a call needs, found out once: the first call of its kind plans, and every other such call only launches.

A plan may rely on what is in its key: shape, strides, dtype, device and 16-byte alignment of each tensor, every option
that the kernel is chosen or compiled by, and the backend in force. It holds no tensor, and refuses nothing: what a call
may be refused for is in the key as well, and is checked where the plan is made.
"""

import threading
from collections.abc import Callable, Hashable
from types import ModuleType
from weakref import WeakSet

import torch
from torch import Tensor
from torch.autograd import forward_ad

LIMIT = 4096  # plans of one kind; the oldest goes first

_all: "WeakSet[Plans]" = WeakSet()
_PLAIN = frozenset({Tensor, torch.nn.Parameter})


class Plans:
    """Plans of one kind by their keys. Reading takes no lock: a dictionary is safe under threads."""

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
    """Drops every plan: to be called when anything changes that a plan rests on and that is not in its key.

    Such are the tables of `cnkernels.tuning` and the rules that configurations come from.
    """
    for plans in list(_all):
        plans.forget()


def of(t: Tensor | None) -> Hashable:
    """What a plan may rely on of a tensor."""
    return t if t is None else (t.shape, t.stride(), t.dtype, t.device, t.data_ptr() & 15)


def straight(*tensors: Tensor | None) -> bool:
    """Whether a call may go straight to its plan, past PyTorch's dispatcher, which costs more than the rest of it.

    Not where something looks on that must see the registered op, which computes the same: a compiler or exporter, a
    mode (fake tensors, a FLOP counter, a default device), a function transform, forward-mode differentiation, tracing,
    a profiler; nor for a subclass of Tensor, or a tensor that is no plain array of its elements.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
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
    """What runs `function` of a backend's module on such arguments: its plan where it makes one, else itself."""
    make = getattr(kernels, f"{function}_plan", None)
    return getattr(kernels, function) if make is None else make(*arguments)
