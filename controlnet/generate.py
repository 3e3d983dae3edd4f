"""Draws images with one or several trained ControlNets.

python -m controlnet.generate --checkpoint runs/controlnet --hint hint.png --prompt "..." --output grid.png
"""

import argparse
import dataclasses
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from controlnet import config
from controlnet.build.opening import Origin, open_origin, read_hint
from controlnet.common import command
from controlnet.common.extras import quiet_libraries, require
from controlnet.config.infer import nemo_options
from controlnet.inference.drawing import SCHEDULERS, Request, check_size, generate
from controlnet.inference.images import fault, grid, picture, save_png, to_uint8
from controlnet.inference.jobs import Job, jobs, read_prompts

__all__ = ["Request", "generate", "load", "main", "read_hint"]


def load(
    source: Path, config_file: Path | None, overrides: Sequence[str] = (), average: bool = True
) -> tuple[Any, Any, Any]:
    """Loads a trained model with its conditioning and noise schedule, on the CPU, in float32.

    Arguments and errors: as `opening.open_origin`.
    """
    return open_origin([source], config_file=config_file, overrides=overrides, average=average).models()


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, such as 512x512")
    return int(width), int(height)


def _positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


DESCRIPTION = """Draws images with one or several trained ControlNets.

Stable Diffusion 1, 2 and XL, by the steps of their base models. Not served: ControlNet-Union's control types, and the
few-step schedulers of distilled models (SDXL-Turbo, Lightning, LCM)."""
EXAMPLES = """
python -m controlnet.generate --checkpoint runs/mine --hint map.png --prompt "a house" --num-images 4
python -m controlnet.generate --checkpoint runs/mine --hint maps/ --prompts prompts.txt --images out/
python -m controlnet.generate --checkpoint control_v11p_sd15_canny.pth --base stable-diffusion-v1-5 --hint edges.png \\
    --prompt "a house"
python -m controlnet.generate --base stable-diffusion-v1-5 --checkpoint canny --hint edges.png --weight 1 \\
    --checkpoint depth --hint depth.png --weight 0.5 --prompt "a house"
python -m controlnet.generate --config controlnet_infer.yaml --base stable-diffusion-v1-5
"""


def _parser() -> argparse.ArgumentParser:
    parser = command.parser("controlnet.generate", DESCRIPTION, EXAMPLES)
    add = parser.add_argument
    add(
        "--checkpoint",
        type=Path,
        action="append",
        help="a run, a checkpoint's folder, a diffusers folder, or a weights file; once for each ControlNet",
    )
    add(
        "--config",
        type=Path,
        help="YAML configuration (default: the checkpoint's own), or NeMo's controlnet_infer.yaml, which gives options."
        f" Shipped are {', '.join(command.shipped())}",
    )
    add(
        "--base", type=Path, help="Stable Diffusion to control, a diffusers folder or a checkpoint, instead of --config"
    )
    add("--hint", type=Path, action="append", help="image that controls, or a folder of them; once for each ControlNet")
    add("--weight", type=float, action="append", help="of each ControlNet, in their order (default 1)")
    add("--size", type=_size, help="WIDTHxHEIGHT of the images; hints are brought to it by the nearest pixel")
    add("--prompt", action="append", help="a text; several for several images")
    add("--prompts", type=Path, help="file with a prompt in each line; one for all hints, or as many as hints")
    add("--negative-prompt", default="")
    add("--strength", type=float, default=1.0, help="of the control (default 1)")
    add("--scales", type=float, nargs="+", metavar="S", help="strength of each output, shallow to deep, middle last")
    add("--guess-mode", action="store_true", help="let the hint lead where the prompt says little")
    add("--guidance-scale", type=float, default=7.5, help="of the prompt (default 7.5)")
    add("--steps", type=_positive, default=50, help="model evaluations (default 50)")
    add("--eta", type=float, default=0.0, help="0 deterministic, 1 as noisy as DDPM; DDIM of this package only")
    add("--seed", type=int, default=0, help="image i of a prompt has seed + i (default 0)")
    add("--num-images", type=_positive, default=1, help="of each prompt (default 1)")
    add(
        "--scheduler",
        choices=SCHEDULERS,
        help=f"sample with a scheduler of diffusers, {', '.join(SCHEDULERS)}; by default the DDIM of this package",
    )
    add("--graph", action="store_true", help="run the steps as one CUDA graph, captured at the first (a GPU only)")
    add("--no-average", action="store_true", help="take the trained weights even where an average was kept")
    add("--precision", default="fp32", help="fp32 (default), bf16 or fp16")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--output", type=Path, default=Path("grid.png"), help="PNG of the hints and the images (default grid.png)")
    add("--images", type=Path, help="folder for each image as a PNG of its own, with prompt, seed and settings inside")
    command.add_overrides(parser)
    return parser  # fmt: skip


