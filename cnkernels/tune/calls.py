"""Calls of the ops to be measured: Stable Diffusion's, or those of the user's own step, recorded."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cnkernels import dispatch
from cnkernels.register import dtype_name


@dataclass(frozen=True)
class Spec:
    """A tensor without its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, t: Tensor) -> "Spec":
        return cls(tuple(t.shape), tuple(t.stride()), t.dtype)

    def tensor(self, device: torch.device) -> Tensor:
        """A tensor of this kind, normally distributed."""
        t = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)
        return t.normal_()


_BATCHED = {  # arguments whose first dimension is the batch
    "attention": (0, 1, 2),
    "group_norm_silu": (0, 6),
    "zero_conv_add": (0, 3, 4),
    "geglu": (0,),
}


@dataclass(frozen=True)
class Call:
    """One call of torch.ops.cnkernels.<op>.

    Attributes:
        op: name of the op.
        arguments: of the registered op, with a `Spec` in place of each tensor.
        gradients: which arguments need a gradient; none in inference.
    """

    op: str
    arguments: tuple
    gradients: tuple[bool, ...]

    @property
    def first(self) -> Spec:
        return next(a for a in self.arguments if isinstance(a, Spec))

    @property
    def head_dim(self) -> int | None:
        return self.first.shape[-1] if self.op == "attention" else None

    @property
    def size(self) -> int:
        return dispatch.size_of(self.op, *self.tensors(torch.device("meta"))[:2])

    @property
    def function(self) -> Callable[..., Tensor]:
        packet = getattr(torch.ops.cnkernels, self.op)
        returns_several = len(packet.default._schema.returns) > 1
        return (lambda *arguments: packet(*arguments)[0]) if returns_several else packet

    def of_one_sample(self) -> "Call | None":
        """The same call with the first sample of the batch alone; None where it has no more."""
        batch = self.first.shape[0]
        if batch == 1 or len(self.first.shape) < 3:
            return None
        batched = _BATCHED[self.op]
        arguments = tuple(
            replace(a, shape=(1, *a.shape[1:])) if i in batched and isinstance(a, Spec) and a.shape else a
            for i, a in enumerate(self.arguments)
        )
        return replace(self, arguments=arguments)

    def tensors(self, device: torch.device) -> list:
        """Fresh arguments, of which those that need gradients are leaves."""
        made = []
        for argument, needs in zip(self.arguments, self.gradients, strict=True):
            value = argument.tensor(device) if isinstance(argument, Spec) else argument
            made.append(value.requires_grad_() if needs else value)
        return made

    def __str__(self) -> str:
        shapes = " ".join("x".join(map(str, a.shape)) for a in self.arguments if isinstance(a, Spec))
        return f"{self.op} {shapes} {dtype_name(self.first.dtype)}"


class _Recorder(TorchDispatchMode):
    """Sees every registered op: under a dispatch mode the public functions go through PyTorch's dispatcher."""

    def __init__(self):
        super().__init__()
        self.calls: dict[Call, None] = {}
        self.differentiated: set[str] = set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        namespace, _, name = function._schema.name.partition("::")
        if namespace == "cnkernels":
            if name in dispatch.OPS:
                self._add(name, arguments)
            elif name == "zero_conv_add_group":
                for x, weight in zip(*arguments[:2], strict=True):
                    self._add("zero_conv_add", (x, weight, None, None, None, 1.0))
            elif name.endswith("_backward"):
                self.differentiated.add(name.removesuffix("_backward").removesuffix("_group"))
        return function(*arguments, **(keywords or {}))

    def _add(self, op: str, arguments: tuple) -> None:
        specs = tuple(Spec.of(a) if isinstance(a, Tensor) else a for a in arguments)
        needs = tuple(isinstance(a, Tensor) and a.requires_grad for a in arguments)
        self.calls[Call(op, specs, needs)] = None


@contextmanager
def record(training: bool = False) -> Iterator[list[Call]]:
    """Records the calls of the ops inside the block, each kind once: `with cnkernels.record() as calls: step()`.

    Args:
        training: the gradients of every call with an argument that requires one are to be measured; else only those
            of ops whose gradients the block computes.

    Yields:
        A list that holds the calls once the block is left: what `cnkernels.tune.tune` takes.
    """
    recorder, calls = _Recorder(), []
    with recorder:
        yield calls
    for call in recorder.calls:
        plain = not training and call.op not in recorder.differentiated
        calls.append(replace(call, gradients=(False,) * len(call.arguments)) if plain else call)


def of_model(name: str, dtype: torch.dtype, training: bool, batch: int = 2) -> list[Call]:
    """The calls of one step of a model's U-Net at its own size, channels_last.

    Args:
        name: one of `MODELS`.
        training: with gradients of everything that a ControlNet trains.
        batch: images; two for guidance.
    """
    context, levels = MODELS[name]
    calls = []

    def add(op: str, *arguments: object, needs: int) -> None:
        gradients = tuple(training and i < needs and isinstance(a, Spec) for i, a in enumerate(arguments))
        calls.append(Call(op, arguments, gradients))

    def image(channels: int, side: int) -> Spec:
        shape = (batch, channels, side, side)
        return Spec(shape, (channels * side * side, 1, side * channels, channels), dtype)

    for channels, side, heads in levels:
        tokens, inner = side * side, 4 * channels
        vector = Spec((channels,), (1,), dtype)
        add("group_norm_silu", image(channels, side), 32, vector, vector, 1e-5, "silu", None, needs=4)
        weight = Spec((channels, channels, 1, 1), (channels, 1, 1, 1), dtype)
        add("zero_conv_add", image(channels, side), weight, vector, image(channels, side), None, 1.0, needs=4)
        if heads:
            dim = channels // heads
            q = Spec((batch, tokens, heads, dim), (tokens * channels, channels, dim, 1), dtype)
            text = Spec((batch, context, heads, dim), (context * channels, channels, dim, 1), dtype)
            add("attention", q, q, q, dim**-0.5, needs=3)
            add("attention", q, text, text, dim**-0.5, needs=3)
            add("geglu", Spec((batch, tokens, 2 * inner), (tokens * 2 * inner, 2 * inner, 1), dtype), needs=1)
    return calls


# Tokens of a prompt; channels, side of the latent and heads (0: no transformer) of each level.
MODELS = {
    "sd15": (77, ((320, 64, 8), (640, 32, 8), (1280, 16, 8), (1280, 8, 8))),
    "sd21": (77, ((320, 96, 5), (640, 48, 10), (1280, 24, 20), (1280, 12, 20))),
    "sdxl": (77, ((320, 128, 0), (640, 64, 10), (1280, 32, 20))),
    "tiny": (7, ((32, 6, 2),)),  # for tests
}
