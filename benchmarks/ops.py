"""The benchmark cases of the ops: shapes of SD 1.5 and SDXL, minimal bytes and FLOPs, and all providers of a result."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

import cnkernels
from benchmarks import peers
from cnkernels import dispatch

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """One row per provider: an op on one shape, forward or backward.

    `inputs(device)` gives fresh tensors; those of them that `differentiable` indexes get gradients when `direction` is
    "backward". `floor_bytes` and `floor_flops` count every input read and every output written once, and the arithmetic
    that the result needs.
    """

    op: str
    shape: str
    dtype: torch.dtype
    layout: str
    direction: str
    inputs: Callable[[torch.device], list[Tensor | None]]
    providers: dict[str, Function]
    floor_bytes: int
    floor_flops: int
    differentiable: tuple[int, ...]

    @property
    def label(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.op} {self.shape} {dtype} {self.layout} {self.direction}"


def backends(op: str) -> list[str]:
    """Returns the backends of an op to time here: the compiled ones that this GPU supports, else `auto`'s choice.

    On a CPU the compiled ones would be interpreted and emulated: such times say nothing.
    """
    if torch.cuda.is_available():
        here = torch.cuda.get_device_capability()
        needs = {name: c.compute_capability for (of, name), c in dispatch.CAPABILITIES.items() if of == op}
        compiled = [name for name in dispatch.BACKENDS if (0, 0) < needs.get(name, (0, 0)) <= here]
        if compiled:
            return compiled
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return [dispatch.select(op, device, torch.float32)]


def ours(op: str, function: Function) -> dict[str, Function]:
    """The provider's name is the backend that `measure` forces around it."""
    return dict.fromkeys(backends(op), function)


def randn(device: torch.device, dtype: torch.dtype, *shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device=device) * scale).to(dtype)


def _image(device: torch.device, dtype: torch.dtype, layout: str, *shape: int) -> Tensor:
    fmt = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    return randn(device, dtype, *shape).contiguous(memory_format=fmt)


# H, Sq, Sk, D: self-attention of the levels, and cross-attention to 77 tokens. SD 1.5's four, then SDXL's two.
ATTENTION = [
    (heads, queries, keys, dim)
    for heads, queries, dim in (
        (8, 4096, 40), (8, 1024, 80), (8, 256, 160), (8, 64, 160), (10, 4096, 64), (20, 1024, 64),
    )
    for keys in (queries, 77)
]  # fmt: skip


def attention(batch: int, dtype: torch.dtype, direction: str, small: bool) -> Iterator[Case]:
    for heads, queries, keys, dim in [(2, 256, 256, 40), (2, 256, 77, 40)] if small else ATTENTION:
        q_shape, k_shape = (batch, queries, heads, dim), (batch, keys, heads, dim)

        def inputs(device, q_shape=q_shape, k_shape=k_shape):
            return [randn(device, dtype, *shape) for shape in (q_shape, k_shape, k_shape)]

        element = dtype.itemsize
        rows = batch * heads * queries
        once = element * (2 * rows * dim + 2 * batch * heads * keys * dim)  # q, out, k, v
        flops = 4 * rows * keys * dim
        backward = direction == "backward"
        yield Case(
            "attention",
            f"B{batch} H{heads} {queries}x{keys} D{dim}",
            dtype,
            "BSHD",
            direction,
            inputs,
            {**ours("attention", cnkernels.attention), **peers.attention()},
            2 * once + 4 * rows if backward else once + 4 * rows,
            flops * 5 // 2 if backward else flops,
            (0, 1, 2),
        )


# C, H = W of every GroupNorm + SiLU of the U-Net: SD 1.5's, then those that SDXL adds.
GROUP_NORM = [(320, 64), (640, 64), (960, 64), (640, 32), (960, 32), (1280, 32), (1920, 32), (1280, 16), (2560, 16),
              (1280, 8), (2560, 8), (320, 128), (640, 128), (960, 128), (1280, 64), (1920, 64), (2560, 32)]  # fmt: skip


