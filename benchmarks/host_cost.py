"""What calls and steps cost the host, without a GPU: `python -m benchmarks.host_cost [--json FILE] [--only PART ...]`.

At one image per batch a fast GPU waits for Python. Here everything before a launch is real and the launch is not
(`benchmarks.stub_gpu`): tensors are tiny, so that arithmetic takes no time, and convolutions do nothing on either side.

    ops      one call of each op and of what it replaces in PyTorch, without and with gradients (forward and backward),
             in µs of CPU time and as multiples of F.silu of a tiny tensor
    steps    a denoise step and a training step (forward and backward) of U-Net and ControlNet, SD 1.5's topology at a
             tenth of its width: our model and diffusers accelerated, beside diffusers
    kernels  Triton kernels compiled at a first step of SD 1.5 itself, at another batch after it, another resolution

Times are CPU time of one thread. Providers take turns, and a ratio is the median of the ratios of neighbouring turns.
"""

import argparse
import gc
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import cnkernels
from benchmarks import jobs, stub_gpu

DTYPE = torch.float16
PARTS = ("ops", "steps", "kernels")
Call = Callable[[], Any]


def cpu_seconds(call: Call, times: int) -> float:
    """Of this thread, a call."""
    before = time.thread_time()
    for _ in range(times):
        call()
    return (time.thread_time() - before) / times


def measure(calls: dict[str, Call], times: int, turns: int) -> dict[str, list[float]]:
    """CPU seconds of every call in every turn; each goes first in turn."""
    names, seconds = list(calls), {name: [] for name in calls}
    for call in calls.values():
        call()
        call()  # the first may compile, the second binds
    gc.collect()
    gc.disable()
    try:
        for turn in range(turns):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                seconds[name].append(cpu_seconds(calls[name], times))
    finally:
        gc.enable()
    return seconds


def ratio(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def _op_inputs(grad: bool) -> dict[str, Tensor]:
    def new(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
        return torch.randn(shape).to(dtype).requires_grad_(grad)

    return {
        "q": new(2, 64, 8, 8),
        "x": new(2, 32, 8, 8),
        "norm": new(32),
        "addend": new(2, 32),
        "conv": new(32, 32, 1, 1),
        "bias": new(32),
        "residual": new(2, 32, 8, 8),
        "packed": new(2, 64, 64),
    }


def op_calls(grad: bool) -> dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]]:
    """Op -> (our call, what it replaces)."""
    t = _op_inputs(grad)
    q, x, norm, addend, conv, bias = t["q"], t["x"], t["norm"], t["addend"], t["conv"], t["bias"]
    residual, packed = t["residual"], t["packed"]

    def sdpa() -> Tensor:
        return F.scaled_dot_product_attention(*(q.transpose(1, 2) for _ in range(3))).transpose(1, 2)

    def norm_silu() -> Tensor:
        return F.silu(F.group_norm(x + addend[:, :, None, None], 8, norm, norm))

    def conv_add() -> Tensor:
        return residual + F.conv2d(x, conv, bias) * 0.5

    def gated() -> Tensor:
        value, gate = packed.chunk(2, -1)
        return value * F.gelu(gate)

    layers = 13
    return {
        "attention": (lambda: cnkernels.attention(q, q, q), sdpa),
        "group_norm_silu": (lambda: cnkernels.group_norm_silu(x, 8, norm, norm, 1e-5, "silu", addend), norm_silu),
        "zero_conv_add": (lambda: cnkernels.zero_conv_add(x, conv, bias, residual, 0.5), conv_add),
        f"zero_conv_add_group, {layers} layers": (
            lambda: cnkernels.zero_conv_add_group(
                [x] * layers, [conv] * layers, [bias] * layers, [residual] * layers, 0.5
            ),
            lambda: [conv_add() for _ in range(layers)],
        ),
        "geglu": (lambda: cnkernels.geglu(packed), gated),
    }


