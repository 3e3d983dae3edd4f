"""Checks and tunes for the calls that a model really makes, at its first call: what `tune=True` asks for."""

import logging
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from cnkernels import check
from cnkernels.tune import missing, record, tune

logger = logging.getLogger(__name__)


def at_first_call(model: nn.Module, call: Callable[..., Any] | None = None) -> None:
    """Makes the next call of the model record the ops that it calls, check and measure them, and then go on.

    What was checked and measured on this machine before is not so again: then the call costs one more forward pass. A
    call inside a compiler or a CUDA graph that is being captured is left alone, and the one after it is the first.

    Args:
        model: gets a hook, which removes itself.
        call: computes one step with the hook's (args, kwargs); by default the model's forward.
    """

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
        capturing = any(t.is_cuda for t in tensors) and torch.cuda.is_current_stream_capturing()
        if torch.compiler.is_compiling() or capturing or not tensors:
            return
        handle.remove()
        training = torch.is_grad_enabled()
        with record(training) as calls, torch.random.fork_rng():
            (call or module.forward)(*args, **kwargs)
        for_calls(calls, tensors[0].device)

    handle = model.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)


def for_calls(calls: list, device: torch.device) -> None:
    """Checks and measures what is missing for these calls; one line of progress, and one at the end."""
    for trial, fault in check.ensure({c.op for c in calls}, {c.first.dtype for c in calls}, device):
        logger.warning("%s is wrong on this machine and will not be used: %s", trial.label, fault)
    todo = missing(calls, device)
    tune(todo, device, progress=_progress)
    if todo:
        logger.info("measured %d kinds of call for this model; %d were known", len(todo), len(calls) - len(todo))


def _progress(done: int, count: int, call: object) -> None:
    if sys.stderr.isatty():
        end = "\n" if done + 1 == count else ""
        print(f"\r\033[Kmeasuring kernels {done + 1}/{count}", end=end, file=sys.stderr, flush=True)
