"""Draws images with a trained ControlNet.

python -m controlnet.generate --checkpoint runs/controlnet --hint hint.png --prompt "..." --output grid.png
"""

import argparse
import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from controlnet import build, checkpoints, config
from controlnet.conditioning import Conditioning
from controlnet.config import ConfigError
from controlnet.data.hints import read_hint
from controlnet.inference.images import fault, grid, to_uint8
from controlnet.inference.sampling import control_scales, ddim, guided, sample_with_scheduler
from controlnet.model.controlled import ControlledUNet
from controlnet.model.diffusion import NoiseSchedule
from controlnet.training import checkpoint

logger = logging.getLogger(__name__)

SCHEDULERS = {"DDIM": "DDIMScheduler", "UniPC": "UniPCMultistepScheduler", "Euler": "EulerDiscreteScheduler"}
PREDICTION_TYPES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}


@dataclasses.dataclass(frozen=True)
class Request:
    """What to draw.

    prompt, negative_prompt: texts of the conditional and the unconditional half.
    strength, scales: of the control: one factor for all outputs, and one each (13 for Stable Diffusion).
    guess_mode: control only the conditional half, the shallow outputs weaker; see `sampling.control_scales`.
    guidance_scale, steps, eta: see `sampling.ddim`.
    seed: image i starts from the noise of seed + i.
    scheduler: None for the DDIM of this package, or a name of SCHEDULERS for that of diffusers.
    """

    prompt: str
    negative_prompt: str = ""
    strength: float = 1.0
    scales: Sequence[float] | None = None
    guess_mode: bool = False
    guidance_scale: float = 7.5
    steps: int = 50
    eta: float = 0.0
    seed: int = 0
    images: int = 1
    scheduler: str | None = None


