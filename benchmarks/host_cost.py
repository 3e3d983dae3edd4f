"""Measures the host's time of calls and steps, without a GPU: `python -m benchmarks.host_cost [--only PART ...]`.

With one image per batch a fast GPU waits for Python. Here everything up to a kernel's launch runs, and the launch is
stubbed (`benchmarks.stub_gpu`): tensors are tiny, so that arithmetic takes no time, and convolutions do nothing.

    ops      one call of each op, by backend, and of what it replaces in PyTorch, without and with gradients (forward
             and backward), in µs of CPU time and as multiples of F.silu of a tiny tensor; the cuda backend needs a C++
             compiler, which builds it without its kernels
    steps    a denoise step and a training step (forward and backward) of U-Net and ControlNet, the topology of SD 1.5
             or SDXL (--model) at a tenth of its width: our model and diffusers accelerated, beside diffusers
    kernels  Triton kernels compiled at a first step of SD 1.5 itself, at another batch after it, another resolution

Times are CPU time of one thread. Providers take turns, and a ratio is the median of the ratios of neighbouring turns.
"""

import gc
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import cnkernels
from benchmarks import jobs, stub_gpu
from cnkernels import dispatch
from cnkernels.progress import Progress, say
from controlnet.common.command import parser as command_parser
from controlnet.model.controlnet import ControlNet

DTYPE = torch.float16
CALLS = 16  # of an op in one backward pass, as there are many of each in a step
SILUS = 100
PARTS = ("ops", "steps", "kernels")
TOPOLOGIES = {"sd15": jobs.TINY, "sdxl": jobs.TINY_SDXL}  # of the steps
Call = Callable[[], Any]


def cpu_seconds(call: Call, times: int) -> float:
    """Measures the CPU seconds of this thread for one call."""
    before = time.thread_time()
    for _ in range(times):
        call()
    return (time.thread_time() - before) / times


def measure(calls: dict[str, Call], times: int, turns: int) -> dict[str, list[float]]:
    """Measures the CPU seconds of every call in every turn; the first one rotates."""
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


def op_calls(grad: bool) -> dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]]:
    """Returns op -> (our call, PyTorch's equivalent), on tensors that require gradients if `grad`."""

    def new(*shape: int) -> Tensor:
        return torch.randn(shape).to(DTYPE).requires_grad_(grad)

    q, k, v = (new(1, 16, 2, 40) for _ in range(3))  # a head dimension that every backend has
    x, residual, conv, bias = new(1, 32, 4, 4), new(1, 32, 4, 4), new(32, 32, 1, 1), new(32)
    norm, norm_bias, addend, packed = new(32), new(32), new(1, 32), new(1, 16, 64)

    def sdpa() -> Tensor:
        return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)

    def norm_silu() -> Tensor:
        return F.silu(F.group_norm(x + addend[:, :, None, None], 8, norm, norm_bias))

    def conv_add() -> Tensor:
        return residual + F.conv2d(x, conv, bias) * 0.5

    def gated() -> Tensor:
        value, gate = packed.chunk(2, -1)
        return value * F.gelu(gate)

    layers = 13
    return {
        "attention": (lambda: cnkernels.attention(q, k, v), sdpa),
        "group_norm_silu": (lambda: cnkernels.group_norm_silu(x, 8, norm, norm_bias, 1e-5, "silu", addend), norm_silu),
        "zero_conv_add": (lambda: cnkernels.zero_conv_add(x, conv, bias, residual, 0.5), conv_add),
        f"zero_conv_add_group, {layers} layers": (
            lambda: cnkernels.zero_conv_add_group(
                [x] * layers, [conv] * layers, [bias] * layers, [residual] * layers, 0.5
            ),
            lambda: [conv_add() for _ in range(layers)],
        ),
        "geglu": (lambda: cnkernels.geglu(packed), gated),
    }


