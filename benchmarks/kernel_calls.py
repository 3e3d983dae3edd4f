"""Counts the calls of our ops in a denoise step, and what each saves: `python -m benchmarks.kernel_calls`.

Counted in one guided step of U-Net and ControlNet, SD 1.5 at 512x512 in bfloat16, on fake tensors: no device, no
arithmetic. Each call is compared with the PyTorch operations that it replaces, on tensors of the same shapes. An
operation that does work is a launch, and moves its inputs and outputs once; a view is none and moves nothing. That is
the least that memory traffic can be: PyTorch's group norm reads its input twice, as ours may. The model is in
channels_last, which PyTorch's group norm copies to the contiguous format on a GPU: one more launch.

`--write` puts the table into docs/performance.md.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import device_free
from cnkernels.check import eager
from cnkernels.progress import say
from cnkernels.zero_conv_add import group
from controlnet.common.command import parser as command_parser

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
BEGIN, END = "<!-- python -m benchmarks.kernel_calls --write -->", "<!-- end of the table -->"
BATCH = 2  # guidance: one image with and one without the prompt


@dataclass(frozen=True)
class Kind:
    """Calls of one op that do the same job in the model.

    Attributes:
        op: its name.
        place: where in the model.
        replaces: the PyTorch operations, in words.
        reason: why the kind is worth a call of ours.
    """

    op: str
    place: str
    replaces: str
    reason: str


RESIDUAL_NORM = Kind(
    "group_norm_silu", "first norm of a residual block, and the last before the output",
    "copy, group_norm, silu", "no copy; the normalised tensor is never written",
)  # fmt: skip
TIMESTEP_NORM = Kind(
    "group_norm_silu", "second norm of a residual block, with the timestep embedding",
    "add, copy, group_norm, silu", "no copy; neither the sum nor the normalised tensor is written",
)  # fmt: skip
TRANSFORMER_NORM = Kind(
    "group_norm_silu", "norm before a transformer",
    "copy, group_norm", "no copy: channels_last is read in place",
)  # fmt: skip
SELF_ATTENTION = Kind(
    "attention", "self-attention",
    "scaled_dot_product_attention",
    "saves no launch; head dimensions 40, 80 and 160 are not padded to powers of two, and backward is deterministic",
)  # fmt: skip
CROSS_ATTENTION = Kind(
    "attention", "cross-attention with 77 tokens of text",
    "scaled_dot_product_attention", "as above",
)  # fmt: skip
GEGLU = Kind(
    "geglu", "feed-forward of a transformer",
    "chunk, gelu, multiply", "the activated gate is never written",
)  # fmt: skip
EXITS = Kind(
    "zero_conv_add_group", "all 13 exits of the ControlNet",
    "conv2d, multiply, add, 13 times", "neither the products nor the scaled products are written",
)  # fmt: skip
SINGLE_EXIT = Kind(
    "zero_conv_add", "one exit of the ControlNet",
    "conv2d, multiply, add", "neither the product nor the scaled product is written",
)  # fmt: skip


def _group_norm(x, groups, weight, bias, eps, activation, addend):
    h = x if addend is None else x + addend[:, :, None, None]
    h = F.group_norm(h.contiguous(), groups, weight, bias, eps)  # on a GPU PyTorch copies channels_last inside
    return F.silu(h) if activation else h


def _attention(q, k, v, scale):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def _zero_conv_add(x, weight, bias, residual, scale, factor, out=None):
    y = F.conv2d(x, weight, bias)
    y = y if scale is None and factor == 1 else y * (factor if scale is None else scale.reshape(-1, 1, 1, 1))
    return y if residual is None else residual + y


def _zero_conv_add_group(xs, weights, biases, residuals, scales, given, factors, outs=None):
    columns = group.unpack((xs, weights, biases, residuals, scales), given)
    return [_zero_conv_add(*layer) for layer in zip(*columns, factors, strict=True)]


COMPOSITIONS: dict[str, Callable] = {
    "group_norm_silu": _group_norm,
    "attention": _attention,
    "geglu": eager.geglu,
    "zero_conv_add": _zero_conv_add,
    "zero_conv_add_group": _zero_conv_add_group,
}


def kind_of(op: str, arguments: tuple) -> Kind:
    if op == "group_norm_silu":
        *_, activation, addend = arguments
        return TRANSFORMER_NORM if activation is None else RESIDUAL_NORM if addend is None else TIMESTEP_NORM
    if op == "attention":
        q, k, *_ = arguments
        return CROSS_ATTENTION if k.shape[1] == device_free.TOKENS and k.shape != q.shape else SELF_ATTENTION
    return {"geglu": GEGLU, "zero_conv_add": SINGLE_EXIT, "zero_conv_add_group": EXITS}[op]


def _bytes(tree: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(tree) if isinstance(t, Tensor))


class _Traffic(TorchDispatchMode):
    """Counts launches, and bytes of their inputs and outputs."""

    def __init__(self):
        super().__init__()
        self.launches = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if device_free.does_work(func):
            self.launches += 1
            self.bytes += _bytes((args, kwargs)) + _bytes(made)
        return made


class _Calls(TorchDispatchMode):
    """Collects the calls of our ops with their arguments, and lets them run."""

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[str, tuple, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "cnkernels":
            self.seen.append((name.removesuffix("_out"), args, made))
        return made


@dataclass
class Row:
    calls: int = 0
    launches: int = 0  # of PyTorch
    bytes: int = 0  # moved by ours
    replaced_bytes: int = 0


@torch.no_grad()
def count() -> dict[Kind, Row]:
    """What each kind of call amounts to in one step."""
    rows: dict[Kind, Row] = {}
    model = device_free.MODELS["sd15"]
    with device_free.fake_networks(lambda: device_free.ours(model)) as networks:
        arguments = device_free.inputs(BATCH, model)
        with _Calls() as calls:
            networks.both(*arguments)
        for op, arguments, made in calls.seen:
            row = rows.setdefault(kind_of(op, arguments), Row())
            with _Traffic() as theirs:
                COMPOSITIONS[op](*arguments)
            row.calls += 1
            row.launches += theirs.launches
            row.replaced_bytes += theirs.bytes
            row.bytes += _bytes(arguments) + _bytes(made)
    return dict(sorted(rows.items(), key=lambda item: -item[1].calls))


def table(rows: dict[Kind, Row]) -> str:
    """The rows in Markdown."""
    lines = [
        "| op | where | calls a step | replaces | launches saved | MB saved | why |",
        "| --- | --- | ---: | --- | ---: | ---: | --- |",
    ]
    for kind, row in rows.items():
        saved = row.launches - row.calls, round((row.replaced_bytes - row.bytes) / 1e6)
        cells = (f"`{kind.op}`", kind.place, row.calls, kind.replaces, *saved, kind.reason)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    total = sum(row.calls for row in rows.values())
    launches = sum(row.launches for row in rows.values()) - total
    megabytes = round(sum(row.replaced_bytes - row.bytes for row in rows.values()) / 1e6)
    lines.append(f"| all | | {total} | | {launches} | {megabytes} | |")
    return "\n".join(lines)


EXAMPLES = """
python -m benchmarks.kernel_calls
python -m benchmarks.kernel_calls --write
"""


def main(arguments: Iterable[str] | None = None) -> None:
    parser = command_parser("benchmarks.kernel_calls", __doc__, EXAMPLES)
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    options = parser.parse_args(arguments)
    say("counting the operations of a denoise step")
    made = table(count())
    print(made)
    if options.write:
        text = DOCUMENT.read_text(encoding="utf-8")
        before, rest = text.split(BEGIN)
        DOCUMENT.write_text(f"{before}{BEGIN}\n{made}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
