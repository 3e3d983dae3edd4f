"""Checks that a module is the ordinary one that a fast forward supports. They run at every call, so must be cheap."""

import sys
import types
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models import attention_processor
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

# Processors that compute softmax(scale * q k^T) v alone: whether `scale` is the attention's attribute, not D ** -0.5.
PROCESSORS = {
    attention_processor.AttnProcessor: True,
    attention_processor.AttnProcessor2_0: False,
    attention_processor.SlicedAttnProcessor: True,
    attention_processor.XFormersAttnProcessor: True,
}
_GLOBAL_HOOKS = [
    getattr(torch_module, f"_global_{kind}_hooks") for kind in ("forward", "forward_pre", "backward", "backward_pre")
]


def sources(*owners: Any) -> list[tuple[Any, str, Any]]:
    """(owner, name, original function) of functions that others may replace for the whole process, for `replaced`.

    Args:
        owners: classes, for their forward, or (class or module, name).
    """
    pairs = [owner if isinstance(owner, tuple) else (owner, "forward") for owner in owners]
    return [(owner, name, _as_written(owner, name)) for owner, name in pairs]


def _as_written(owner: Any, name: str) -> Any:
    """The function as in the owner's source file; if it was replaced before, an object that equals no function."""
    function = getattr(owner, name)
    if not isinstance(function, types.FunctionType):  # built in
        return function
    return function if function.__code__.co_filename == sys.modules[owner.__module__].__file__ else object()


def replaced(functions: list[tuple[Any, str, Any]]) -> str | None:
    """A replaced function or hooks on all modules, in words, for which diffusers' forward must run; None without."""
    for owner, name, written in functions:
        if getattr(owner, name) is not written:
            return f"a patched {owner.__name__}.{name}"
    return "hooks on all modules" if any(_GLOBAL_HOOKS) else None


def transformed() -> bool:
    """Whether torch.jit.trace, functorch or forward-mode derivatives are active: they need PyTorch's own operations."""
    if torch.compiler.is_compiling():
        return False
    traced = torch._C._is_tracing() or torch._C._functorch.peek_interpreter_stack() is not None
    return traced or forward_ad._current_level >= 0


def bare(module: nn.Module) -> bool:
    """Whether calling the module is calling its class's forward: no hooks, no forward of its own."""
    own = module.__dict__
    hooks = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    return not hooks and "forward" not in own


def plain(module: nn.Module | None, cls: type[nn.Module]) -> bool:
    """Whether the module is of exactly this class, without hooks, and its weight an ordinary parameter."""
    if type(module) is not cls or not bare(module):
        return False
    weight = module._parameters.get("weight")
    return weight is None or (type(weight) is nn.Parameter and not weight.is_meta)


def plain_conv(conv: nn.Module | None, cls: type[nn.Module] = nn.Conv2d) -> bool:
    """Whether the convolution pads with zeros, and stride and padding are the same in both dimensions."""
    if not plain(conv, cls) or "_conv_forward" in conv.__dict__ or conv.padding_mode != "zeros":
        return False
    square = type(conv.padding) is tuple and conv.padding[0] == conv.padding[1] and conv.stride[0] == conv.stride[1]
    return square and conv.dilation == (1, 1) and conv.groups == 1


def pointwise(conv: nn.Module | None, cls: type[nn.Module] = nn.Conv2d) -> bool:
    """Whether the convolution is a linear layer of each pixel."""
    return plain_conv(conv, cls) and conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.padding == (0, 0)


def strange(block: nn.Module, children: Sequence[tuple[str, type[nn.Module]]]) -> str | None:
    """A description of the first child that is not `plain`; None if all are."""
    for name, cls in children:
        child = block._modules.get(name)
        if type(child) is not cls:
            return f"{name} of the class {type(child).__name__}"
        if not plain(child, cls):
            return f"{name}, a {cls.__name__} with hooks or weights of another kind"
    return None


def active(dropout: nn.Module) -> bool:
    """Whether the layer changes its input: dropout in training, or another module in its place."""
    return not (type(dropout) is nn.Dropout and bare(dropout) and (dropout.p == 0 or not dropout.training))


def warn(block: nn.Module, reason: str) -> None:
    """Warns that the block runs diffusers' own code, once for each reason and model."""
    shared = block.__dict__.get("_cn")
    if torch.compiler.is_compiling() or shared is None or reason in shared.warned:
        return
    shared.warned.add(reason)
    name = block.__dict__.get("_cn_name", "")
    text = f"{name}: {reason} is not served by the fast path; diffusers' own code computes such blocks"
    warnings.warn(text, stacklevel=4)
