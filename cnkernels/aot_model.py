"""What a step of a whole model launches, found without a GPU.

The step runs on fake tensors, which shows the calls of the ops. Each kind of call then runs once through the real
launchers, on CPU tensors that stand for a GPU's, and its launches are kept instead of made.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import resources
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from cnkernels import dispatch, plans, register
from cnkernels.launch import Launch
from cnkernels.tune.calls import Spec

MODELS = {"sd15": "sd15_seg", "sd21": "sd21", "sdxl": "sdxl_seg"}  # name -> configuration that controlnet ships
_GROUP = "_group"  # in the name of an op of several layers


@dataclass(frozen=True)
class OpCall:
    """One call of a registered op, such as "attention_backward"; each tensor of its arguments is a `Spec`."""

    name: str
    arguments: tuple

    @property
    def op(self) -> str:
        return next(op for op in dispatch.OPS if self.name.startswith(op))

    @property
    def direction(self) -> str:
        return "backward" if self.name.endswith("_backward") else "forward"

    @property
    def read(self) -> Spec:
        """The tensor that it computes from: q, x or what is to be gated."""
        given = self.arguments[1:] if self.direction == "backward" else self.arguments
        return next(spec for spec in (*given, *self.arguments) if isinstance(spec, Spec))

    @property
    def shape(self) -> str:
        """As the benchmarks write it."""
        batch, *size = self.read.shape
        if self.op == "attention":
            queries, heads, dim = size
            keys = self.arguments[2 if self.direction == "backward" else 1].shape[1]
            return f"B{batch} H{heads} {queries}x{keys} D{dim}"
        if self.op == "geglu":
            return f"B{batch} {size[0]}x{size[1]}"
        return f"B{batch} C{size[0]} {size[1]}x{size[2]}"

    @property
    def layout(self) -> str:
        """As the benchmarks write it."""
        if self.op in ("attention", "geglu"):
            return {"attention": "BSHD", "geglu": "rows"}[self.op]
        return "channels_last" if self.read.stride[1] == 1 else "contiguous"

    @property
    def options(self) -> str:
        """What else tells calls of one shape apart."""
        needed = next((a for a in reversed(self.arguments) if isinstance(a, tuple)), ()) * (self.op != "geglu")
        found = [f"{sum(needed)} of {len(needed)} gradients"] if self.direction == "backward" and needed else []
        if self.op == "group_norm_silu":
            addend = self.arguments[-1 if self.direction == "forward" else -2]
            found = [
                *(["silu"] if "silu" in self.arguments else []),
                *(["addend"] if addend is not None else []),
                *found,
            ]
        return ", ".join(found)


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls: Counter[OpCall] = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        namespace, _, name = function._schema.name.partition("::")
        if namespace == "cnkernels":
            kept = tree_map(lambda a: Spec.of(a) if isinstance(a, Tensor) else a, arguments)
            for call in _layers(OpCall(name, _frozen(kept))):
                self.calls[call] += 1
        return function(*arguments, **(keywords or {}))


def _frozen(value: object) -> object:
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value


def _layers(call: OpCall) -> list[OpCall]:
    """A call for several layers as the calls that Triton's kernels make of it; any other call as it is."""
    if _GROUP not in call.name.removeprefix(call.op):
        return [call]
    lists, (given, *rest) = call.arguments[:5], call.arguments[5:]
    count = len(given) // len(lists)
    columns = [register.restore_none(tensors, given[i * count : (i + 1) * count]) for i, tensors in enumerate(lists)]
    if call.direction == "backward":
        *rest, need = rest
        rest.append([need[i : i + 4] for i in range(0, len(need), 4)])
    return [OpCall(call.name.replace(_GROUP, ""), layer) for layer in zip(*columns, *rest, strict=True)]


def calls_of(step: Callable[[], object]) -> Counter[OpCall]:
    """How often a step on fake tensors makes each call."""
    with _Recorder() as recorder:
        step()
    return recorder.calls


