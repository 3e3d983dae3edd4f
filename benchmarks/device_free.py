"""Counts saved bytes, operations and FLOPs without a GPU: `python -m benchmarks.device_free [--model sdxl]`.

Saved bytes: what autograd keeps for the backward of one training step of a ControlNet (SD 1.5 at 512x512 or SDXL at
1024x1024, bfloat16, batch 1, the U-Net locked, no checkpointing), each storage once, parameters apart. Operations:
those of one forward pass of U-Net and ControlNet that do work, about the number of kernel launches; views are none.
FLOPs: of products and attention. All on fake tensors, channels_last, beside diffusers' modules of the same size if
diffusers is installed.
"""

import importlib.util
import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import jobs
from cnkernels.progress import say
from controlnet.common.command import parser as command_parser
from controlnet.model.controlled import ControlledUNet
from controlnet.model.controlnet import ControlNet
from controlnet.model.unet import UNet

DTYPE = torch.bfloat16
NO_WORK = {"empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view", "detach", "lift_fresh", "alias"}
TOKENS = 77
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, tuple[dict[str, Any], dict[str, Any]]]


@dataclass(frozen=True)
class Model:
    """A base model by our constructor's arguments, and the side of its latents."""

    name: str
    params: dict[str, Any]
    side: int


MODELS = {"sd15": Model("SD 1.5", jobs.SD15, 64), "sdxl": Model("SDXL", jobs.SDXL, 128)}


@dataclass
class Networks:
    """U-Net and ControlNet of one library. The functions take what `inputs` gives."""

    modules: list[nn.Module]
    both: Callable[..., Tensor]
    unet: Callable[..., Any]
    control: Callable[..., Any]
    model: Model = MODELS["sd15"]

    def storages(self) -> set[int]:
        """Returns the ids of the storages of all parameters and buffers."""
        tensors = [t for module in self.modules for t in (*module.parameters(), *module.buffers())]
        return {t.untyped_storage()._cdata for t in tensors}


def ours(model: Model = MODELS["sd15"], **options: Any) -> Networks:
    """With more arguments for the constructors, if any."""
    params = {**model.params, **options}
    unet, control = UNet(**params, out_channels=4), ControlNet(**params, hint_channels=3)
    controlled = ControlledUNet(unet, control)
    return Networks(
        [controlled],
        lambda x, timesteps, context, hint, extra: controlled(x, timesteps, context, hint, **extra[0]),
        lambda x, timesteps, context, hint, extra: unet(x, timesteps, context, **extra[0]),
        lambda x, timesteps, context, hint, extra: control(x, hint, timesteps, context, **extra[0]),
        model,
    )


def diffusers(model: Model = MODELS["sd15"]) -> Networks:
    unet, control = jobs.build_diffusers(model.params)
    unet.requires_grad_(False)

    def residuals(x, timesteps, context, hint, extra) -> tuple[list[Tensor], Tensor]:
        return control(x, timesteps, context, hint, return_dict=False, **extra[1])

    def both(x, timesteps, context, hint, extra) -> Tensor:
        down, mid = residuals(x, timesteps, context, hint, extra)
        added = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        return unet(x, timesteps, context, **added, **extra[1]).sample

    def alone(x, timesteps, context, hint, extra) -> Any:
        return unet(x, timesteps, context, **extra[1])

    return Networks([unet, control], both, alone, residuals, model)


def inputs(batch: int, model: Model = MODELS["sd15"]) -> Inputs:
    """x, timesteps, context, hint, and what else our networks and diffusers' take."""
    x = torch.zeros(batch, model.params["in_channels"], model.side, model.side, dtype=DTYPE)
    hint = torch.zeros(batch, 3, 8 * model.side, 8 * model.side, dtype=DTYPE)
    x, hint = (t.contiguous(memory_format=torch.channels_last) for t in (x, hint))
    context = torch.zeros(batch, TOKENS, model.params["context_dim"], dtype=DTYPE)
    return x, torch.zeros(batch, dtype=torch.int64), context, hint, jobs.added(model.params, batch, dtype=DTYPE)


def saved_bytes(networks: Networks) -> int:
    """Counts the bytes that autograd saves for the backward of one training step."""
    own, kept = networks.storages(), {}

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = networks.both(*inputs(1, networks.model)).float().square().mean()
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def does_work(func: torch._ops.OpOverload) -> bool:
    """Whether an operation is neither a view nor a mere allocation."""
    aliases = [r.alias_info for r in func._schema.returns if r.alias_info is not None]
    is_view = any(not alias.is_write for alias in aliases)
    return not is_view and func.namespace != "prim" and func._schema.name.split("::")[1] not in NO_WORK


