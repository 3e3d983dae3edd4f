"""The optimizer, its learning rate as a function of the step, and the running average of the weights."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
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

EIGHT_BIT = "adamw_8bit"

# The kind of decay that follows the warm-up, by the names that NeMo and others give it.
SCHEDULES = {
    "constant": "constant",
    "WarmupHoldPolicy": "constant",
    "WarmupPolicy": "constant",
    "cosine": "cosine",
    "CosineAnnealing": "cosine",
    "linear": "linear",
}


def build_optimizer(
    parameters: Iterator[nn.Parameter], config: Mapping[str, Any], ranks: int = 1
) -> torch.optim.Optimizer:
    """AdamW (or Adam) over float32 parameters, in one fused kernel; or with 8-bit state, by another package.

    Args:
        config: the `optim` section: name, lr, weight_decay, betas, eps, zero.
        ranks: of the job. With `zero` each of several keeps the state of its share of the weights alone (ZeRO-1).

    Raises:
        ConfigError: an unknown name, or `zero` with 8-bit state.
        ImportError: no package has the 8-bit optimizer.
        ValueError: a trainable weight is not float32, so that its updates would be rounded away, or there is none.
    """
    name = config["name"]
    known = [*OPTIMIZERS, EIGHT_BIT]
    if name not in known:
        raise ConfigError(f"optim.name is {name!r}; expected one of {', '.join(known)}{did_you_mean(name, known)}")
    trainable = list(parameters)
    if not trainable:
        raise ValueError("no parameter requires a gradient; expected the ControlNet's at least")
    for parameter in trainable:
        if parameter.dtype != torch.float32:
            shape = tuple(parameter.shape)
            raise ValueError(f"a trainable weight of shape {shape} is {parameter.dtype}; expected float32")
    zero = config.get("zero", False)
    settings = {key: config[key] for key in ("lr", "eps", "weight_decay")} | {"betas": tuple(config["betas"])}
    if name == EIGHT_BIT:
        if zero:
            raise ConfigError(f"optim.zero is true with optim.name={EIGHT_BIT}; expected one of the two")
        return _eight_bit()(trainable, **settings)
    if zero and ranks > 1:
        from torch.distributed.optim import ZeroRedundancyOptimizer  # its import takes seconds

        return ZeroRedundancyOptimizer(trainable, OPTIMIZERS[name], fused=True, **settings)
    return OPTIMIZERS[name](trainable, fused=True, **settings)


def _eight_bit() -> Callable[..., torch.optim.Optimizer]:
    """AdamW with 8-bit state, from bitsandbytes or torchao, whichever is installed."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        try:
            from torchao.optim import AdamW8bit
        except ImportError as error:
            raise ImportError(
                f"optim.name is {EIGHT_BIT} but neither bitsandbytes nor torchao is installed: pip install bitsandbytes"
            ) from error
    return AdamW8bit


def update(optimizer: torch.optim.Optimizer, found_inf: Tensor, broke: Callable[[], bool]) -> None:
    """One update, unless found_inf (float32 0-d, on the device) is 1; the host does not wait for it.

    An optimizer whose kernel does not read found_inf asks `broke` first, which waits.
    """
    inner = optimizer.optim if _is_shared(optimizer) else optimizer
    if getattr(inner, "_step_supports_amp_scaling", False):
        inner.found_inf = found_inf  # what GradScaler.step sets for a fused optimizer
        optimizer.step()
    elif not broke():
        optimizer.step()


def _is_shared(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is a ZeroRedundancyOptimizer, whose module is imported only where one is made."""
    return hasattr(optimizer, "consolidate_state_dict")


def gather_state(optimizer: torch.optim.Optimizer) -> None:
    """Brings the state of all ranks' shares to rank 0, before its `state_dict`. Every rank must call it."""
    if _is_shared(optimizer):
        optimizer.consolidate_state_dict(to=0)


def load_state(optimizer: torch.optim.Optimizer, state: Mapping[Any, Any]) -> None:
    """Restores the `state` of an optimizer's state_dict; learning rate and other settings stay as configured."""
    groups = torch.optim.Optimizer.state_dict(optimizer)["param_groups"]
    optimizer.load_state_dict({"state": dict(state), "param_groups": groups})
    if _is_shared(optimizer):  # it has put the step counts on the CPU
        for parameter, own in optimizer.optim.state.items():
            own["step"] = own["step"].to(parameter.device)


class LearningRate:
    """The learning rate of each optimizer step, a function of the step alone, so that resuming needs no state.

    lr(step) = lr * (step + 1) / warmup for step < warmup, then constant, or from lr down to min_lr at the last step
    along half a cosine or a line. A step is one update of the weights, whatever the number of micro-batches and ranks.

    Args:
        config: the `optim` section: lr, and sched with name, warmup_steps or warmup_ratio, min_lr, max_steps.
        max_steps: the last step when sched.max_steps is not given; None or negative for no end.

    Raises:
        ConfigError: an unknown name, or a decay without an end.
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

    Args:
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
