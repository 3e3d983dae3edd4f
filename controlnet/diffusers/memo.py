"""Results that are kept while the tensors they were computed from stay the same."""

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

Result = TypeVar("Result")


class Memo(Generic[Result]):
    """The last result of a function of tensors, computed again when one of them is another or was written to.

    A tensor is the same if it is the same view of the same storage and its version counter stands where it stood; a new
    view of the old memory (`chunk`, an item of a schedule) is the same tensor. Storages are held weakly: their memory
    can be freed, while no other storage can take their identity.

    Nothing is kept with gradients enabled, nor of tensors made in inference mode, which count no versions. A write
    through `tensor.data` does not count as one in PyTorch, and is not noticed here.
    """

    def __init__(self):
        self._key: Any = None
        self._result: Result | None = None
        self._held: list[StorageWeakRef] = []

    def __call__(self, tensors: Sequence[Tensor], compute: Callable[[], Result], *others: Any) -> Result:
        """compute(), or what it gave the last time, if `tensors` and `others` (hashable) are the same."""
        if torch.is_grad_enabled() or any(tensor.is_inference() for tensor in tensors):
            return compute()
        kind = tensors[0].device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        storages = [tensor.untyped_storage() for tensor in tensors]
        key = (others, autocast, *map(_stamp, tensors, storages))
        if key != self._key:
            self._key = None  # if compute() fails, nothing is kept
            self._result = compute()
            self._held = list(map(StorageWeakRef, storages))
            self._key = key
        return self._result


def _stamp(tensor: Tensor, storage: torch.UntypedStorage) -> tuple[Any, ...]:
    return storage._cdata, tensor.data_ptr(), tensor._version, tensor.shape, tensor.stride(), tensor.dtype