def _backward(op: str, side: int) -> Call:
    """Returns a call that runs CALLS forward passes with leaves of their own and one backward pass through all."""
    calls = [op_calls(True)[op][side] for _ in range(CALLS)]
    outs = [t for call in calls for t in _as_list(call())]
    upstream = tuple(torch.ones_like(out) for out in outs)
    leaves = tuple({id(leaf): leaf for out in outs for leaf in _leaves(out)}.values())

    def run() -> None:
        outs = tuple(t for call in calls for t in _as_list(call()))
        # As torch.autograd.grad, without the checks of its arguments.
        Variable._execution_engine.run_backward(outs, upstream, False, False, leaves, False, accumulate_grad=False)

    return run


def _as_list(made: Tensor | list[Tensor]) -> list[Tensor]:
    return made if isinstance(made, list) else [made]


def _leaves(out: Tensor) -> list[Tensor]:
    found, nodes = [], [out.grad_fn]
    while nodes:
        node = nodes.pop()
        if hasattr(node, "variable"):
            found.append(node.variable)
        nodes += [parent for parent, _ in node.next_functions if parent is not None]
    return found


def ops(times: int, turns: int, backend: str) -> list[dict[str, Any]]:
    """Rows {op, backend, gradients, us, replaced_us, silu, ratio}: silu is how many calls of F.silu it costs."""
    served = [op for op in op_calls(False) if (op.split("_group,")[0], backend) in dispatch.CAPABILITIES]
    rows, progress = [], Progress(2 * len(served))
    tiny = torch.zeros(8, dtype=DTYPE)
    for grad in (False, True):
        each = CALLS if grad else 1
        for op in served:
            calls = dict(zip(("ours", "replaced"), op_calls(grad)[op], strict=True))
            if grad:
                calls = {"ours": _backward(op, 0), "replaced": _backward(op, 1)}
            calls["silu"] = lambda: [F.silu(tiny) for _ in range(SILUS)]
            progress(len(rows), op)
            with torch.set_grad_enabled(grad):
                seconds = measure(calls, max(1, times // each), turns)
            ours, replaced = ([t / each for t in seconds[name]] for name in ("ours", "replaced"))
            rows.append(
                {
                    "op": op,
                    "backend": backend,
                    "gradients": grad,
                    "us": 1e6 * statistics.median(ours),
                    "replaced_us": 1e6 * statistics.median(replaced),
                    "silu": ratio(ours, [t / SILUS for t in seconds["silu"]]),
                    "ratio": ratio(ours, replaced),
                }
            )
    return rows


def _inference(build: Callable, how: str, params: dict[str, Any]) -> Call:
    """Guidance of one image; the hint embedding is prepared where the pipeline prepares it."""
    return build(jobs.Job("denoise step", 1, 8, torch.float32), torch.device("cpu"), params, how)


def _inputs(params: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    job = jobs.Job("training step", 2, 8, torch.float32)
    return jobs.images(job, torch.device("cpu"), params["context_dim"])


def _training_ours(params: dict[str, Any]) -> Call:
    model = jobs.controlled_unet(torch.device("cpu"), params)
    x, hint, t, context = _inputs(params)
    extra, _ = jobs.added(params, len(x))
    parameters = list(model.trainable_parameters())
    return _training(lambda: model(x, t, context, hint=hint, **extra), parameters)


def _training_diffusers(accelerated: bool, params: dict[str, Any]) -> Call:
    unet, control = jobs.diffusers_networks(params, torch.device("cpu"))
    unet.requires_grad_(False)
    if accelerated:
        import controlnet

        controlnet.accelerate(unet)
        controlnet.accelerate(control)
    x, hint, t, context = _inputs(params)
    _, extra = jobs.added(params, len(x))

    def forward() -> Tensor:
        down, mid = control(x, t, context, hint, **extra, return_dict=False)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        return unet(x, t, context, **residuals, **extra, return_dict=False)[0]

    return _training(forward, [p for p in control.parameters() if p.requires_grad])


def _training(forward: Callable[[], Tensor], parameters: list[nn.Parameter]) -> Call:
    def run() -> None:
        for parameter in parameters:
            parameter.grad = None
        forward().sum().backward()

    return run


@contextmanager
def hints_given() -> Iterator[None]:
    """Skips the hint encoders of both sides inside the block: on 64 times the pixels, they are only arithmetic."""

    def embedded(network: nn.Module, hint: Tensor) -> Tensor:
        n, _, height, width = hint.shape
        return hint.new_empty(n, jobs.TINY["model_channels"], height // 8, width // 8)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(ControlNet, "encode_hint", embedded))
        if importlib.util.find_spec("diffusers") is not None:
            from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding

            stack.enter_context(mock.patch.object(ControlNetConditioningEmbedding, "forward", embedded))
        yield


def step_calls(training: bool, params: dict[str, Any] = jobs.TINY) -> dict[str, Call]:
    providers = {"ours": (jobs._denoise_ours, "eager")}
    if importlib.util.find_spec("diffusers") is not None:
        providers |= {
            "accelerated": (jobs._denoise_diffusers, "accelerate"),
            "diffusers": (jobs._denoise_diffusers, "eager"),
        }
    if not training:
        return {name: _inference(*provider, params) for name, provider in providers.items()}
    calls = {
        "ours": lambda: _training_ours(params),
        "accelerated": lambda: _training_diffusers(True, params),
        "diffusers": lambda: _training_diffusers(False, params),
    }
    return {name: calls[name]() for name in providers}


def steps(turns: int, params: dict[str, Any] = jobs.TINY) -> list[dict[str, Any]]:
    """Rows {step, provider, ms, ratio to diffusers}."""
    rows = []
    for training in (False, True):
        say(f"measuring the host's time of a {'training' if training else 'denoise'} step")
        with stub_gpu.no_arithmetic(), hints_given():
            calls = step_calls(training, params)
            seconds = measure(calls, 1, turns)
        for name, measured in seconds.items():
            row = {"step": "training" if training else "denoise", "provider": name}
            row["ms"] = 1e3 * statistics.median(measured)
            if "diffusers" in seconds:
                row["ratio"] = ratio(measured, seconds["diffusers"])
            rows.append(row)
    return rows


class _AllocateOnly(TorchDispatchMode):
    """Replaces PyTorch's operations by allocations of their outputs."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace != "aten" or torch.Tag.inplace_view in func.tags or func.is_view:
            return func(*args, **kwargs)
        if func._schema.name in stub_gpu.CONVOLUTIONS:
            return stub_gpu.CONVOLUTIONS[func._schema.name](*args)
        written = [a for a, s in zip(args, func._schema.arguments, strict=False) if s.alias_info is not None]
        if written or "out" in kwargs:
            return written[0] if written else kwargs["out"]
        made = func(
            *tree_map_only(Tensor, _on_meta, args), **{**tree_map_only(Tensor, _on_meta, kwargs), **_device(func)}
        )
        return tree_map_only(Tensor, _like, made)


def _device(func: object) -> dict[str, torch.device]:
    """Returns the device argument of operations that create tensors."""
    return {"device": torch.device("meta")} if any(a.name == "device" for a in func._schema.arguments) else {}


def _on_meta(t: Tensor) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def _like(t: Tensor) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cpu")


class FirstSteps:
    """Runs steps of our model in SD 1.5's size without arithmetic, and records the kernels that each compiles."""

    def __init__(self, training: bool, layout: torch.memory_format, compiled: list[str]):
        self.training, self.layout, self.compiled = training, layout, compiled
        model = jobs.controlled_unet(torch.device("meta"), jobs.SD15).to(DTYPE)
        model.to_empty(device="cpu").to(memory_format=layout)
        self.model = model if training else model.requires_grad_(False).eval()

    def step(self, batch: int, side: int) -> int:
        """Counts the kernels that a step compiles and no step before it has."""
        before = len(self.compiled)
        x = torch.empty(batch, 4, side, side, dtype=DTYPE).contiguous(memory_format=self.layout)
        hint = torch.empty(batch, 3, 8 * side, 8 * side, dtype=DTYPE)
        context, t = torch.empty(batch, 77, jobs.SD15["context_dim"], dtype=DTYPE), torch.zeros(batch, dtype=torch.long)
        with torch.set_grad_enabled(self.training), _AllocateOnly():
            out = self.model(x, t, context, hint=hint)
            if self.training:
                out.backward(torch.empty_like(out))
        return len(self.compiled) - before


FIRST_STEPS = {False: [(2, 64), (4, 64), (2, 80)], True: [(4, 64), (16, 64)]}  # batch, side of the latents


def kernels(arch: int) -> list[dict[str, Any]]:
    """Rows {step, kernels}: how many kernels a step compiles that no step before it has."""
    rows = []
    for layout in ("channels_last", "contiguous_format"):
        for training, sizes in FIRST_STEPS.items():
            compiled: list[str] = []
            with stub_gpu.installed(arch, compiled):
                steps = FirstSteps(training, getattr(torch, layout), compiled)
                for batch, side in sizes:
                    kind = "training" if training else "denoise"
                    say(f"counting the kernels of a {kind} step, {layout}, batch {batch}, latents {side}x{side}")
                    name = f"{kind} step, {layout.removesuffix('_format')}, batch {batch}, {8 * side}x{8 * side}"
                    rows.append({"step": name, "kernels": steps.step(batch, side)})
    return rows


def report(parts: Iterable[str], quick: bool, arch: int, model: str = "sd15") -> dict[str, list[dict[str, Any]]]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = {}
    if "kernels" in parts:
        found["kernels"] = kernels(arch)
    with stub_gpu.installed(arch):
        if "ops" in parts:
            size = (100, 5) if quick else (200, 15)  # calls a turn, turns
            with stub_gpu.no_arithmetic():
                found["ops"] = ops(*size, "triton")
                say("the cuda backend is compiled without its kernels, once")
                library = stub_gpu.without_launches()
                if library is None:
                    say("there is no C++ compiler: the cuda backend is left out")
                else:
                    with stub_gpu.cuda_installed(library):
                        found["ops"] += ops(*size, "cuda")
        if "steps" in parts:
            found["steps"] = steps(3 if quick else 15, TOPOLOGIES[model])
    return found


def show(found: dict[str, list[dict[str, Any]]]) -> None:
    for row in found.get("ops", ()):
        kind = "forward, backward" if row["gradients"] else "forward"
        print(
            f"{row['op']:34}{row['backend']:8}{kind:20}{row['us']:8.1f} us {row['silu']:6.1f} x F.silu"
            f"{row['ratio']:7.2f} of what it replaces"
        )
    for row in found.get("steps", ()):
        beside = f"{row['ratio']:7.2f} of diffusers" if "ratio" in row else ""
        print(f"{row['step'] + ' step, ' + row['provider']:54}{row['ms']:8.2f} ms{beside}")
    for row in found.get("kernels", ()):
        print(f"{row['step']:54}{row['kernels']:8d} kernels compiled")


EXAMPLES = """
python -m benchmarks.host_cost --only steps --quick
python -m benchmarks.host_cost --json host_cost.json
python -m benchmarks.host_cost --only steps --model sdxl
"""


def main(arguments: list[str] | None = None) -> None:
    parser = command_parser("benchmarks.host_cost", __doc__, EXAMPLES)
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS)
    parser.add_argument("--arch", type=int, choices=list(stub_gpu.SHARED_KIB), default=90)
    parser.add_argument("--model", choices=list(TOPOLOGIES), default="sd15", help="topology of the steps")
    parser.add_argument("--quick", action="store_true", help="a few turns, to see that it works")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file, too")
    options = parser.parse_args(arguments)
    found = report(options.only, options.quick, options.arch, options.model)
    show(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
