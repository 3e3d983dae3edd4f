"""Keeps results from one step of a denoising loop to the next, as long as their inputs and weights stay the same."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from controlnet.inference.graph import Static, stamp

Result = TypeVar("Result")


def forget() -> None:
    """Drops everything that accelerated models keep between steps.

    Call it after a write that PyTorch does not count: through `.data` into the same memory. diffusers' EMAModel,
    fuse_lora and unfuse_lora write so, and call it themselves from the first `accelerate` on.
    """
    Static.forgotten += 1


def keeps(x: Tensor) -> bool:
    """Whether results may be kept now: not with gradients, nor where operations are recorded to run again later."""
    if Static.active() is not None:
        return True
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def keep(owner: nn.Module, tensors: Sequence[Tensor], compute: Callable[[], Result]) -> Result:
    """Returns compute(), or the owner's previous result if `tensors` are the same and were not written to since.

    Args:
        owner: the module that the result is stored in.
        tensors: all that the result depends on: inputs and weights. A tensor is the same if it is the same view of the
            same storage with the same version counter.
        compute: computes the result.

    Notes:
        An entry is one tuple, read and replaced as a whole, so threads may share the owner. It holds storages weakly:
        their memory can be freed, but no other storage can take their identity.
    """
    static = Static.active()
    if static is not None:
        return static.keep(owner, tensors, compute)
    if not keeps(tensors[0]):
        return compute()
    kind = tensors[0].device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    key: list[Any] = [Static.forgotten, autocast, *map(stamp, tensors)]
    if None in key[2:]:
        return compute()
    kept = owner.__dict__.get("_cn_kept")
    if kept is not None and kept[0] == key:
        return kept[1]
    result = compute()
    owner.__dict__["_cn_kept"] = (key, result, [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors])
    return result
