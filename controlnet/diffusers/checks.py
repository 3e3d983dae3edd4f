"""What a part of a model has to be for a fast forward to stand for its own: asked at every call, hence by look-ups."""

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

# Processors of softmax(scale * q k^T) v and no more, to whether `scale` is the attention's own and not D ** -0.5.
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
    """The functions that a fast forward stands for, as their source has them: others replace them for a whole process.

    Args:
        owners: classes, for their forward, or (class or module, name).
    """
    pairs = [owner if isinstance(owner, tuple) else (owner, "forward") for owner in owners]
    return [(owner, name, _as_written(owner, name)) for owner, name in pairs]


def _as_written(owner: Any, name: str) -> Any:
    """What `is` nothing if it was replaced before."""
    function = getattr(owner, name)
    if not isinstance(function, types.FunctionType):  # built in
        return function
    return function if function.__code__.co_filename == sys.modules[owner.__module__].__file__ else object()


def replaced(functions: list[tuple[Any, str, Any]]) -> str | None:
    """The first that was replaced, in words."""
    for owner, name, written in functions:
        if getattr(owner, name) is not written:
            return f"a patched {owner.__name__}.{name}"
    return "hooks on all modules" if any(_GLOBAL_HOOKS) else None


def watched() -> bool:
    """Whether a tracer, functorch or forward-mode derivatives look on, which follow PyTorch's own operations alone."""
    if torch.compiler.is_compiling():
        return False
    traced = torch._C._is_tracing() or torch._C._functorch.peek_interpreter_stack() is not None
    return traced or forward_ad._current_level >= 0


def bare(module: nn.Module) -> bool:
    """Whether calling the module is calling its class's forward: no hooks, no forward of its own."""
    own = module.__dict__
    return not (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    )


def plain(module: nn.Module | None, cls: type[nn.Module]) -> bool:
    """Whether the module is no more than torch's `cls`, on ordinary parameters."""
    if type(module) is not cls or not bare(module):
        return False
    weight = module._parameters.get("weight")
    return weight is None or (type(weight) is nn.Parameter and not weight.is_meta)


def plain_conv(conv: nn.Module | None, cls: type[nn.Module] = nn.Conv2d) -> bool:
    """Whether the convolution is one with zeros around, the same in both dimensions."""
    if not plain(conv, cls) or "_conv_forward" in conv.__dict__ or conv.padding_mode != "zeros":
        return False
    square = type(conv.padding) is tuple and conv.padding[0] == conv.padding[1] and conv.stride[0] == conv.stride[1]
    return square and conv.dilation == (1, 1) and conv.groups == 1


def pointwise(conv: nn.Module | None, cls: type[nn.Module] = nn.Conv2d) -> bool:
    return plain_conv(conv, cls) and conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.padding == (0, 0)


def strange(block: nn.Module, children: Sequence[tuple[str, type[nn.Module]]]) -> str | None:
    """The first of the block's children that is not plain, in words."""
    for name, cls in children:
        child = block._modules.get(name)
        if not plain(child, cls):
            kind = type(child).__name__
            return (
                f"{name} of the class {kind}"
                if type(child) is not cls
                else f"{name}, a {kind} with hooks or weights of another kind"
            )
    return None


def active(dropout: nn.Module) -> bool:
    return not (type(dropout) is nn.Dropout and bare(dropout) and (dropout.p == 0 or not dropout.training))


def warn(block: nn.Module, reason: str) -> None:
    """Says once for each reason and model which block runs diffusers' own code."""
    shared = block.__dict__.get("_cn")
    if torch.compiler.is_compiling() or shared is None or reason in shared.warned:
        return
    shared.warned.add(reason)
    name = block.__dict__.get("_cn_name", "")
    warnings.warn(
        f"{name}: {reason} is not served by the fast path; diffusers' own code computes such blocks", stacklevel=4
    )
