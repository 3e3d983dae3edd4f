"""Breaks the aten backend of geglu on purpose, one way for each row count: imported by a worker of cnkernels.check."""

import os
import time

import torch

from cnkernels.geglu import aten_kernels

right = aten_kernels.geglu_fwd
calls = 0


def broken(projected):
    global calls
    out = right(projected)
    kind = KINDS.get((tuple(projected.shape), projected.dtype))
    if kind == "wrong value":
        return out * 1.01
    if kind == "outside":
        torch.empty(4, dtype=out.dtype).as_strided((8,), (1,)).fill_(3.0)
    if kind == "NaN left":
        out = torch.empty_like(out)
    if kind == "hang":
        time.sleep(600)
    if kind == "crash":
        os.abort()
    if kind == "other bits":
        calls += 1
        return torch.nextafter(out, torch.full_like(out, torch.inf)) if calls % 2 else out
    return out


PRIMES, WIDE, ROW = (3, 5, 74), (2, 64, 2560), (1, 1, 2560)
KINDS = {
    (PRIMES, torch.float16): "wrong value",
    (WIDE, torch.float16): "outside",
    (ROW, torch.float16): "NaN left",
    (PRIMES, torch.float32): "other bits",
    (WIDE, torch.bfloat16): "hang",
    (ROW, torch.bfloat16): "crash",
}
aten_kernels.geglu_fwd = broken
if hasattr(aten_kernels, "geglu_fwd_plan"):
    aten_kernels.geglu_fwd_plan = lambda projected: broken
