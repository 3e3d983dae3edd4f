"""The calls that `python -m cnkernels.check` tries: for each op one per code path, with tails and odd strides."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

import cnkernels
from cnkernels.check import eager

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LEVELS = ("emulated", "default", "full")  # each tries its own cases and those of the levels before it

Shape = tuple[int, ...]
Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """One op, called forward and backward with one set of inputs.

    Attributes:
        op: name of the op.
        name: what is particular about the call.
        layout: "contiguous", "channels_last", "strided" or "misaligned": how the op's inputs lie (`arranged`).
        level: the first of `LEVELS` that tries it.
        shapes: of the inputs.
        function: the op, as a function of the inputs.
        eager: the same in PyTorch's own operations.
        head_dim: of attention.
        sums: index of an input -> M, where its gradient is one sum over M terms of either sign.
    """

    op: str
    name: str
    layout: str
    level: str
    shapes: tuple[Shape, ...]
    function: Function
    eager: Function
    head_dim: int | None = None
    sums: Mapping[int, int] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"{self.op}, {self.name}, {self.layout}"

    def inputs(self, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        """Normally distributed inputs, contiguous, the same at every call."""
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype) for s in self.shapes]


def arranged(t: Tensor, layout: str) -> Tensor:
    """The same values in another layout, in memory whose other elements hold NaN."""
    if layout == "channels_last" and t.dim() == 4:
        return t.contiguous(memory_format=torch.channels_last)
    if layout == "strided":  # a gap after each element
        return torch.stack((t, torch.full_like(t, torch.nan)), dim=-1)[..., 0]
    if layout == "misaligned":  # no 16-byte access is aligned
        buffer = torch.full((t.numel() + 9,), torch.nan, dtype=t.dtype, device=t.device)
        return buffer[1 : 1 + t.numel()].view(t.shape).copy_(t)
    return t


def cases(level: str = "default") -> Iterator[Case]:
    """The cases of a level, in the order in which they are tried."""
    tried = LEVELS[: LEVELS.index(level) + 1]
    for op in (_geglu, _group_norm_silu, _zero_conv_add, _attention):
        yield from (case for case in op() if case.level in tried)


def _layouts(level: str, layouts: tuple[str, ...], odd: bool) -> Iterator[tuple[str, str]]:
    """(layout, level): odd layouts of every shape at "full", and of the shape that is `odd` at its own level."""
    for layout in layouts:
        yield layout, level if odd or layout in ("contiguous", "channels_last") else "full"


_PIXELS = ("contiguous", "channels_last", "strided", "misaligned")
_ROWS = ("contiguous", "strided", "misaligned")


def _attention() -> Iterator[Case]:
    for name, level, batch, heads, queries, keys, dim in (
        ("tails, D = 40", "emulated", 1, 2, 65, 77, 40),
        ("several tiles, D = 40", "default", 2, 2, 300, 300, 40),
        ("several tiles, D = 64", "default", 2, 2, 257, 257, 64),
        ("several tiles, D = 80", "default", 1, 2, 129, 191, 80),
        ("several tiles, D = 128", "default", 1, 2, 129, 130, 128),
        ("several tiles, D = 160", "emulated", 1, 1, 65, 130, 160),
        ("D = 7", "emulated", 1, 1, 33, 65, 7),
        ("D = 256", "default", 1, 1, 33, 65, 256),
        ("one key", "emulated", 1, 2, 65, 1, 64),
        ("one query", "default", 2, 2, 1, 65, 64),
        ("SD 1.5, 64x64 latents", "full", 1, 2, 4096, 4096, 40),
        ("SD 1.5, 32x32 latents", "full", 1, 2, 1024, 1024, 80),
        ("SDXL, 32x32 latents", "full", 1, 2, 1024, 1024, 64),
    ):
        q, k = (batch, queries, heads, dim), (batch, keys, heads, dim)
        for layout, least in _layouts(level, _ROWS, odd=name.startswith("tails")):
            yield Case("attention", name, layout, least, (q, k, k), cnkernels.attention, eager.attention, dim)


def _group_norm_silu() -> Iterator[Case]:
    for name, level, shape, groups, activation, has_addend in (
        ("primes", "emulated", (3, 35, 7, 11), 5, "silu", True),
        ("320 channels", "default", (2, 320, 24, 24), 32, "silu", True),
        ("one channel a group", "emulated", (2, 32, 5, 13), 32, "silu", False),
        ("one pixel", "default", (2, 64, 1, 1), 32, "silu", False),
        ("no activation", "default", (2, 64, 17, 9), 32, None, False),
        ("2560 channels", "default", (2, 2560, 8, 8), 32, "silu", True),
        ("one large image", "full", (1, 320, 128, 128), 32, "silu", False),
        ("the VAE's last norm", "full", (1, 128, 256, 256), 32, "silu", False),
    ):

        def function(x, weight, bias, addend=None, groups=groups, activation=activation):
            return cnkernels.group_norm_silu(x, groups, weight, bias, 1e-5, activation, addend)

        def peer(x, weight, bias, addend=None, groups=groups, activation=activation):
            return eager.group_norm_silu(x, groups, weight, bias, 1e-5, activation, addend)

        shapes = (shape, shape[1:2], shape[1:2], *([shape[:2]] if has_addend else []))
        sums = dict.fromkeys((1, 2), shape[0] * shape[2] * shape[3])  # of the weight and bias
        for layout, least in _layouts(level, _PIXELS, odd=name == "primes"):
            yield Case("group_norm_silu", name, layout, least, shapes, function, peer, sums=sums)


def _zero_conv_add() -> Iterator[Case]:
    for name, level, shape, out_channels, per_sample in (
        ("primes", "emulated", (3, 37, 5, 11), 41, True),
        ("320 channels", "default", (2, 320, 16, 16), 320, False),
        ("one pixel", "default", (2, 64, 1, 1), 32, True),
        ("few rows, many channels", "default", (2, 1280, 8, 8), 1280, False),
        ("SD 1.5, 64x64 latents", "full", (2, 320, 64, 64), 320, False),
    ):

        def function(x, weight, bias, residual, scale=0.7):
            return cnkernels.zero_conv_add(x, weight, bias, residual, scale)

        def peer(x, weight, bias, residual, scale=0.7):
            per_sample = isinstance(scale, Tensor)
            return eager.zero_conv_add(x, weight, bias, residual, *((scale,) if per_sample else (None, scale)))

        residual = (shape[0], out_channels, *shape[2:])
        shapes = (
            shape,
            (out_channels, shape[1], 1, 1),
            (out_channels,),
            residual,
            *([shape[:1]] if per_sample else []),
        )
        sums = dict.fromkeys((1, 2), shape[0] * shape[2] * shape[3])  # of the weight and bias
        for layout, least in _layouts(level, _PIXELS, odd=name == "primes"):
            yield Case("zero_conv_add", name, layout, least, shapes, function, peer, sums=sums)


def _geglu() -> Iterator[Case]:
    for name, level, shape in (
        ("primes", "emulated", (3, 5, 74)),
        ("1280 columns", "default", (2, 64, 2560)),
        ("one row", "default", (1, 1, 2560)),
        ("5120 columns", "full", (2, 256, 10240)),
    ):
        for layout, least in _layouts(level, _ROWS, odd=name == "primes"):
            yield Case("geglu", name, layout, least, (shape,), cnkernels.geglu, eager.geglu)
