"""The denoising loop: classifier-free guidance in one batch, with DDIM or with a scheduler of diffusers."""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from controlnet.inference.graph import Recorder, StepGraph
from controlnet.model.controlled import ControlledUNet
from controlnet.model.diffusion import NoiseSchedule
from controlnet.model.scales import for_both_halves

Scales = float | Tensor | Sequence[float | Tensor]
Predict = Callable[[Tensor, Tensor], Tensor]  # (x [N, C, h, w], t int64 [N]) -> prediction [N, C, h, w]

# Of the original's guess mode: the deepest output at full strength, each shallower one at 0.825 of the next.
GUESS_MODE_DECAY = 0.825


def ddim_timesteps(timesteps: int, steps: int) -> list[int]:
    """Returns the `steps` timesteps that DDIM visits, ascending: i * (timesteps // steps) + 1.

    "Leading" spacing with an offset of one, as Stable Diffusion is sampled. The offset is dropped where it would leave
    the schedule (steps == timesteps). Where `steps` does not divide `timesteps`, exactly `steps` are returned, as by
    diffusers; the original would take one or more beyond.
    """
    if not 1 <= steps <= timesteps:
        raise ValueError(f"steps is {steps}; expected 1 to {timesteps}, the length of the noise schedule")
    stride = timesteps // steps
    offset = min(1, stride - 1)
    return [i * stride + offset for i in range(steps)]


def control_scales(
    count: int, strength: float = 1.0, scales: Sequence[float] | None = None, guess_mode: bool = False
) -> list[float]:
    """Returns the strength of each of the `count` control outputs: skips from shallow to deep, then the middle block.

    scale_i = strength * scales_i * (0.825 ** (count - 1 - i) in guess mode)
    """
    if scales is not None and len(scales) != count:
        raise ValueError(f"scales has {len(scales)} values; expected {count}, one for each output of the ControlNet")
    curve = [GUESS_MODE_DECAY ** (count - 1 - i) if guess_mode else 1.0 for i in range(count)]
    return [strength * factor * (1.0 if scales is None else scales[i]) for i, factor in enumerate(curve)]


@torch.no_grad()
def guided(
    model: ControlledUNet,
    context: Tensor,
    *,
    uncond_context: Tensor | None = None,
    y: Tensor | None = None,
    uncond_y: Tensor | None = None,
    hint: Tensor | None = None,
    guidance_scale: float = 7.5,
    scales: Scales = 1.0,
    guess_mode: bool = False,
    graph: bool | Recorder = False,
) -> Predict:
    """Returns a function (x, t) -> prediction with classifier-free guidance; hint and context are encoded here, once.

    prediction = uncond + guidance_scale * (cond - uncond), both halves in one batch; the conditional half alone when
    uncond_context is None or guidance_scale is 1.

    Args:
        context, uncond_context: [N, T, D] text states of the prompts and of the negative prompts.
        y, uncond_y: [N, adm_in_channels], their vectors, of a model with `num_classes` (Stable Diffusion XL).
        hint: [N, 3, H, W] in [0, 1], or None for no control.
        scales: strength of the control, one for all outputs or one for each: a number, a tensor [N], or a mask
            [N, 1, h, w] (see `ControlNet.forward`).
        guess_mode: control only the conditional half, and weaken the shallow outputs (see `control_scales`).
        graph: run the predictions as one CUDA graph, captured at the first; or by a recorder (see `StepGraph`).
    """
    batch = context.shape[0]
    double = uncond_context is not None and guidance_scale != 1
    if double and uncond_context.shape != context.shape:
        expected = tuple(context.shape)
        raise ValueError(f"uncond_context is {tuple(uncond_context.shape)}; expected the shape of context, {expected}")
    if double and y is not None and (uncond_y is None or uncond_y.shape != y.shape):
        got = None if uncond_y is None else tuple(uncond_y.shape)
        raise ValueError(f"uncond_y is {got}; expected the shape of y, {tuple(y.shape)}")
    guided_hint = None
    if hint is not None:
        if hint.shape[0] != batch:
            raise ValueError(f"hint has batch size {hint.shape[0]}; expected that of context, {batch}")
        guided_hint = model.control.encode_hint(hint)
        count = len(model.control.zero_convs) + 1
        if guess_mode:
            every = list(scales) if isinstance(scales, (list, tuple)) else [scales] * count
            curve = control_scales(count, guess_mode=True)
            scales = [scale * factor for scale, factor in zip(every, curve, strict=True)]
    if double:
        context = torch.cat([uncond_context, context])  # [2N, T, D]
        y = None if y is None else torch.cat([uncond_y, y])
        if guided_hint is not None:
            guided_hint = torch.cat([guided_hint, guided_hint])
            scales = for_both_halves(scales, batch, context.device, conditional_only=guess_mode)
    prepared = model.prepare_context(context)
    given = {"guided_hint": guided_hint, "scales": scales, **({} if y is None else {"y": y})}

    @torch.no_grad()
    def predict(x: Tensor, t: Tensor) -> Tensor:
        if not double:
            return model(x, t, prepared, **given).float()
        uncond, cond = model(torch.cat([x, x]), torch.cat([t, t]), prepared, **given).float().chunk(2)
        return uncond + guidance_scale * (cond - uncond)

    if graph is False:
        return predict
    captured = StepGraph(predict, model, recorder=None if graph is True else graph)
    return torch.no_grad()(lambda x, t: captured(x=x, t=t))