class OperationCounter(TorchDispatchMode):
    """Counts operations that are neither views nor mere allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if does_work(func):
            self.counts[str(func)] = self.counts.get(str(func), 0) + 1
        return func(*args, **kwargs or {})


@torch.no_grad()
def operations(networks: Networks) -> dict[str, int]:
    """Counts each operation in one forward pass of both networks."""
    arguments = inputs(1, networks.model)
    with OperationCounter() as counter:
        networks.both(*arguments)
    return counter.counts


def _attention_flops(q: tuple, k: tuple, *_: Any, **__: Any) -> int:
    batch, queries, heads, width = q
    return 4 * batch * heads * queries * k[1] * width


def _attention_flops_of_pytorch(q: tuple, k: tuple, *_: Any, **__: Any) -> int:
    batch, heads, queries, width = q
    return 4 * batch * heads * queries * k[2] * width


def _product_flops(x: tuple, weight: tuple, *_: Any, **__: Any) -> int:
    samples, _, height, width = x
    return 2 * samples * height * width * weight[0] * weight[1]


def _linear_flops(x: tuple, second: tuple, third: tuple | None = None, *_: Any, **__: Any) -> int:
    """x, weight, bias; or x, residual, weight, of the variant that adds one."""
    weight = third if third is not None and len(third) == 2 else second
    return 2 * math.prod(x) * weight[0]


def _group_flops(xs: list[tuple], weights: list[tuple], *_: Any, **__: Any) -> int:
    return sum(map(_product_flops, xs, weights))


@torch.no_grad()
def flops(network: Callable[..., Any], batch: int, model: Model = MODELS["sd15"]) -> int:
    """Counts the FLOPs of products, convolutions and attention in one forward pass; a multiply-add is two."""
    mapping = {
        torch.ops.cnkernels.attention: _attention_flops,
        torch.ops.cnkernels.zero_conv_add: _product_flops,
        torch.ops.cnkernels.zero_conv_add_group: _group_flops,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops_of_pytorch,
    }
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # a CPU's linear layers
        mapping[torch.ops.mkldnn._linear_pointwise] = _linear_flops
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        network(*inputs(batch, model))
    return counter.get_total_flops()


@contextmanager
def fake_networks(build: Callable[[], Networks]) -> Iterator[Networks]:
    """Builds networks of fake tensors, which take no memory, in bfloat16 and channels_last."""
    before = torch.get_default_dtype()
    with FakeTensorMode():
        torch.set_default_dtype(DTYPE)
        try:
            networks = build()
        finally:
            torch.set_default_dtype(before)
        for module in (m for network in networks.modules for m in network.modules()):
            for name, weight in list(module.named_parameters(recurse=False)):
                if weight.dim() == 4:  # module.to(memory_format=...) does not work on fake tensors
                    kept = weight.detach().contiguous(memory_format=torch.channels_last)
                    setattr(module, name, nn.Parameter(kept, weight.requires_grad))
        yield networks


def measure(build: Callable[[Model], Networks], model: Model) -> dict[str, float]:
    say(f"counting a step of {build.__name__}")
    with fake_networks(lambda: build(model)) as networks:
        return {
            "saved for backward, MB": saved_bytes(networks) / 1e6,
            "operations of one forward": sum(operations(networks).values()),
            "TFLOP, U-Net": flops(networks.unet, 1, model) / 1e12,
            "TFLOP, ControlNet": flops(networks.control, 1, model) / 1e12,
            "TFLOP, denoise step with guidance": flops(networks.both, 2, model) / 1e12,
        }


def report(model: Model) -> dict[str, dict[str, float]]:
    """{measure: {"ours": .., "diffusers": .., "ratio": ..}}, without the last two if diffusers is absent."""
    columns = {"ours": measure(ours, model)}
    if importlib.util.find_spec("diffusers") is not None:
        columns["diffusers"] = measure(diffusers, model)
    rows = {name: {column: values[name] for column, values in columns.items()} for name in columns["ours"]}
    for row in rows.values():
        if "diffusers" in row:
            row["ratio"] = row["ours"] / row["diffusers"]
    return rows


EXAMPLES = """
python -m benchmarks.device_free --json device_free.json
python -m benchmarks.device_free --model sdxl
"""


def main(arguments: Iterable[str] | None = None) -> None:
    parser = command_parser("benchmarks.device_free", __doc__, EXAMPLES)
    parser.add_argument("--model", choices=list(MODELS), default="sd15")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file, too")
    options = parser.parse_args(arguments)
    model = MODELS[options.model]
    rows = report(model)
    print(f"{f'{model.name}, {8 * model.side}x{8 * model.side}, bfloat16':36}{'ours':>10}{'diffusers':>12}{'ratio':>8}")
    for name, row in rows.items():
        cells = (f"{row[key]:.4g}" if key in row else "absent" for key in ("ours", "diffusers", "ratio"))
        print("{:36}{:>10}{:>12}{:>8}".format(name, *cells))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
