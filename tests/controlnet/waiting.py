"""Counts what the host of a training run waits for, on a CPU: reads of values, and copies that block."""

import sys

import torch
from torch.nn.utils import clip_grad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.clip import modeling_clip

from controlnet.training.metrics import Reporter

# What reads a tensor's values on the host.
READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "nonzero", "is_nonzero")
MAKERS = (torch.tensor, torch.as_tensor)
# Files that say where to put what is there already (norms of gradients, token numbers): on a CPU it looks like a copy.
SAME_DEVICE = (clip_grad.__file__, modeling_clip.__file__)


class Reads(TorchFunctionMode):
    """Calls that read values on the host, and copies to a device that are waited for."""

    def __init__(self):
        self.found = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name in READS:
            self.found.append(name)
        to_device = name == "to" and any(isinstance(each, torch.device) for each in (*args, kwargs.get("device")))
        already_there = sys._getframe(1).f_code.co_filename in SAME_DEVICE
        if to_device and not already_there and kwargs.get("non_blocking") is not True:
            self.found.append("a blocking copy by Tensor.to")
        if function in MAKERS and kwargs.get("device") is not None:
            self.found.append("a copy of Python numbers")
        return function(*args, **kwargs)


class Operations(TorchDispatchMode):
    """Operations that read a value on the host, whoever called them; sizes that depend on values among them."""

    NAMES = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::is_nonzero")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name().split(".")[0] in self.NAMES:
            self.found.append(function.name())
        return function(*args, **(kwargs or {}))


def begun(run):
    run.resume()
    run._batches = run._endless_batches()
    run.reporter = Reporter(run.folder, run.world, run.cfg, 0, 0)
    run._advance()
    return run


def waits(run, steps):
    """What the host waits for in so many steps; a step's verdict, read in the next one, is no operation."""
    with Reads() as reads, Operations() as operations:
        for _ in range(steps):
            run._advance()
    return reads.found + operations.found
