"""A prediction of a few small calls, for test_aot_predict.py; run as a program it prints what is found of them.

A process of its own: under TRITON_INTERPRET=1, as the other op tests run, kernels are Python.
"""

import json
import sys
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import cnkernels
from cnkernels import aot, aot_model, aot_predict


def step():
    """One attention, one group norm, and a group of two zero convolutions, forward and backward."""
    half = {"dtype": torch.float16, "requires_grad": True}
    q = torch.empty(1, 320, 2, 40, **half)
    x = torch.empty(2, 320, 16, 16, **half).contiguous(memory_format=torch.channels_last)
    weight = torch.empty(320, 320, 1, 1, **half)
    normed = cnkernels.group_norm_silu(x, 32)
    exits = cnkernels.zero_conv_add_group([normed, normed], [weight, weight])
    (cnkernels.attention(q, q, q).sum() + sum(e.sum() for e in exits)).backward()


def main(path: str) -> None:
    with FakeTensorMode():
        calls = aot_model.calls_of(step)
    launched = {
        call.name: [(launch.kernel.__name__, launch.grid) for launch, _ in aot_model.launches_of(call, 80)]
        for call in calls
    }
    with mock.patch.object(aot_predict, "calls_of_model", lambda *asked: calls):
        aot.main(["--model", "sd15", "--gpu", "A100", "--processes", "1", "--json", path])
    of_sdxl = [case.name for op in aot.OPS for case in aot.cases(op, 90) if "SDXL" in case.name]
    print(json.dumps({"of_sdxl": of_sdxl, "calls": [[call.name, calls[call]] for call in calls], "launched": launched}))


if __name__ == "__main__":
    main(sys.argv[1])