def generate(
    model: ControlledUNet,
    conditioning: Conditioning,
    schedule: NoiseSchedule,
    hint: Tensor,
    request: Request,
    progress: Any = lambda order: order,
) -> tuple[Tensor, Tensor]:
    """Images [N, 3, H, W] in [-1, 1], and the latents that they are decoded from.

    Arguments:
        hint: [1, 3, H, W] in [0, 1], of the size of the images.
    Raises ValueError for a size that the first stage cannot take, or another number of scales than control outputs.
    """
    factor, n = conditioning.factor, request.images
    height, width = hint.shape[2:]
    if height % factor or width % factor:
        near = " x ".join(str(max(factor, round(side / factor) * factor)) for side in (width, height))
        raise ValueError(
            f"the hint is {width} x {height} pixels; expected multiples of {factor}, such as {near} (see --size)"
        )
    shape = (n, conditioning.latent_channels, height // factor, width // factor)
    seeds = [torch.Generator().manual_seed(request.seed + i) for i in range(n)]
    x_T = torch.cat([torch.randn(1, *shape[1:], generator=seed) for seed in seeds])
    context = conditioning.context([request.prompt] * n)
    guidance = {
        "uncond_context": conditioning.context([request.negative_prompt] * n),
        "hint": hint.expand(n, -1, -1, -1).to(context.device),
        "guidance_scale": request.guidance_scale,
        "scales": control_scales(len(model.control.zero_convs) + 1, request.strength, request.scales),
        "guess_mode": request.guess_mode,
    }
    sampling = {"steps": request.steps, "generator": seeds[0], "x_T": x_T, "progress": progress}
    if request.scheduler is None:
        latents = ddim(model, schedule, shape, context, eta=request.eta, **guidance, **sampling)
    else:
        scheduler = diffusers_scheduler(request.scheduler, schedule)
        predict = guided(model, context, **guidance)
        latents = sample_with_scheduler(scheduler, predict, shape, device=context.device, **sampling)
    return conditioning.images(latents), latents


def diffusers_scheduler(name: str, schedule: NoiseSchedule) -> Any:
    """The scheduler of diffusers with the betas, the prediction and the timesteps of Stable Diffusion's sampling."""
    if name not in SCHEDULERS:
        raise ValueError(f"scheduler is {name!r}; expected one of {', '.join(SCHEDULERS)}")
    try:
        import diffusers
    except ImportError as error:
        raise ImportError(f"scheduler {name} is diffusers', which is not installed: pip install diffusers") from error
    own = {"clip_sample": False, "set_alpha_to_one": False} if name == "DDIM" else {}
    return getattr(diffusers, SCHEDULERS[name])(
        num_train_timesteps=schedule.timesteps,
        trained_betas=schedule.betas.float().cpu().numpy(),
        prediction_type=PREDICTION_TYPES[schedule.parameterization],
        timestep_spacing="leading",
        steps_offset=1,
        **own,
    )


def load(
    source: Path, config_file: Path | None, overrides: Sequence[str] = (), average: bool = True
) -> tuple[ControlledUNet, Conditioning, NoiseSchedule]:
    """The trained model with its conditioning and noise schedule, on the CPU, in float32.

    Arguments:
        source: a run's folder (its newest complete checkpoint is taken), a checkpoint's folder, or a file of any
            layout that `checkpoints` reads.
        config_file: YAML; by default the one in the checkpoint's folder.
        average: take the averaged weights where the checkpoint has them.
    Raises CheckpointError, ConfigError, FileNotFoundError.
    """
    if not source.exists():
        raise FileNotFoundError(f"nothing at {source}; expected a run's or a checkpoint's folder, or a file")
    folder = _checkpoint_folder(source) if source.is_dir() else None
    if config_file is None and folder is None:
        raise ConfigError(f"{source} is a file, which holds no configuration; give one with --config")
    cfg = config.load(config_file or folder / "config.yaml", overrides)
    if folder is None and cfg.model.ckpt_path is None:
        cfg.model.ckpt_path = str(source)  # also brings what else the file holds: U-Net, VAE, text encoder
    model, conditioning = build.build_model(cfg.model), build.build_conditioning(cfg.model)
    if folder is None:
        if "control" not in checkpoints.parts(source):
            raise checkpoints.CheckpointError(f"{source} holds no ControlNet")
        checkpoints.load_control(model.control, source, source="control")
    else:
        checkpoint.load_model(model, folder)
        if average and (folder / checkpoint.AVERAGE).is_file():
            checkpoint.load_average(model, folder)
    return model.eval(), conditioning, NoiseSchedule.from_config(cfg.model)


def _checkpoint_folder(folder: Path) -> Path:
    """The folder itself, or the newest complete checkpoint of the run that it belongs to."""
    if (folder / checkpoint.CHECKPOINTS).is_dir():
        newest = checkpoint.newest_complete(folder / checkpoint.CHECKPOINTS, logger.warning)
        if newest is None:
            raise checkpoints.CheckpointError(f"{folder} holds no complete checkpoint")
        return newest
    problem = checkpoint.fault(folder)
    if problem is not None:
        raise checkpoints.CheckpointError(problem)
    return folder


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, such as 512x512")
    return int(width), int(height)


def _positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m controlnet.generate", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--checkpoint", required=True, type=Path, help="folder of a run or of a checkpoint, or a weights file")
    add("--config", type=Path, help="YAML configuration; by default the checkpoint's own")
    add("--hint", required=True, type=Path, help="image that controls")
    add("--size", type=_size, help="WIDTHxHEIGHT to bring the hint to, by the nearest pixel")
    add("--prompt", required=True)
    add("--negative-prompt", default="")
    add("--strength", type=float, default=1.0, help="of the control (default 1)")
    add("--scales", type=float, nargs="+", metavar="S", help="strength of each output, shallow to deep, middle last")
    add("--guess-mode", action="store_true", help="let the hint lead where the prompt says little")
    add("--guidance-scale", type=float, default=7.5, help="of the prompt (default 7.5)")
    add("--steps", type=_positive, default=50, help="model evaluations (default 50)")
    add("--eta", type=float, default=0.0, help="0 deterministic, 1 as noisy as DDPM; DDIM of this package only")
    add("--seed", type=int, default=0, help="image i has seed + i (default 0)")
    add("--num-images", type=_positive, default=1)
    add("--scheduler", choices=SCHEDULERS, help="sample with this scheduler of diffusers")
    add("--no-average", action="store_true", help="take the trained weights even where an average was kept")
    add("--precision", default="fp32", help="fp32 (default), bf16 or fp16")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--output", type=Path, default=Path("grid.png"), help="PNG of the hint and the images (default grid.png)")
    add("overrides", nargs="*", metavar="key=value", help="settings that replace the configuration's")
    arguments = parser.parse_args(argv)
    if arguments.scheduler and arguments.eta:
        parser.error("--eta belongs to the DDIM of this package; leave out --scheduler")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = _arguments(argv)
    try:
        hint = read_hint(arguments.hint, arguments.size)
        model, conditioning, schedule = load(
            arguments.checkpoint, arguments.config, arguments.overrides, not arguments.no_average
        )
        dtype = config.dtype(arguments.precision, "--precision")
        model, conditioning = model.to(arguments.device, dtype), conditioning.to(arguments.device)
        request = Request(
            prompt=arguments.prompt,
            negative_prompt=arguments.negative_prompt,
            strength=arguments.strength,
            scales=arguments.scales,
            guess_mode=arguments.guess_mode,
            guidance_scale=arguments.guidance_scale,
            steps=arguments.steps,
            eta=arguments.eta,
            seed=arguments.seed,
            images=arguments.num_images,
            scheduler=arguments.scheduler,
        )
        images, latents = generate(
            model, conditioning, schedule, hint, request, progress=lambda order: tqdm(order, disable=None)
        )
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    label = arguments.prompt.encode("ascii", "replace").decode()  # what Pillow's built-in font can write
    grid({"hint": to_uint8(hint, low=0.0), label: to_uint8(images)}).save(arguments.output)
    problem = fault(images, latents)
    if problem is not None:
        sys.exit(f"error: {arguments.output} shows nothing: {problem}")
    print(arguments.output)


if __name__ == "__main__":
    main()
