"""Checks and tunes for the calls that a model really makes, at its first call: what `tune=True` asks for."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from cnkernels import check
from cnkernels.progress import Progress
from cnkernels.tune import Call, missing, record, tune

logger = logging.getLogger(__name__)


def at_first_call(model: nn.Module, call: Callable[..., Any] | None = None) -> None:
    """Makes the next call of the model record the ops that it calls, check and measure them, and then go on.

    On a GPU backends are measured launched by rule: seconds. `python -m cnkernels.tune` measures launches as well.
    What was checked and measured on this machine before is not so again: then it costs one more forward pass. A call
    inside a compiler or a CUDA graph that is being captured is left alone, and the one after it counts as the next.

    Args:
        model: gets a forward pre-hook, which removes itself; `never` removes it before.
        call: call(model, *args, **kwargs) computes what is recorded; by default it calls the model.
    """
    never(model)
    model.register_forward_pre_hook(_FirstCall(call), with_kwargs=True, prepend=True)


def never(model: nn.Module) -> None:
    """Undoes `at_first_call` for a model that was not called yet."""
    for key, hook in list(model._forward_pre_hooks.items()):
        if isinstance(hook, _FirstCall):
            del model._forward_pre_hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)


class _FirstCall:
    def __init__(self, call: Callable[..., Any] | None):
        self.call = call

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
        capturing = any(t.is_cuda for t in tensors) and torch.cuda.is_current_stream_capturing()
        if torch.compiler.is_compiling() or capturing or not tensors:
            return
        never(model)
        with record(training=torch.is_grad_enabled()) as calls, torch.random.fork_rng():
            (self.call or nn.Module.__call__)(model, *args, **kwargs)
        for_calls(calls, tensors[0].device)


def for_calls(calls: Sequence[Call], device: torch.device) -> None:
    """Checks and measures what is missing for these calls, with one line of progress and one at the end."""
    for trial, fault in check.ensure({c.op for c in calls}, {c.first.dtype for c in calls}, device):
        logger.warning("%s is wrong on this machine and will not be used: %s", trial.label, fault)
    todo = missing(calls, device)
    progress = Progress(len(todo))
    most = 0 if device.type == "cuda" else None  # a launch has to be compiled
    tune(todo, device, most=most, progress=lambda done, count, call: progress(done, "kernels measured"))
    if todo:
        progress(len(todo), "kernels measured")
        logger.info("measured %d kinds of call for this model; %d were known", len(todo), len(calls) - len(todo))
