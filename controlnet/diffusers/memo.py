"""Results that are kept from one step of a denoising loop to the next, while what they were computed from stays."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from controlnet.inference.graph import Static, stamp

Result = TypeVar("Result")


def forget() -> None:
    """Drops what accelerated models keep between steps, everywhere.

    To be called after a write that PyTorch does not count: through `.data` into the same memory. diffusers' EMAModel
    and its fuse_lora and unfuse_lora, which write so, call it by themselves.
    """
    Static.forgotten += 1


def keeps(x: Tensor) -> bool:
    """Whether results may be kept now: not for gradients, nor for who records operations to run them again later."""
    if Static.active() is not None:
        return True
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def keep(owner: nn.Module, tensors: Sequence[Tensor], compute: Callable[[], Result]) -> Result:
    """compute(), or what it gave the last time for this owner, if `tensors` are the same and were not written to.

    A tensor is the same if it is the same view of the same storage and its version counter stands where it stood. What
    is kept is one tuple, read and written as a whole, so threads may share the owner. Storages are held weakly: their
    memory can be freed, while no other storage can take their identity.
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
