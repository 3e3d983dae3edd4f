"""One denoise step of diffusers' modules and of the same modules after `controlnet.accelerate`, in one run.

    python -m benchmarks.drop_in [--dtype fp32 bf16] [--threads N] [--repeats K] [--width small|sd15]
                                 [--layout contiguous|channels_last] [--budget SECONDS] [--output FILE]

A step is what diffusers' ControlNet pipeline does in its loop: a ControlNet and a U-Net on a batch of 2 (guidance),
then the guided noise. Latents and timestep change from step to step, the prompt's states and the hint (512x512 at SD
1.5's size) do not. Both sides share one set of random weights, of the layout given, and take turns; each goes first in
turn. The ratio is that of the times of neighbouring turns: its median, 20th and 80th percentile. Memory: what the
process holds more after the first steps of the accelerated modules than after those of diffusers' modules (with
contiguous weights these are the convolutions' in channels_last, too, since diffusers' side keeps its own); on a GPU
also the peak of each step.

Progress goes to standard error, one line for each finished piece. The file is rewritten after every turn; a run that is
interrupted, or that has used up its budget, reports the turns that it has.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import jobs, machine
from benchmarks.budget import Budget, OverBudget
from cnkernels import timing
from controlnet.common.command import parser as command_parser

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WIDTHS = {"sd15": (jobs.SD15, 64), "small": (jobs.TINY, 32)}  # the model's parameters, side of the latents
BATCH, STEPS = 2, 20
Step = Callable[[int], Tensor]


def pair(
    params: dict[str, Any], device: torch.device, dtype: torch.dtype, layout: torch.memory_format
) -> tuple[nn.Module, nn.Module]:
    """Makes diffusers' U-Net and ControlNet with random weights, in the zero convolutions, too."""
    torch.manual_seed(0)
    unet, control = (m.requires_grad_(False).eval() for m in jobs.diffusers_networks(params, device))
    for layer in (*control.controlnet_down_blocks, control.controlnet_mid_block):
        nn.init.normal_(layer.weight, std=0.1 * layer.weight.shape[1] ** -0.5)
    nn.init.normal_(control.controlnet_cond_embedding.conv_out.weight, std=0.02)
    return unet.to(dtype, memory_format=layout), control.to(dtype, memory_format=layout)


def twin(module: nn.Module) -> nn.Module:
    """Another module object over the same memory; its parameters are its own, and may be given another layout."""
    with torch.device("meta"):
        other = type(module).from_config(module.config)
    other.load_state_dict(module.state_dict(), assign=True)
    return other.requires_grad_(False).eval()


def denoise(unet: nn.Module, control: nn.Module, latents: list[Tensor], context: Tensor, hint: Tensor) -> Step:
    """Step i of the loop, called as diffusers' pipeline calls its modules."""
    schedule = torch.linspace(981, 1, STEPS, device=hint.device).long()

    @torch.no_grad()
    def step(i: int) -> Tensor:
        x, t = torch.cat([latents[i % STEPS]] * 2), schedule[i % STEPS]
        down, mid = control(
            x,
            t,
            encoder_hidden_states=context,
            controlnet_cond=hint,
            conditioning_scale=1.0,
            guess_mode=False,
            return_dict=False,
        )
        noise = unet(
            x,
            t,
            encoder_hidden_states=context,
            down_block_additional_residuals=down,
            mid_block_additional_residual=mid,
            return_dict=False,
        )[0]
        uncond, cond = noise.chunk(2)
        return uncond + 7.5 * (cond - uncond)

    return step


