"""A ControlNet's zero convolutions and their scales as one operation; hooks replace them in diffusers' forward."""

import inspect
import math
import threading
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.controlnets import controlnet
from torch import Tensor, nn

from controlnet.diffusers import checks
from controlnet.inference.graph import Recorder, StepGraph
from controlnet.model.scales import Scale, check_scale, controlled

_ARGUMENTS = tuple(inspect.signature(controlnet.ControlNetModel.forward).parameters)[1:]  # without self


class _State(threading.local):
    """State of the ControlNet whose forward runs in this thread."""

    scales: Sequence[Scale] | None = None  # of the zero convolutions, if they return their inputs until `leave`
    skip = False  # all scales are 0


_state = _State()
_SOURCES = checks.sources(nn.Conv2d, (nn.Conv2d, "_conv_forward"))


def skipping() -> bool:
    """Whether nobody will read the results of the blocks that run now."""
    return _state.skip


class ZeroConv(nn.Conv2d):
    """A zero convolution that `leave` computes, together with the others."""

    def forward(self, input: Tensor) -> Tensor:
        return input if _state.scales is not None else super().forward(input)


class _Through:
    """A scale for diffusers' forward to multiply by: x * _Through() is x."""

    def __rmul__(self, x: Tensor) -> Tensor:
        return x


def _convs(model: nn.Module) -> list[nn.Module]:
    return [*model.controlnet_down_blocks, model.controlnet_mid_block]


def enter(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    """A forward pre-hook that takes the scales from the arguments, and the zero convolutions from the forward."""
    if torch.compiler.is_compiling() or isinstance(model.__dict__.get("forward"), Stepper):
        return None
    return _begin(model, args, kwargs)


def _begin(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    _state.scales, _state.skip = None, False
    convs = _convs(model)
    if checks.transformed() or checks.replaced(_SOURCES) or model.config.global_pool_conditions:
        return None
    if not all(checks.pointwise(conv, ZeroConv) for conv in convs):
        return None
    kwargs = kwargs | dict(zip(_ARGUMENTS[4:], args[4:], strict=False))
    scale, guess = kwargs.pop("conditioning_scale", 1.0), kwargs.pop("guess_mode", False)
    x = args[0] if args else kwargs.get("sample")
    if not isinstance(scale, (int, float, Tensor)) or not isinstance(x, Tensor):
        return None
    if isinstance(scale, Tensor):
        check_scale(scale, x.shape[0])
        if scale.numel() == 1 or scale.dim() == 4 and scale.shape[1:] == (1, 1, 1):
            scale = scale.reshape(() if scale.numel() == 1 else -1)
        scale = scale.to(x.device)
    last = len(convs) - 1
    _state.scales = [scale * math.pow(10, i / last - 1) if guess else scale for i in range(len(convs))]
    trained = torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters())
    _state.skip = not isinstance(scale, Tensor) and scale == 0 and not trained
    return args[:4], {**kwargs, "conditioning_scale": _Through(), "guess_mode": False}


def leave(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """A forward hook that computes the zero convolutions which `enter` took out. Runs after errors, too."""
    if torch.compiler.is_compiling():
        return None
    scales, _state.scales, _state.skip = _state.scales, None, False
    if scales is None or output is None:
        return None
    features = [*output[0], output[1]]
    *down, middle = controlled(_convs(model), features, [None] * len(features), scales)
    if isinstance(output, tuple):
        return down, middle
    return type(output)(down_block_res_samples=down, mid_block_res_sample=middle)


class Stepper:
    """Replaces the forward of a model by CUDA graphs. A ControlNet's graphs hold its zero convolutions.

    Attributes:
        eager: calls run without a graph while it is set.
    """

    COPIED = {
        "numbers": ["timestep"],
        "scales": ["conditioning_scale"],
        "lora_scale": ["cross_attention_kwargs", "scale"],
    }
    eager = False

    def __init__(self, model: nn.Module, recorder: Recorder | None = None):
        self._model = model
        self._names = list(inspect.signature(type(model).forward).parameters)[1:]
        self.graph = StepGraph(self._whole, model, recorder=recorder, **self.COPIED)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kwargs |= dict(zip(self._names, args, strict=False))
        return self._whole(**kwargs) if self.eager else self.graph(**kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return Stepper, (self._model,)

    def _whole(self, **kwargs: Any) -> Any:
        model = self._model
        if not isinstance(model, controlnet.ControlNetModel):
            return type(model).forward(model, **kwargs)
        changed = _begin(model, (), kwargs)
        output = None
        try:
            output = type(model).forward(model, **(kwargs if changed is None else changed[1]))
        finally:
            left = leave(model, (), kwargs, output)
        return output if left is None else left
