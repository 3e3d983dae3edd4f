"""An ordinary training step hands all its work to the device and waits for none of it."""

import sys

import pytest
import torch
from torch.nn.utils import clip_grad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from controlnet.training.distributed import World
from controlnet.training.metrics import Reporter
from tests.controlnet import tiny_run

# What reads a tensor's values on the host.
READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "nonzero", "is_nonzero")
MAKERS = (torch.tensor, torch.as_tensor)


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
        # PyTorch's clipping says where to put norms that are there already; on a CPU this looks like any other copy.
        already_there = sys._getframe(1).f_code.co_filename == clip_grad.__file__
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


def started(folder, *overrides, world=None):
    """A run in the middle of `fit`, one step done, and its steps' waits."""
    run = tiny_run.trainer(tiny_run.configuration(folder, "trainer.max_steps=100", *overrides), world)
    run.resume()
    run._batches = run._endless_batches()
    run.reporter = Reporter(folder, run.world, run.cfg, 0, 0)
    run._advance()
    return run


def waits(run, steps):
    with Reads() as reads, Operations() as operations:
        for _ in range(steps):
            run._advance()
    return reads.found + operations.found


OPTIONS = {
    "float32": [],
    "bf16, average, clipping": ["trainer.precision=bf16", "exp_manager.ema.enable=True", "trainer.gradient_clip_val=1"],
    "fp16, micro-batches, channels_last": [
        "trainer.precision=16",
        "trainer.accumulate_grad_batches=2",
        "model.channels_last=True",
        "model.sd_locked=False",
    ],
}


@pytest.mark.parametrize("overrides", OPTIONS.values(), ids=OPTIONS)
def test_no_wait_in_an_ordinary_step(tmp_path, overrides):
    run = started(tmp_path, "trainer.log_every_n_steps=100", *overrides)
    assert waits(run, 3) == []
    assert run._settle() and run.step == 4


def test_a_logged_step_does_wait(tmp_path):
    run = started(tmp_path, "trainer.log_every_n_steps=1")
    assert {"tolist", "item"} <= set(waits(run, 1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("overrides", OPTIONS.values(), ids=OPTIONS)
def test_no_synchronisation_on_a_gpu(tmp_path, overrides):
    world = World(0, 1, 0, torch.device("cuda"))
    run = started(tmp_path, "trainer.log_every_n_steps=100", *overrides, world=world)
    run._advance()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            run._advance()
    finally:
        torch.cuda.set_sync_debug_mode("default")