def seconds(step: Step, i: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    step(i)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def resident_bytes() -> int:
    """Of this process, as Linux counts them."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class Comparison:
    """Of one dtype; `run` may be cut short, and `row` reports what it has got."""

    def __init__(self, width: str, dtype: torch.dtype, layout: torch.memory_format, device: torch.device):
        self.params, self.side = WIDTHS[width]
        self.dtype, self.layout, self.device = dtype, layout, device
        self.name = next(name for name, known in DTYPES.items() if known == dtype)
        self.taken: dict[str, list[float]] = {"diffusers": [], "accelerated": []}
        self.known: dict[str, Any] = {}

    def run(self, repeats: int, budget: Budget, finished: Callable[[], None]) -> None:
        """Builds both sides, takes their first steps, then `repeats` turns of each; `finished` is called after each.

        Raises:
            OverBudget: the budget is used up; the turns before it count.
        """
        with budget.provider():
            slow, fast = self._prepare()
        for turn in range(repeats):
            begin = time.monotonic()
            order = [("diffusers", slow), ("accelerated", fast)]
            with budget.provider():
                seconds_of = {
                    name: seconds(step, turn, self.device) for name, step in (order if turn % 2 == 0 else order[::-1])
                }
            for name, taken in seconds_of.items():
                self.taken[name].append(taken)
            finished()
            left = (repeats - turn - 1) * (time.monotonic() - begin)
            ratio = seconds_of["accelerated"] / seconds_of["diffusers"]
            self._say(f"turn {turn + 1} of {repeats}: {ratio:.3f} of diffusers' time; about {left:.0f} s left")

    def _prepare(self) -> tuple[Step, Step]:
        import controlnet

        self._say("building the models")
        unet, control = pair(self.params, self.device, self.dtype, self.layout)
        theirs, ours = (unet, control), (twin(unet), twin(control))
        options = {"device": self.device, "dtype": self.dtype}
        latents = [torch.randn(1, 4, self.side, self.side, **options) for _ in range(STEPS)]
        context = torch.randn(BATCH, 77, self.params["context_dim"], **options)
        picture = torch.rand(1, 3, 8 * self.side, 8 * self.side, **options)
        hint = picture.repeat(BATCH, 1, 1, 1)  # one picture, for both halves

        slow = denoise(*theirs, latents, context, hint)
        expected = [slow(i) for i in range(2)]
        self._say("first steps of diffusers' modules")
        before = resident_bytes()
        for module in ours:
            controlnet.accelerate(module)
        fast = denoise(*ours, latents, context, hint)
        actual = [fast(i) for i in range(2)]
        memory: dict[str, int | None] = {"added_resident": resident_bytes() - before}
        self._say("first steps of the accelerated modules")
        for name, step in (("diffusers", slow), ("accelerated", fast)):
            memory[f"peak_{name}"] = timing.peak_memory(step, self.device)
        pairs = list(zip(actual, expected, strict=True))
        self.known = {
            "difference": max((a.double() - b.double()).abs().max().item() for a, b in pairs),
            "largest": max(b.abs().max().item() for b in expected),
            "memory": memory,
        }
        return slow, fast

    def row(self) -> dict[str, Any] | None:
        """Keys: dtype, turns, diffusers, accelerated, ratio, difference, largest, memory. None without a turn."""
        pairs = list(zip(self.taken["accelerated"], self.taken["diffusers"], strict=True))
        if not pairs:
            return None
        return {
            "dtype": str(self.dtype).removeprefix("torch."),
            "turns": len(pairs),
            **{name: timing.summarise(times, "wall clock").as_row() for name, times in self.taken.items()},
            "ratio": timing.summarise([a / b for a, b in pairs], "of neighbouring turns").as_row(),
            **self.known,
        }

    def _say(self, text: str) -> None:
        print(f"{self.name}: {text}", file=sys.stderr, flush=True)


def printed(name: str, row: dict[str, Any]) -> str:
    ratio, added = row["ratio"], row["memory"]["added_resident"]
    return (
        f"{name:10}{row['diffusers']['median']:>10.3f} s{row['accelerated']['median']:>11.3f} s"
        f"{ratio['median']:>8.3f}   {ratio['p20']:.3f} to {ratio['p80']:.3f}  "
        f"{row['difference']:>12.2e}{added / 2**20:>6.0f} MiB"
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser("benchmarks.drop_in", __doc__, "python -m benchmarks.drop_in --width small --repeats 3")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, help="of PyTorch on a CPU (default: its own choice)")
    parser.add_argument("--repeats", type=int, default=7, help="turns of each side (default: 7)")
    parser.add_argument("--width", choices=WIDTHS, default="sd15", help="small: a tenth of SD 1.5's channels, 256x256")
    parser.add_argument("--layout", choices=LAYOUTS, default="contiguous", help="of the weights (default: contiguous)")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="stop after this long (default: no limit)")
    parser.add_argument("--output", type=Path, help="JSON file, rewritten after every turn")
    options = parser.parse_args(argv)
    if options.repeats < 1:
        parser.error("--repeats must be at least 1")
    if options.budget is not None and options.budget <= 0:
        parser.error("--budget must be positive")
    return options


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0, or 130 after an interruption (Ctrl-C)."""
    options = parse(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    budget = Budget() if options.budget is None else Budget(options.budget)
    result: dict[str, Any] = {"machine": machine.describe(device), "width": options.width, "layout": options.layout}
    result |= {"stopped": None, "rows": []}
    comparisons: list[Comparison] = []

    def save() -> None:
        result["rows"] = [row for comparison in comparisons if (row := comparison.row()) is not None]
        if options.output:
            options.output.write_text(json.dumps(result, indent=1) + "\n")

    print(f"{'':10}{'diffusers':>12}{'accelerated':>13}{'ratio':>8}   {'p20 to p80':16}{'difference':>12}{'added':>10}")
    for name in options.dtype:
        comparison = Comparison(options.width, DTYPES[name], LAYOUTS[options.layout], device)
        comparisons.append(comparison)
        try:
            comparison.run(options.repeats, budget, save)
        except OverBudget as over:
            result["stopped"] = str(over)
        except KeyboardInterrupt:
            result["stopped"] = "interrupted"
        row = comparison.row()
        print(f"{name:10}no turn was finished" if row is None else printed(name, row), flush=True)
        if result["stopped"]:
            left = options.dtype[len(comparisons) :]
            print(f"{result['stopped']}; not begun: {', '.join(left) or 'nothing'}", file=sys.stderr)
            break
    save()
    return 130 if result["stopped"] == "interrupted" else 0


if __name__ == "__main__":
    sys.exit(main())
