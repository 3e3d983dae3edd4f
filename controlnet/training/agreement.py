"""Whether a step counts, agreed on by all ranks on the device and read by the host one step later."""

from typing import NamedTuple

import torch
from torch import Tensor

from controlnet.training.distributed import World


class Verdict(NamedTuple):
    """What the ranks agreed on for a step: what was not finite, and whether a rank is asked to stop."""

    loss_broke: bool
    gradient_broke: bool
    stopping: bool
    own_loss_broke: bool

    @property
    def broke(self) -> bool:
        """Whether every rank has left the update out."""
        return self.loss_broke or self.gradient_broke


class Agreement:
    """Flags of a step, the same on all ranks: one all-reduce and one copy to pinned memory, both asynchronous.

    `ask` and `read` alternate. The optimizer takes the answer of `ask` on the device, so that no rank applies an update
    that another leaves out; the host learns it from `read`, which by then has nothing to wait for.
    """

    def __init__(self, world: World):
        self.world = world
        cuda = world.device.type == "cuda"
        self._host = torch.zeros(4, pin_memory=cuda)
        self._values = self._host.numpy()  # a view: reading it calls no PyTorch operation
        self._copied = torch.cuda.Event() if cuda else None

    def ask(self, loss: Tensor, norm: Tensor, stop: bool) -> Tensor:
        """Starts the agreement on a step.

        Args:
            loss, norm: of this rank, 0-d tensors on its device; a value that is not finite breaks the step for all.
            stop: whether this rank is asked to stop.

        Returns:
            float32 0-d on the device: 1 when the update is to be left out on every rank, else 0.
        """
        broke = ~torch.isfinite(torch.stack([loss.float(), norm.float()]))
        flags = torch.cat([broke, broke.new_full((1,), stop), broke[:1]]).float()
        self.world.max_(flags[:3])
        self._host.copy_(flags, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        return flags[:2].amax()

    def read(self) -> Verdict:
        """The result of the last `ask`; on a GPU it waits until the copy has arrived."""
        if self._copied is not None:
            self._copied.synchronize()
        return Verdict(*(self._values > 0).tolist())