def calls_of_model(name: str, batch: int, dtype: torch.dtype, training: bool) -> Counter[OpCall]:
    """How often each call is made by one step of U-Net and ControlNet at the model's own size, channels_last.

    Args:
        name: one of `MODELS`.
        batch: of the networks: guidance doubles that of the images.
        dtype: of weights and activations.
        training: forward and backward of a ControlNet's training, nothing checkpointed; else a denoise step.
    """
    with _fake(dtype):
        step = _step(name, batch, training)
        with torch.set_grad_enabled(training):
            return calls_of(step)


@contextmanager
def _fake(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with FakeTensorMode():
            yield
    finally:
        torch.set_default_dtype(before)


def _step(name: str, batch: int, training: bool) -> Callable[[], None]:
    # The one place where the kernels know of a model: a step's launches are to be those of the model itself, not those
    # of a copy of its structure. What only uses the kernels never comes here.
    from omegaconf import OmegaConf

    from controlnet.model.controlled import ControlledUNet
    from controlnet.model.controlnet import ControlNet
    from controlnet.model.unet import UNet

    config = OmegaConf.load(resources.files("controlnet") / "configs" / f"{MODELS[name]}.yaml").model

    def parameters(stage):
        stage = OmegaConf.masked_copy(stage, [key for key in stage if not key.startswith(("_", "from_"))])
        found = OmegaConf.to_container(stage)
        return found.get("params", found) | {"use_checkpoint": False}

    of_unet = parameters(config.unet_config)
    side = int(str(config.data.train.augmentations.center_crop_h_w).partition(",")[0]) // 8
    model = ControlledUNet(UNet(**of_unet), ControlNet(**parameters(config.control_stage_config)))
    if not training:
        model.requires_grad_(False)
    x = torch.empty(batch, of_unet["in_channels"], side, side).contiguous(memory_format=torch.channels_last)
    hint, context = torch.empty(batch, 3, 8 * side, 8 * side), torch.empty(batch, 77, of_unet["context_dim"])
    y = torch.empty(batch, of_unet["adm_in_channels"]) if "adm_in_channels" in of_unet else None

    def step():
        prediction = model(x, torch.zeros(batch, dtype=torch.long), context, hint=hint, y=y)
        if training:
            prediction.float().square().mean().backward()

    return step


def launches_of(call: OpCall, arch: int, gradients: Sequence[bool] = ()) -> list[tuple[Launch, dict[str, object]]]:
    """The Triton launches of a call on a GPU of `arch`, such as 90, in order, each with its operands by name.

    Args:
        call: the call.
        arch: compute capability as a number.
        gradients: which arguments are to get gradients, by launches that follow those of the call itself.
    """
    made = []

    def keep(launch, *operands):
        made.append((launch, dict(zip(launch.operands, operands, strict=True))))

    def stand_in(value):
        if isinstance(value, Spec):  # nothing is read or written, so no memory is used
            return torch.empty_strided(value.shape, value.stride, dtype=value.dtype)
        return list(map(stand_in, value)) if isinstance(value, tuple) else value

    from cnkernels.attention import triton_kernels

    with ExitStack() as stack:
        for target, name, replacement in (
            (Launch, "__call__", keep),
            (dispatch, "_triton_absent", lambda device: None),
            (triton_kernels, "compute_capability", lambda tensor: arch // 10),
        ):
            stack.enter_context(mock.patch.object(target, name, replacement))
        stack.enter_context(dispatch.backend("triton"))
        plans.forget()  # of another architecture
        arguments = list(map(stand_in, call.arguments))
        for argument, needed in zip(arguments, gradients, strict=False):
            if needed:
                argument.requires_grad_()
        out = getattr(torch.ops.cnkernels, call.name)(*arguments)
        if any(gradients):
            out = out if isinstance(out, Tensor) else out[0]
            out.backward(torch.empty_like(out))
        plans.forget()  # they would launch on a CPU
    return made
