"""What a part of a model has to be for a fast forward to stand for its own: asked at every call, hence by look-ups."""

import sys
import types
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models import activations, attention, attention_processor, resnet
from diffusers.models.controlnets import controlnet
from diffusers.models.transformers import transformer_2d
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

# Processors of softmax(scale * q k^T) v and no more, to whether `scale` is the attention's own and not D ** -0.5.
PROCESSORS = {
    attention_processor.AttnProcessor: True,
    attention_processor.AttnProcessor2_0: False,
    attention_processor.SlicedAttnProcessor: True,
    attention_processor.XFormersAttnProcessor: True,
}
# What others replace for all models of a process; then theirs is what is asked for.
_PATCHABLE = (
    *((cls, "forward") for cls in (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm, nn.SiLU, nn.Dropout)),
    (nn.Conv2d, "_conv_forward"),
    (nn.Module, "__call__"),
    (resnet.ResnetBlock2D, "forward"),
    (attention.BasicTransformerBlock, "forward"),
    (attention.FeedForward, "forward"),
    (attention_processor.Attention, "forward"),
    (activations.GEGLU, "forward"),
    (transformer_2d.Transformer2DModel, "_operate_on_continuous_inputs"),
    (transformer_2d.Transformer2DModel, "_get_output_for_continuous_inputs"),
    (controlnet.ControlNetConditioningEmbedding, "forward"),
    *((processor, "__call__") for processor in PROCESSORS),
)
_SDPA = F.scaled_dot_product_attention
_GLOBAL_HOOKS = [
    getattr(torch_module, f"_global_{kind}_hooks") for kind in ("forward", "forward_pre", "backward", "backward_pre")
]


def _as_written(owner: type, name: str) -> Any:
    """The function in the owner's source; what equals nothing if it was replaced before this module was imported."""
    function = getattr(owner, name)
    source = sys.modules[owner.__module__].__file__
    return (
        function if isinstance(function, types.FunctionType) and function.__code__.co_filename == source else object()
    )


_WRITTEN = [_as_written(owner, name) for owner, name in _PATCHABLE]


def watched() -> bool:
    """Whether a tracer, functorch or forward-mode derivatives look on, which follow PyTorch's own operations alone."""
    if torch.compiler.is_compiling():
        return False
    traced = torch._C._is_tracing() or torch._C._functorch.peek_interpreter_stack() is not None
    return traced or forward_ad._current_level >= 0


def patched() -> str | None:
    """What was replaced for the whole process, in words."""
    if [getattr(owner, name) for owner, name in _PATCHABLE] != _WRITTEN:
        pairs = zip(_PATCHABLE, _WRITTEN, strict=True)
        owner, name = next(pair for pair, written in pairs if getattr(*pair) is not written)
        return f"a patched {owner.__name__}.{name}"
    if F.scaled_dot_product_attention is not _SDPA:
        return "a patched scaled_dot_product_attention"
    return "hooks on all modules" if any(_GLOBAL_HOOKS) else None


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
