"""The optimizer, its learning rate as a function of the step, and the running average of the weights."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from controlnet.checkpoints.trained import trainable_tensors
from controlnet.config import ConfigError, did_you_mean

OPTIMIZERS = {
    "fused_adam": torch.optim.AdamW,
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
}

# The kind of decay that follows the warm-up, by the names that NeMo and others give it.
SCHEDULES = {
    "constant": "constant",
    "WarmupHoldPolicy": "constant",
    "WarmupPolicy": "constant",
    "cosine": "cosine",
    "CosineAnnealing": "cosine",
    "linear": "linear",
}


def build_optimizer(parameters: Iterator[nn.Parameter], config: Mapping[str, Any]) -> torch.optim.Optimizer:
    """AdamW (or Adam) over float32 parameters, in one fused kernel.

    Arguments:
        config: the `optim` section: name, lr, weight_decay, betas, eps.
    Raises ConfigError for an unknown name; ValueError for a trainable weight that is not float32, whose updates would
        be rounded away, or when there is nothing to train.
    """
    name = config["name"]
    if name not in OPTIMIZERS:
        raise ConfigError(
            f"optim.name is {name!r}; expected one of {', '.join(OPTIMIZERS)}{did_you_mean(name, OPTIMIZERS)}"
        )
    trainable = list(parameters)
    if not trainable:
        raise ValueError("no parameter requires a gradient; expected the ControlNet's at least")
    for parameter in trainable:
        if parameter.dtype != torch.float32:
            shape = tuple(parameter.shape)
            raise ValueError(f"a trainable weight of shape {shape} is {parameter.dtype}; expected float32")
    return OPTIMIZERS[name](
        trainable,
        lr=config["lr"],
        betas=tuple(config["betas"]),
        eps=config["eps"],
        weight_decay=config["weight_decay"],
        fused=True,
    )


class LearningRate:
    """The learning rate of each optimizer step, a function of the step alone, so that resuming needs no state.

    lr(step) = lr * (step + 1) / warmup for step < warmup, then constant, or from lr down to min_lr at the last step
    along half a cosine or a line. A step is one update of the weights, whatever the number of micro-batches and ranks.

    Arguments:
        config: the `optim` section: lr, and sched with name, warmup_steps or warmup_ratio, min_lr, max_steps.
        max_steps: the last step when sched.max_steps is not given; None or negative for no end.
    Raises ConfigError for an unknown name, or a decay without an end.
    """

    def __init__(self, config: Mapping[str, Any], max_steps: int | None):
        schedule = config["sched"]
        name = schedule["name"]
        if name not in SCHEDULES:
            raise ConfigError(
                f"optim.sched.name is {name!r}; expected one of {', '.join(SCHEDULES)}{did_you_mean(name, SCHEDULES)}"
            )
        self.kind = SCHEDULES[name]
        self.lr, self.min_lr = float(config["lr"]), float(schedule["min_lr"] or 0.0)
        end = schedule["max_steps"] or max_steps
        self.end = end if end is not None and end > 0 else None
        ratio = schedule["warmup_ratio"]
        if (self.kind != "constant" or ratio is not None) and self.end is None:
            raise ConfigError(f"optim.sched.name {name} needs an end; set optim.sched.max_steps or trainer.max_steps")
        self.warmup = schedule["warmup_steps"] if ratio is None else round(ratio * self.end)

    def __call__(self, step: int) -> float:
        """The rate of the update that follows `step` finished ones."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.kind == "constant":
            return self.lr
        done = min(1.0, (step - self.warmup) / max(1, self.end - self.warmup))
        left = 1 - done if self.kind == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return self.min_lr + (self.lr - self.min_lr) * left


class ExponentialAverage:
    """An exponential moving average of the trainable weights, float32, on their device.

    average += (1 - d) (weight - average),  d = min(decay, (1 + n) / (10 + n)) at the n-th update, so that the first
    weights fade quickly.

    Arguments:
        model: its parameters that require a gradient are averaged, under their names.
        decay: in [0, 1).
        every: update once in so many steps.
    """

    def __init__(self, model: nn.Module, decay: float, every: int = 1):
        if not 0 <= decay < 1:
            raise ConfigError(f"exp_manager.ema.decay is {decay}; expected 0 <= decay < 1")
        if every < 1:
            raise ConfigError(f"exp_manager.ema.every_n_steps is {every}; expected 1 or more")
        self.decay, self.every, self.updates = decay, every, 0
        self._weights = trainable_tensors(model)
        self.averages: dict[str, Tensor] = {name: tensor.clone() for name, tensor in self._weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """To be called after update number `step` (1, 2, ...) of the weights."""
        if step % self.every:
            return
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.averages.values()), list(self._weights.values()), 1 - decay)

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within it the model holds the averages; afterwards its own weights again, bit for bit."""
        own = {name: tensor.clone() for name, tensor in self._weights.items()}
        self._copy(self.averages)
        try:
            yield
        finally:
            self._copy(own)

    @torch.no_grad()
    def _copy(self, source: Mapping[str, Tensor]) -> None:
        for name, parameter in self._weights.items():
            parameter.copy_(source[name])

    def load(self, averages: Mapping[str, Tensor], updates: int) -> None:
        """Takes up a saved average. Raises ValueError when the names differ from the trainable weights'."""
        if averages.keys() != self.averages.keys():
            differing = sorted(averages.keys() ^ self.averages.keys())
            raise ValueError(
                f"the saved average and the trainable weights differ in {len(differing)} names, {differing[0]} first"
            )
        for name, average in self.averages.items():
            average.copy_(averages[name])
        self.updates = updates
