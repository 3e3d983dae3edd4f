"""The benchmarked jobs at SD 1.5's size: a denoise step (with guidance), a denoise loop and a training step.

Weights are random (speed does not depend on them), latents and text states are given, and every provider gets
channels_last and the same dtype. Providers are built one after the other and freed, so that they share no memory.
"""

import gc
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.budget import Budget, OverBudget
from cnkernels import timing
from controlnet.model.controlled import ControlledUNet
from controlnet.model.controlnet import ControlNet
from controlnet.model.diffusion import DiffusionLoss, NoiseSchedule
from controlnet.model.unet import UNet

SD15 = {
    "in_channels": 4,
    "model_channels": 320,
    "attention_resolutions": [4, 2, 1],
    "num_res_blocks": 2,
    "channel_mult": [1, 2, 4, 4],
    "num_heads": 8,
    "use_spatial_transformer": True,
    "transformer_depth": 1,
    "context_dim": 768,
    "legacy": False,
    "use_flash_attention": True,
}
SDXL = {
    **{key: value for key, value in SD15.items() if key != "num_heads"},
    "attention_resolutions": [4, 2],
    "channel_mult": [1, 2, 4],
    "num_head_channels": 64,
    "use_linear_in_transformer": True,
    "transformer_depth": [0, 2, 10],
    "context_dim": 2048,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
}
TINY = {**SD15, "model_channels": 32, "context_dim": 32}  # for a CPU
TINY_SDXL = {**SDXL, "model_channels": 32, "num_head_channels": 8, "context_dim": 32, "adm_in_channels": 88}
POOLED, TIME_IDS = 5, 6  # SDXL's vector: the pooled caption is as wide as five sinusoids of a time id
LOOP_STEPS = 20
UNET_FLOPS, CONTROL_FLOPS = (
    0.8033e12,
    0.2833e12,
)  # of one forward at 512x512, batch 1; benchmarks.device_free counts them
TRAIN_FLOPS = 2.334e12  # of one training sample with cached latents and text, decoder weights frozen


@dataclass(frozen=True)
class Job:
    """A job at one size. `batch` counts images; with guidance the networks see twice as many."""

    name: str
    batch: int
    side: int  # of the latents
    dtype: torch.dtype

    @property
    def label(self) -> str:
        return f"{self.name} B{self.batch} {8 * self.side}x{8 * self.side}"


