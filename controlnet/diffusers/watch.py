"""Whether a diffusers module is still what was bound, and still plain: asked at every call, hence quick."""

import operator
from itertools import repeat

import torch
from diffusers.models import attention_processor
from torch import nn

# Processors that compute softmax(q k^T / sqrt(D)) v and no more. They differ in how, which is not theirs to say here.
_PROCESSORS = {
    attention_processor.AttnProcessor,
    attention_processor.AttnProcessor2_0,
    attention_processor.SlicedAttnProcessor,
    attention_processor.XFormersAttnProcessor,
}
_LEAVES = {nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm}  # what may have parameters
_LIBRARIES = {"torch", "diffusers", "controlnet"}
_FREEU = ("s1", "s2", "b1", "b2")  # set on the decoder's blocks
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Of the module itself: what it is when it has one of these, which config.json does not tell.
_EXTENSIONS = {
    "encoder_hid_proj": "an IP-Adapter",
    "class_embedding": "class embeddings",
    "add_embedding": "added embeddings",
    "position_net": "GLIGEN",
}


class Watch:
    """The parts of a U-Net or ControlNet of diffusers as they were, and what may have come to them since.

    A hook or another forward of the module itself is none of these: it runs around the forward that asks.
    """

    def __init__(self, root: nn.Module):
        self._root = root
        self._names, self._modules = zip(*root.named_modules(), strict=True)
        self._types = list(map(type, self._modules))
        self._tables = [table for module in self._modules for table in (module._modules, module._parameters)]
        self._sizes = list(map(len, self._tables))
        entries = [(table, name, value) for table in self._tables for name, value in table.items()]
        self._owners, self._keys, self._values = zip(*entries, strict=True)
        inner = self._modules[1:]
        self._attributes = list(map(vars, inner))
        self._hooks = [getattr(module, hooks) for module in inner for hooks in _HOOKS]
        self._attentions = [module for module in inner if isinstance(module, attention_processor.Attention)]
        self._up_blocks = list(getattr(root, "up_blocks", ()))
        self._checkpointed = [module for module in self._modules if hasattr(module, "gradient_checkpointing")]
        self._dropouts = [module for module in inner if isinstance(module, nn.Dropout) and module.p > 0]

    def unchanged(self) -> bool:
        """Whether all modules and parameters are the same objects, of the same classes, and none was added."""
        return (
            list(map(type, self._modules)) == self._types
            and list(map(len, self._tables)) == self._sizes
            and all(map(operator.is_, map(dict.get, self._owners, self._keys), self._values))
        )

    def foreign(self) -> str | None:
        """The first part that this library does not know how to compute; None when it knows all. For `unchanged` ones.

        Not quick: to be asked once.
        """
        for attribute, word in _EXTENSIONS.items():
            if getattr(self._root, attribute, None) is not None:
                return word
        for name, module in list(zip(self._names, self._modules, strict=True))[1:]:
            library = type(module).__module__.partition(".")[0]
            if library == "peft":
                return f"a LoRA (on {name})"
            weights = list(module._parameters.values())
            if library not in _LIBRARIES or (weights and type(module) not in _LEAVES):
                return f"{name} of the class {type(module).__module__}.{type(module).__qualname__}"
            for weight in weights:
                if weight is not None and (type(weight) is not nn.Parameter or weight.is_meta):
                    return f"{name} with weights that are quantized or offloaded"
        return None

    def feature(self) -> str | None:
        """What the module is asked to do besides, in a word; None for nothing."""
        if any(map(operator.contains, self._attributes, repeat("forward"))):
            return f"another forward of {self._first(lambda module: 'forward' in vars(module))}"
        if any(self._hooks):
            return f"a hook on {self._first(lambda module: any(getattr(module, hooks) for hooks in _HOOKS))}"
        for attention in self._attentions:
            if type(attention.processor) not in _PROCESSORS:
                kind = type(attention.processor).__name__
                return "an IP-Adapter" if kind.startswith("IPAdapter") else f"the attention processor {kind}"
        if any(getattr(block, name, None) is not None for block in self._up_blocks for name in _FREEU):
            return "FreeU"
        if torch.is_grad_enabled() and any(module.gradient_checkpointing for module in self._checkpointed):
            return "gradient checkpointing"
        if any(module.training for module in self._dropouts):
            return "dropout in training"
        return None

    def _first(self, condition) -> str:
        inner = zip(self._names[1:], self._modules[1:], strict=True)
        return next(name for name, module in inner if condition(module))