def _randn(shape: Sequence[int], generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Draws normal noise on the generator's device: a CPU generator gives the same image on every device."""
    source = generator.device if generator is not None else device
    return torch.randn(tuple(shape), generator=generator, device=source).to(device)


@torch.no_grad()
def ddim(
    model: ControlledUNet,
    schedule: NoiseSchedule,
    shape: Sequence[int],
    context: Tensor,
    *,
    steps: int = 50,
    eta: float = 0.0,
    generator: torch.Generator | None = None,
    x_T: Tensor | None = None,
    progress: Callable[[Sequence[int]], Sequence[int]] = lambda order: order,
    **guidance: Any,
) -> Tensor:
    """Samples latents by DDIM (Song et al. 2020, arXiv:2010.02502); returns float32 of `shape`.

    x_0 = (x_t - sqrt(1 - a_t) eps) / sqrt(a_t);  sigma = eta sqrt((1 - a_s) / (1 - a_t)) sqrt(1 - a_t / a_s)
    x_s = sqrt(a_s) x_0 + sqrt(1 - a_s - sigma^2) eps + sigma noise
    with s the timestep visited after t, and a_s = alpha_bar_0 after the last one.

    Args:
        shape: [N, C, h, w] of the latents.
        context: [N, T, D] text states of the prompts.
        steps: number of model evaluations, 1 to schedule.timesteps; which timesteps, see `ddim_timesteps`.
        eta: 0 is deterministic, 1 the variance of DDPM.
        generator: of x_T and of the noise of eta; its device is where they are drawn.
        x_T: [N, C, h, w] initial noise instead of a drawn one.
        progress: wraps the timesteps, for a progress bar.
        guidance: arguments of `guided`: uncond_context, y, uncond_y, hint, guidance_scale, scales, guess_mode, graph.
    """
    if eta < 0:
        raise ValueError(f"eta is {eta}; expected 0 or more")
    predict = guided(model, context, **guidance)
    device = context.device
    x = (_randn(shape, generator, device) if x_T is None else x_T.to(device)).float()
    visited = ddim_timesteps(schedule.timesteps, steps)
    alphas = schedule.alphas_cumprod.tolist()
    for i in progress(range(steps - 1, -1, -1)):
        t = torch.full((x.shape[0],), visited[i], dtype=torch.int64, device=device)
        a_t, a_s = alphas[visited[i]], alphas[visited[i - 1] if i > 0 else 0]
        prediction = predict(x, t)
        x0, eps = schedule.predict_x0(prediction, x, t), schedule.predict_eps(prediction, x, t)
        sigma = eta * math.sqrt((1 - a_s) / (1 - a_t) * (1 - a_t / a_s))
        x = math.sqrt(a_s) * x0 + math.sqrt(1 - a_s - sigma**2) * eps
        if sigma > 0:
            x = x + sigma * _randn(shape, generator, device)
    return x


@torch.no_grad()
def sample_with_scheduler(
    scheduler,
    predict: Predict,
    shape: Sequence[int],
    *,
    steps: int,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
    x_T: Tensor | None = None,
    progress: Callable[[Sequence[int]], Sequence[int]] = lambda order: order,
) -> Tensor:
    """Samples latents by a diffusers scheduler around `guided`'s prediction; returns float32 of `shape`.

    Args:
        scheduler: a diffusers SchedulerMixin made with the betas and prediction type of the model's noise schedule.
        predict: from `guided`.
        steps: number of inference steps asked of the scheduler; some evaluate the model more often.
        x_T: [N, C, h, w] standard normal initial noise instead of a drawn one.
    """
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": generator} if takes_generator else {}
    scheduler.set_timesteps(steps, device=device)
    x = _randn(shape, generator, torch.device(device)) if x_T is None else x_T.to(device)
    x = x.float() * scheduler.init_noise_sigma
    for t in progress(scheduler.timesteps):
        # Samplers that work on noise levels (Euler) may ask for a timestep between two; the model takes whole ones.
        whole = t.round().to(torch.int64).expand(x.shape[0]).to(device)
        prediction = predict(scheduler.scale_model_input(x, t), whole)
        x = scheduler.step(prediction, t, x, **extra, return_dict=False)[0]
    return x.float()
