"""The model on its device: precision, memory format, and the gradients of several ranks."""

import inspect

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from controlnet.model.controlled import ControlledUNet
from controlnet.training.distributed import World

# Buffers are not synchronised: they are the constant tables of the noise schedule. PyTorch renamed the argument.
_SYNC_BUFFERS = "forward_sync_buffers"
if _SYNC_BUFFERS not in inspect.signature(DistributedDataParallel.__init__).parameters:
    _SYNC_BUFFERS = "broadcast_buffers"


def trainable_names(model: nn.Module) -> list[str]:
    """The parameters that require a gradient, in the optimizer's order."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def place(model: ControlledUNet, device: torch.device, dtype: torch.dtype, channels_last: bool) -> None:
    """Moves the model, its locked weights to `dtype`; the trained ones stay in float32."""
    model.to(device)
    for parameter in model.unet.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    if channels_last:
        model.to(memory_format=torch.channels_last)


def parallel(loss: nn.Module, world: World, gradient_as_bucket_view: bool) -> nn.Module:
    """Wraps the loss in DistributedDataParallel; with one rank returns it as it is."""
    if world.size == 1:
        return loss
    for parameter in loss.parameters():
        if parameter.requires_grad and parameter.dim() == 4 and 1 in parameter.shape:
            parameter.register_hook(_with_strides(parameter.stride()))
    return DistributedDataParallel(
        loss,
        device_ids=[world.device] if world.device.type == "cuda" else None,
        gradient_as_bucket_view=gradient_as_bucket_view,
        **{_SYNC_BUFFERS: False},
    )


def _with_strides(strides: tuple[int, ...]):
    """A hook that gives a gradient its weight's strides where only dimensions of one element differ.

    A 1x1 convolution's weight in channels_last has strides (C, 1, C, C), and its gradient, made as that of a matrix,
    (C, 1, 1, 1): the same bytes, but DDP compares strides, and copies and warns where it could share the memory.
    """

    def hook(gradient: Tensor) -> Tensor:
        pairs = zip(gradient.shape, gradient.stride(), strides, strict=True)
        if gradient.stride() != strides and all(size == 1 or own == wanted for size, own, wanted in pairs):
            return gradient.as_strided(gradient.shape, strides)
        return gradient

    return hook