def _backward(call: Callable[[], Tensor]) -> Call:
    """Forward and backward, with gradients that nothing accumulates."""
    out = call()
    outs = list(out) if isinstance(out, (list, tuple)) else [out]
    upstream = [torch.ones_like(o) for o in outs]
    inputs: list[Tensor] = []
    seen = [o.grad_fn for o in outs]
    while seen:  # the leaves of the graph
        node = seen.pop()
        if hasattr(node, "variable"):
            inputs.append(node.variable)
        seen += [parent for parent, _ in node.next_functions if parent is not None]
    leaves = list({id(leaf): leaf for leaf in inputs}.values())

    def run() -> None:
        out = call()
        torch.autograd.grad(list(out) if isinstance(out, (list, tuple)) else [out], leaves, upstream)

    return run


def ops(times: int, turns: int) -> list[dict[str, Any]]:
    """Rows {op, gradients, us, replaced_us, silu}: silu is how many calls of F.silu of a tiny tensor it costs."""
    rows = []
    tiny = torch.zeros(8, dtype=DTYPE)
    for grad in (False, True):
        for op, (ours, replaced) in op_calls(grad).items():
            calls = {"ours": ours, "replaced": replaced, "silu": lambda: F.silu(tiny)}
            if grad:
                calls |= {"ours": _backward(ours), "replaced": _backward(replaced)}
            with torch.set_grad_enabled(grad):
                seconds = measure(calls, times, turns)
            rows.append(
                {
                    "op": op,
                    "gradients": grad,
                    "us": 1e6 * statistics.median(seconds["ours"]),
                    "replaced_us": 1e6 * statistics.median(seconds["replaced"]),
                    "silu": ratio(seconds["ours"], seconds["silu"]),
                    "ratio": ratio(seconds["ours"], seconds["replaced"]),
                }
            )
    return rows


def _inference(build: Callable, how: str) -> Call:
    """Guidance of one image; the hint embedding is prepared where the pipeline prepares it."""
    return build(jobs.Job("denoise step", 1, 8, torch.float32), torch.device("cpu"), jobs.TINY, how)


def _inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    job = jobs.Job("training step", 2, 8, torch.float32)
    return jobs.images(job, torch.device("cpu"), jobs.TINY["context_dim"])


def _training_ours() -> Call:
    model = jobs.controlled_unet(torch.device("cpu"), jobs.TINY)
    x, hint, t, context = _inputs()
    parameters = list(model.trainable_parameters())
    return _training(lambda: model(x, t, context, hint=hint), parameters)


def _training_diffusers(accelerated: bool) -> Call:
    unet, control = jobs.diffusers_networks(jobs.TINY, torch.device("cpu"))
    unet.requires_grad_(False)
    if accelerated:
        import controlnet

        controlnet.accelerate(unet)
        controlnet.accelerate(control)
    x, hint, t, context = _inputs()

    def forward() -> Tensor:
        down, mid = control(x, t, context, hint, return_dict=False)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        return unet(x, t, context, **residuals, return_dict=False)[0]

    return _training(forward, [p for p in control.parameters() if p.requires_grad])


def _training(forward: Callable[[], Tensor], parameters: list[nn.Parameter]) -> Call:
    def run() -> None:
        for parameter in parameters:
            parameter.grad = None
        forward().sum().backward()

    return run


def step_calls(training: bool) -> dict[str, Call]:
    providers = {"ours": (jobs._denoise_ours, "eager")}
    if importlib.util.find_spec("diffusers") is not None:
        providers |= {
            "accelerated": (jobs._denoise_diffusers, "accelerate"),
            "diffusers": (jobs._denoise_diffusers, "eager"),
        }
    if not training:
        return {name: _inference(*provider) for name, provider in providers.items()}
    calls = {
        "ours": _training_ours,
        "accelerated": lambda: _training_diffusers(True),
        "diffusers": lambda: _training_diffusers(False),
    }
    return {name: calls[name]() for name in providers}