def images(job: Job, device: torch.device, context_dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Makes x, hint, timesteps and context of a denoise step with guidance, or of a training step."""
    n = job.batch * (1 if job.name == "training step" else 2)
    options = {"device": device, "dtype": job.dtype}
    x, hint = torch.randn(n, 4, job.side, job.side, **options), torch.rand(n, 3, 8 * job.side, 8 * job.side, **options)
    x, hint = (t.contiguous(memory_format=torch.channels_last) for t in (x, hint))
    return x, hint, torch.full((n,), 500, device=device), torch.randn(n, 77, context_dim, **options)


def _captured(step: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """Captures `step` in one CUDA graph; returns its replay."""
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = step()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


def controlled_unet(device: torch.device, params: dict[str, Any]) -> ControlledUNet:
    """A U-Net with its ControlNet, random weights, channels_last."""
    with device:
        model = ControlledUNet(UNet(**params, out_channels=4), ControlNet(**params, hint_channels=3))
    return model.to(memory_format=torch.channels_last)


def _denoise_ours(job: Job, device: torch.device, params: dict[str, Any], how: str) -> Callable[[], Tensor]:
    model = controlled_unet(device, params).to(job.dtype).requires_grad_(False).eval()
    x, hint, t, context = images(job, device, params["context_dim"])
    guided_hint = model.control.encode_hint(hint)  # does not change over the loop
    extra, _ = added(params, len(x), device=device, dtype=job.dtype)
    forward = torch.compile(model, mode="max-autotune-no-cudagraphs", fullgraph=True) if "compile" in how else model

    def step() -> Tensor:
        with torch.no_grad():
            uncond, cond = forward(x, t, context, guided_hint=guided_hint, **extra).chunk(2)
            return uncond + 7.5 * (cond - uncond)

    return _captured(step, device) if "graph" in how else step


def added(params: dict[str, Any], n: int, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """SDXL's vector beside the timestep, as keyword arguments of our models and of diffusers'; none of SD 1.5."""
    if "adm_in_channels" not in params:
        return {}, {}
    width = params["adm_in_channels"] // (POOLED + TIME_IDS)
    parts = {"text_embeds": torch.zeros(n, POOLED * width, **options), "time_ids": torch.zeros(n, TIME_IDS, **options)}
    return {"y": torch.zeros(n, params["adm_in_channels"], **options)}, {"added_cond_kwargs": parts}


def diffusers_networks(params: dict[str, Any], device: torch.device):
    """diffusers' U-Net and ControlNet of the same size, random weights, channels_last."""
    with device:
        unet, control = build_diffusers(params)
    return unet.to(memory_format=torch.channels_last), control.to(memory_format=torch.channels_last)


def build_diffusers(params: dict[str, Any]):
    """diffusers' U-Net and ControlNet of the size that our constructors' arguments say."""
    from diffusers import ControlNetModel, UNet2DConditionModel

    channels = tuple(params["model_channels"] * m for m in params["channel_mult"])
    options = {"block_out_channels": channels, "cross_attention_dim": params["context_dim"]}
    blocks = {}  # by default SD 1.5's
    if "adm_in_channels" in params:
        depths = params["transformer_depth"]
        options |= {
            "down_block_types": tuple("CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths),
            "transformer_layers_per_block": [max(1, depth) for depth in depths],
            "attention_head_dim": [c // params["num_head_channels"] for c in channels],  # the number of heads
            "use_linear_projection": params["use_linear_in_transformer"],
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": params["adm_in_channels"] // (POOLED + TIME_IDS),
            "projection_class_embeddings_input_dim": params["adm_in_channels"],
        }
        blocks["up_block_types"] = tuple(t.replace("Down", "Up") for t in reversed(options["down_block_types"]))
    return UNet2DConditionModel(**options, **blocks), ControlNetModel(**options)


def _denoise_diffusers(job: Job, device: torch.device, params: dict[str, Any], how: str) -> Callable[[], Tensor]:
    unet, control = (m.to(job.dtype).requires_grad_(False).eval() for m in diffusers_networks(params, device))
    x, hint, t, context = images(job, device, params["context_dim"])
    _, extra = added(params, len(x), device=device, dtype=job.dtype)
    if "accelerate" in how:
        import controlnet

        for model in (unet, control):
            controlnet.accelerate(model, graph="graph" in how and "compile" not in how)
            if "compile" in how:
                model.compile(mode="max-autotune-no-cudagraphs", fullgraph=True)
    elif how != "eager":
        mode = "max-autotune" if "graph" in how else "max-autotune-no-cudagraphs"
        mode = mode if device.type == "cuda" else "default"
        unet, control = (
            torch.compile(unet, mode=mode, fullgraph=True),
            torch.compile(control, mode=mode, fullgraph=True),
        )

    def step() -> Tensor:
        with torch.no_grad():
            down, mid = control(x, t, context, hint, conditioning_scale=1.0, **extra, return_dict=False)
            residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
            uncond, cond = unet(x, t, context, **residuals, **extra, return_dict=False)[0].chunk(2)
            return uncond + 7.5 * (cond - uncond)

    return step


def training(job: Job, device: torch.device, model, parameters: list, loss: Callable[[], Tensor]):
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, job.dtype):
            value = loss()
        value.backward()
        optimizer.step()
        return value.detach()

    step.keep = model
    return step


def _train_ours(job: Job, device: torch.device, params: dict[str, Any], how: str) -> Callable[[], Tensor]:
    model = controlled_unet(device, params)
    for parameter in model.unet.parameters():
        parameter.data = parameter.data.to(job.dtype)
    loss = DiffusionLoss(model, NoiseSchedule().to(device))
    if "compile" in how:
        loss.compile(fullgraph=True)
    x, hint, t, context = images(job, device, params["context_dim"])
    arguments = x.float(), hint, context, torch.randn_like(x).float(), t
    return training(job, device, loss, list(model.trainable_parameters()), lambda: loss(*arguments))


def _train_diffusers(job: Job, device: torch.device, params: dict[str, Any], how: str) -> Callable[[], Tensor]:
    unet, control = diffusers_networks(params, device)
    unet.requires_grad_(False).to(job.dtype)
    if "compile" in how:
        unet, control = torch.compile(unet), torch.compile(control)
    x, hint, t, context = images(job, device, params["context_dim"])
    schedule, x0, noise = NoiseSchedule().to(device), x.float(), torch.randn_like(x).float()

    def loss() -> Tensor:
        x_t = schedule.add_noise(x0, noise, t)
        down, mid = control(x_t, t, context, hint, return_dict=False)
        down, mid = [d.to(job.dtype) for d in down], mid.to(job.dtype)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        return F.mse_loss(unet(x_t.to(job.dtype), t, context, **residuals, return_dict=False)[0].float(), noise)

    return training(job, device, (unet, control), list(control.parameters()), loss)


DENOISE = {
    "ours": (_denoise_ours, "eager"),
    "ours, CUDA graph": (_denoise_ours, "graph"),
    "ours, compiled, CUDA graph": (_denoise_ours, "compile graph"),
    "ours through diffusers": (_denoise_diffusers, "accelerate"),
    "ours through diffusers, CUDA graph": (_denoise_diffusers, "accelerate graph"),
    "ours through diffusers, compiled": (_denoise_diffusers, "accelerate compile"),
    "ours through diffusers, compiled, CUDA graph": (_denoise_diffusers, "accelerate compile graph"),
    "diffusers": (_denoise_diffusers, "eager"),
    "diffusers, compiled": (_denoise_diffusers, "compile"),
    "diffusers, compiled, CUDA graph": (_denoise_diffusers, "compile graph"),
}
TRAIN = {
    "ours": (_train_ours, "eager"),
    "ours, compiled": (_train_ours, "compile"),
    "diffusers": (_train_diffusers, "eager"),
    "diffusers, compiled": (_train_diffusers, "compile"),
}
PROVIDERS = {"denoise step": DENOISE, "denoise loop": DENOISE, "training step": TRAIN}


def jobs(small: bool, quick: bool) -> Iterator[Job]:
    if small:
        yield from (Job("denoise step", 1, 8, torch.float32), Job("training step", 1, 8, torch.bfloat16))
        return
    for batch in (1,) if quick else (1, 4):
        yield Job("denoise step", batch, 64, torch.float16)
        yield Job("denoise loop", batch, 64, torch.float16)
    for batch in (8,) if quick else (8, 32):
        yield Job("training step", batch, 64, torch.bfloat16)


def blank(job: Job, provider: str) -> dict[str, Any]:
    """Returns the part of a row that is known before the measurement."""
    row = {"kind": "job", "job": job.name, "shape": job.label, "dtype": str(job.dtype).removeprefix("torch.")}
    return {**row, "layout": "channels_last", "provider": provider}


def row(
    job: Job, provider: str, device: torch.device, small: bool, budget: Budget | None = None, each: float = math.inf
) -> dict[str, Any]:
    """Builds, times and frees one provider (they do not fit in memory together); returns its row.

    Args:
        small: reduced width, for a CPU.
        budget: of the run; each: seconds that this provider may take before it is timed.
    """
    build, how = PROVIDERS[job.name][provider]
    if device.type != "cuda" and ("graph" in how or "compile" in how):
        reason = "CUDA graphs need a GPU" if "graph" in how else "compiling a whole U-Net for a CPU takes minutes"
        return {**blank(job, provider), "reason": reason}
    found = _measure(job, build, how, device, TINY if small else SD15, budget or Budget(), each)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return {**blank(job, provider), **found}


def _measure(
    job: Job, build: Callable, how: str, device: torch.device, params: dict[str, Any], budget: Budget, each: float
) -> dict:
    calls = LOOP_STEPS if job.name == "denoise loop" else 1
    try:
        with budget.provider(each):
            step = build(job, device, params, how)

            def run(i: int) -> None:
                for _ in range(calls):
                    step()

            step()  # compiles what is compiled on first use
            peak = timing.peak_memory(run, device)
        with budget.provider():
            result = timing.time_one(run, device, rounds=7)
    except (Exception, OverBudget) as error:  # a provider may fail in any way at all; its row says how
        return {"reason": timing.reason(error)}
    images = job.batch * calls
    row = {**result.as_row(), "per_second": images / result.median, "peak_memory": peak}
    if job.side == 64 and device.type == "cuda":
        flops = TRAIN_FLOPS if job.name == "training step" else 2 * (UNET_FLOPS + CONTROL_FLOPS)
        row["model_flops_per_s"] = flops * images / result.median
    return row