def group_norm_silu(batch: int, dtype: torch.dtype, direction: str, small: bool) -> Iterator[Case]:
    for channels, side in [(320, 16)] if small else GROUP_NORM:
        for layout in ("channels_last", "contiguous"):
            shape = (batch, channels, side, side)

            def inputs(device, shape=shape, layout=layout):
                return [_image(device, dtype, layout, *shape), *(randn(device, dtype, shape[1]) for _ in range(2))]

            def eager(x, weight, bias):
                return F.silu(F.group_norm(x, 32, weight, bias, 1e-5))

            def fused(x, weight, bias):
                return cnkernels.group_norm_silu(x, 32, weight, bias)

            count = batch * channels * side * side
            yield Case(
                "group_norm_silu",
                f"B{batch} C{channels} {side}x{side}",
                dtype,
                layout,
                direction,
                inputs,
                {**ours("group_norm_silu", fused), **peers.compiled(eager), **peers.group_norm_silu()},
                (3 if direction == "backward" else 2) * count * dtype.itemsize,
                0,
                (0, 1, 2),
            )


# C, H = W of the ControlNet's exits: SD 1.5's, then those that SDXL adds.
ZERO_CONV = [(320, 64), (320, 32), (640, 32), (640, 16), (1280, 16), (1280, 8), (320, 128), (640, 64), (1280, 32)]


def zero_conv_add(batch: int, dtype: torch.dtype, direction: str, small: bool) -> Iterator[Case]:
    for channels, side in [(64, 16)] if small else ZERO_CONV:
        for layout in ("channels_last", "contiguous"):
            shape = (batch, channels, side, side)

            def inputs(device, shape=shape, layout=layout):
                weight = randn(device, dtype, shape[1], shape[1], 1, 1, scale=shape[1] ** -0.5)
                x, residual = (_image(device, dtype, layout, *shape) for _ in range(2))
                return [x, weight, randn(device, dtype, shape[1]), residual, torch.tensor(0.8, device=device)]

            def eager(x, weight, bias, residual, scale):
                return residual + scale.to(x.dtype) * F.conv2d(x, weight, bias)

            count, weights = batch * channels * side * side, channels * channels
            flops = 2 * count * channels
            yield Case(
                "zero_conv_add",
                f"B{batch} C{channels} {side}x{side}",
                dtype,
                layout,
                direction,
                inputs,
                {**ours("zero_conv_add", cnkernels.zero_conv_add), **peers.compiled(eager), **peers.zero_conv_add()},
                dtype.itemsize * (3 * count + (2 if direction == "backward" else 1) * weights),
                2 * flops if direction == "backward" else flops,
                (0, 1, 2, 3),
            )


# Tokens, and features after the gate: SD 1.5's, then SDXL's.
GEGLU = [(4096, 1280), (1024, 2560), (256, 5120), (64, 5120), (4096, 2560), (1024, 5120)]


def geglu(batch: int, dtype: torch.dtype, direction: str, small: bool) -> Iterator[Case]:
    for tokens, width in [(256, 160)] if small else GEGLU:

        def inputs(device, shape=(batch, tokens, 2 * width)):
            return [randn(device, dtype, *shape)]

        def eager(projected):
            value, gate = projected.chunk(2, dim=-1)
            return value * F.gelu(gate)

        count = batch * tokens * width
        yield Case(
            "geglu",
            f"B{batch} {tokens}x{2 * width}",
            dtype,
            "rows",
            direction,
            inputs,
            {**ours("geglu", cnkernels.geglu), **peers.compiled(eager), **peers.geglu()},
            (5 if direction == "backward" else 3) * count * dtype.itemsize,
            0,
            (0,),
        )


OPS = {function.__name__: function for function in (attention, group_norm_silu, zero_conv_add, geglu)}


def cases(ops: list[str], batches: list[int], dtypes: list[torch.dtype], small: bool) -> Iterator[Case]:
    """Yields every case of the given ops; `small` replaces these shapes by ones for a CPU."""
    for op in ops:
        for batch in batches:
            for dtype in dtypes:
                for direction in ("forward", "backward"):
                    yield from OPS[op](batch, dtype, direction, small)