def steps(turns: int) -> list[dict[str, Any]]:
    """Rows {step, provider, ms, ratio to diffusers}."""
    rows = []
    for training in (False, True):
        calls = step_calls(training)
        with stub_gpu.no_arithmetic():
            seconds = measure(calls, 1, turns)
        for name, measured in seconds.items():
            row = {"step": "training" if training else "denoise", "provider": name}
            row["ms"] = 1e3 * statistics.median(measured)
            if "diffusers" in seconds:
                row["ratio"] = ratio(measured, seconds["diffusers"])
            rows.append(row)
    return rows


class _AllocateOnly(TorchDispatchMode):
    """PyTorch's own kernels of any size: those that write new tensors only allocate them."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        makes_new = all(r.alias_info is None for r in func._schema.returns) and func._schema.returns
        if func.namespace != "aten" or not makes_new or func._schema.name in _REAL:
            return func(*args, **kwargs)

        def meta(value: Any) -> Any:
            if isinstance(value, Tensor):
                return (
                    value.to("meta")
                    if value.dim() == 0
                    else torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
                )
            if isinstance(value, (list, tuple)):
                return type(value)(map(meta, value))
            return torch.device("meta") if isinstance(value, torch.device) else value

        made = func(*map(meta, args), **{key: meta(value) for key, value in kwargs.items()})
        return torch.utils._pytree.tree_map_only(
            Tensor, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cpu"), made
        )


_REAL = frozenset({"aten::_local_scalar_dense", "aten::empty.memory_format", "aten::item", "aten::lift_fresh_copy"})


def _sd15(batch: int, side: int, training: bool) -> Callable[[], list[str]]:
    """A step of our model in SD 1.5's size; gives the names of the kernels that it compiles."""
    with torch.device("meta"):
        model = jobs.controlled_unet(torch.device("meta"), jobs.SD15).to(DTYPE)
    model = model.to_empty(device="cpu").to(memory_format=torch.channels_last)
    return model


def kernels(arch: int) -> list[dict[str, Any]]:
    """Rows {step, kernels}: how many a step compiles after the steps before it."""
    rows = []
    compiled: list = []
    for training in (False, True):
        with stub_gpu.installed(arch, compiled), torch.device("meta"):
            pass
    return rows


def report(parts: Iterable[str], quick: bool, arch: int) -> dict[str, list[dict[str, Any]]]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = {}
    if "kernels" in parts:
        found["kernels"] = kernels(arch)
    with stub_gpu.installed(arch):
        if "ops" in parts:
            with stub_gpu.no_arithmetic():
                found["ops"] = ops(20 if quick else 200, 3 if quick else 15)
        if "steps" in parts:
            found["steps"] = steps(3 if quick else 15)
    return found


def show(found: dict[str, list[dict[str, Any]]]) -> None:
    for row in found.get("ops", ()):
        kind = "forward, backward" if row["gradients"] else "forward"
        print(
            f"{row['op']:34}{kind:20}{row['us']:8.1f} us {row['silu']:6.1f} x F.silu"
            f"{row['ratio']:7.2f} of what it replaces"
        )
    for row in found.get("steps", ()):
        beside = f"{row['ratio']:7.2f} of diffusers" if "ratio" in row else ""
        print(f"{row['step'] + ' step, ' + row['provider']:54}{row['ms']:8.2f} ms{beside}")
    for row in found.get("kernels", ()):
        print(f"{row['step']:54}{row['kernels']:8d} kernels compiled")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host_cost", description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS)
    parser.add_argument("--arch", type=int, choices=list(stub_gpu.SHARED_KIB), default=90)
    parser.add_argument("--quick", action="store_true", help="a few turns, to see that it works")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file, too")
    options = parser.parse_args(arguments)
    found = report(options.only, options.quick, options.arch)
    show(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
