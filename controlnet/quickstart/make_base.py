"""Trains the quickstart's base model, the small text-to-image U-Net that its ControlNet controls.

    python -m controlnet.quickstart.make_base [--steps 5000] [--output controlnet/quickstart/base.safetensors]

Its result is part of the repository. The U-Net is trained on captions, without hints.
"""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from controlnet import build, config
from controlnet.common import command
from controlnet.quickstart.scenes import scene
from controlnet.training.optim import ExponentialAverage, LearningRate, build_optimizer
from controlnet.training.randomness import RandomStreams

logger = logging.getLogger("controlnet")

HERE = Path(__file__).parent
BASE = HERE / "base.safetensors"
CONFIG = HERE.parent / "configs" / "quickstart.yaml"
SCENES = 8192
SCENE_SEED = 20_000  # far from the seeds of the quickstart's own scenes
BATCH = 32
AVERAGE_DECAY = 0.998
# An error in the predicted picture counts 1 / sigma^2, as the same error in v would: at low noise errors are small, but
# they are what is seen. Below this sigma the weight stays the same.
LEAST_SIGMA = 0.2
OPTIMIZER: dict[str, Any] = {"name": "adamw", "lr": 1e-3, "weight_decay": 0.01, "betas": (0.9, 0.99), "eps": 1e-8}
SCHEDULE = {"name": "cosine", "warmup_steps": 100, "warmup_ratio": None, "min_lr": 0.0, "max_steps": None}


def training_set(conditioning: Any, count: int) -> tuple[Tensor, list[str]]:
    """Draws scenes: returns latents float32 [2 * count, C, h, w] of them and their mirror images, and the captions."""
    rng = np.random.default_rng(SCENE_SEED)
    drawn = [scene(rng)[:2] for _ in range(count)]
    images = torch.from_numpy(np.stack([image for image, _ in drawn])).permute(0, 3, 1, 2)  # uint8 [N, 3, H, W]
    latents = [conditioning.latents(chunk / 127.5 - 1) for chunk in torch.cat([images, images.flip(3)]).split(1024)]
    return torch.cat(latents), [caption for _, caption in drawn] * 2


def train(cfg: Mapping[str, Any], steps: int, output: Path, *, scenes: int = SCENES, every: int = 500) -> nn.Module:
    """Trains a U-Net, writes its averaged weights with the condition stage's tables, and returns it.

    Args:
        cfg: the quickstart's configuration.
        steps: updates of the weights, each on BATCH scenes.
        output: safetensors file, written every `every` steps and at the end.
        scenes: how many to draw.
    """
    torch.manual_seed(cfg.model.seed)
    streams = RandomStreams(cfg.model.seed, 0, "cpu")
    schedule, conditioning = build.build_schedule(cfg.model), build.build_conditioning(cfg.model, weights=False)
    node = {key: value for key, value in cfg.model.unet_config.items() if key != "from_pretrained"}
    unet = build.instantiate(node)
    optimizer = build_optimizer(unet.parameters(), OPTIMIZER)
    rate = LearningRate({**OPTIMIZER, "sched": SCHEDULE}, steps)
    average = ExponentialAverage(unet, AVERAGE_DECAY)
    latents, captions = training_set(conditioning, scenes)
    logger.info("%s parameters, %d scenes", f"{sum(p.numel() for p in unet.parameters()):,}", len(captions))

    start, losses = time.monotonic(), []
    for step in range(steps):
        picked = torch.randint(len(captions), (BATCH,), generator=streams.generator)
        dropped = streams.dropped_prompts(BATCH, cfg.model.text_embedding_dropout_rate)
        x0, words = latents[picked], [captions[i] for i in picked.tolist()]
        context = conditioning.batch_context({"captions": words}, dropped)
        noise, t = streams.noise_and_timesteps(x0, schedule.timesteps)
        prediction = unet(schedule.add_noise(x0, noise, t), t, context)
        errors = (prediction - schedule.target(x0, noise, t)).square().mean((1, 2, 3))  # [N]
        loss = (errors / schedule.sigma[t].float().clamp(min=LEAST_SIGMA) ** 2).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.step()
        average.update(step + 1)
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            seconds = (time.monotonic() - start) / (step + 1)
            logger.info("step %d: loss %.4f, %.2f s a step", step + 1, np.mean(losses[-100:]), seconds)
        if (step + 1) % every == 0 or step + 1 == steps:
            save(output, average.averages, conditioning.cond_stage)
    with torch.no_grad():
        for name, tensor in unet.state_dict().items():
            tensor.copy_(average.averages[name])
    return unet


def save(path: Path, weights: Mapping[str, Tensor], cond_stage: nn.Module) -> None:
    """Writes U-Net and condition stage under the original's prefixes, in float16: half the size, and close enough."""
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in weights.items()}
    tensors |= {f"cond_stage_model.{name}": tensor for name, tensor in cond_stage.state_dict().items()}
    save_file({name: tensor.detach().to(torch.float16).contiguous() for name, tensor in tensors.items()}, path)


def main() -> None:
    examples = "python -m controlnet.quickstart.make_base --steps 100 --output /tmp/base.safetensors"
    parser = command.parser("controlnet.quickstart.make_base", __doc__.split("\n")[0], examples)
    parser.add_argument("--steps", type=int, default=5000, help="updates (default 5000)")
    parser.add_argument("--output", type=Path, default=BASE, help="safetensors file (default: the shipped one)")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)  # the same sums on any number of cores
    train(config.load(CONFIG), arguments.steps, arguments.output)


if __name__ == "__main__":
    main()