def _infer_file(path: Path | None) -> dict[str, Any] | None:
    """Reads a file in the layout of NeMo's controlnet_infer.yaml; None for any other file."""
    if path is None:
        return None
    tree = config.read(path)
    return tree if isinstance(tree.get("infer"), dict) else None


def _filled(parser: argparse.ArgumentParser, argv: Sequence[str] | None, options: dict[str, Any]) -> argparse.Namespace:
    """Parses the arguments, with defaults from the options of a file."""
    lists = {name: value for name, value in options.items() if isinstance(value, list)}  # argparse would append to them
    parser.set_defaults(**{name: value for name, value in options.items() if name not in lists})
    arguments = command.parse(parser, argv)
    for name, value in lists.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    if arguments.prompts:
        arguments.prompt = None if "prompt" in lists else arguments.prompt
    arguments.config = None
    return arguments


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    given = command.parse(parser, argv)
    infer = _infer_file(given.config)
    arguments = given if infer is None else _filled(parser, argv, nemo_options(infer))
    if not arguments.checkpoint:
        parser.error("--checkpoint is not given; expected a run, a folder or a file with a ControlNet")
    if not arguments.hint:
        parser.error("--hint is not given; expected an image, or a folder of them")
    if arguments.prompt and arguments.prompts:
        parser.error("--prompt and --prompts are both given; keep one")
    if arguments.scheduler and arguments.eta:
        parser.error("--eta belongs to the DDIM of this package; leave out --scheduler")
    arguments.hint = [column if isinstance(column, list) else [column] for column in arguments.hint]
    return arguments


def draw(
    work: Sequence[Job], origin: Origin, options: argparse.Namespace, progress: Callable[[Sequence[int]], Any]
) -> str | None:
    """Draws every job and writes grid and images. Returns the reason if an image is blank, else None."""
    check_size(origin.hint(work[0].hints, options.size), origin.factor)  # before weights are loaded, which takes long
    model, conditioning, schedule = origin.models()
    dtype = config.dtype(options.precision, "--precision")
    model, conditioning = model.to(options.device, dtype), conditioning.to(options.device)
    rows, problem = [], None
    for job in work:
        hint = origin.hint(job.hints, options.size)
        request = Request(
            prompt=job.prompt,
            negative_prompt=options.negative_prompt,
            strength=options.strength,
            scales=options.scales,
            guess_mode=options.guess_mode,
            graph=options.graph,
            guidance_scale=options.guidance_scale,
            steps=options.steps,
            eta=options.eta,
            seed=options.seed,
            images=options.num_images,
            scheduler=options.scheduler,
        )
        images, latents = generate(model, conditioning, schedule, hint, request, progress)
        problem = problem or fault(images, latents)
        pixels = to_uint8(images)
        parts = hint.split([reader.channels for reader in origin.readers], dim=1)
        number = f"{job.name}: " if len(work) > 1 else ""
        rows += [(f"{number}hint", to_uint8(part, low=0.0)) for part in parts] + [(f"{number}{job.prompt}", pixels)]
        for i, image in enumerate(pixels if options.images else ()):
            seed = options.seed + i
            save_png(picture(image), options.images / f"{job.name}-{seed}.png", _facts(request, job, options, seed))
    facts = _facts(request, work[-1], options, options.seed)
    if len(work) > 1:
        facts["prompt"] = "\n".join(job.prompt for job in work)
        facts["hint"] = "\n".join(" ".join(map(str, job.hints)) for job in work)
    save_png(grid(rows), options.output, facts)
    return problem


def _facts(request: Request, job: Job, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Collects the settings of an image for its metadata."""
    facts = {**dataclasses.asdict(request), "seed": seed, "hint": " ".join(map(str, job.hints))}
    facts |= {"checkpoint": " ".join(map(str, options.checkpoint)), "precision": options.precision}
    if options.weight:
        facts["weights"] = " ".join(map(str, options.weight))
    return {name: fact for name, fact in facts.items() if fact not in (None, "")}


def main(argv: Sequence[str] | None = None) -> None:
    quiet_libraries()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        require("omegaconf", "tqdm", extra="train", wanted_by="configurations are YAML, and progress is shown")
        from tqdm import tqdm

        arguments = _arguments(argv)
        prompts = read_prompts(arguments.prompts) if arguments.prompts else arguments.prompt or []
        work = jobs(arguments.hint, prompts, len(arguments.checkpoint))
        origin = open_origin(
            arguments.checkpoint,
            config_file=arguments.config,
            base=arguments.base,
            weights=arguments.weight,
            overrides=arguments.overrides,
            average=not arguments.no_average,
        )
        problem = draw(work, origin, arguments, lambda order: tqdm(order, disable=None))
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    if problem is not None:
        sys.exit(f"error: {arguments.output} shows nothing: {problem}")
    print(arguments.output)


if __name__ == "__main__":
    main()
