"""Reads files in the layout of NeMo's controlnet_infer.yaml into options of `python -m controlnet.generate`."""

from pathlib import Path
from typing import Any

from controlnet.config.checks import precision
from controlnet.config.schema import ConfigError, did_you_mean, shown

# Of NeMo's controlnet_infer.yaml: the option that a key of `infer` or `model` sets.
INFER = {
    "prompts": "prompt", "control": "hint", "unconditional_guidance_scale": "guidance_scale",
    "num_images_per_prompt": "num_images", "inference_steps": "steps", "eta": "eta", "seed": "seed",
    "strength": "strength", "guess_mode": "guess_mode", "restore_from_path": "checkpoint", "out_path": "images",
}  # fmt: skip
KINDS: dict[str, tuple[type, ...]] = {
    "unconditional_guidance_scale": (int, float), "num_images_per_prompt": (int,), "inference_steps": (int,),
    "eta": (int, float), "seed": (int,), "strength": (int, float), "guess_mode": (bool,), "restore_from_path": (str,),
    "out_path": (str,), "prompts": (str, list), "control": (str, list), "height": (int,), "width": (int,),
    "hint_image_size": (int,), "sampler_type": (str,),
}  # fmt: skip
# Keys that take one value, which asks for nothing.
ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "control_image_preprocess": ((None,), "hints are given ready-made; python -m controlnet.shards computes some"),
    "output_type": (("pil",), "images are written as PNG"),
    "save_to_file": ((True,), "images are always written"),
}
SILENT = ("down_factor",)  # the first stage decides
SAMPLERS = {"DDIM": None, "UNIPC": "UniPC", "EULER": "Euler"}


def nemo_options(tree: dict[str, Any]) -> dict[str, Any]:
    """Translates the tree of a file in the layout of NeMo's controlnet_infer.yaml into options of generate.

    Raises ConfigError for an unknown key, or one that asks for something that is not done.
    """
    options: dict[str, Any] = {}
    model = {key: value for key, value in (tree.get("model") or {}).items() if key != "precision"}
    for section, keys in (("infer", tree["infer"]), ("model", model)):
        for key, value in keys.items():
            path = f"{section}.{key}"
            if key in ONLY:
                if value not in ONLY[key][0]:
                    raise ConfigError(f"{path} is {shown(value)}; expected {ONLY[key][0][0]}: {ONLY[key][1]}")
            elif key not in (*KINDS, *SILENT):
                raise ConfigError(f"{path} is not a known key{did_you_mean(key, [*KINDS, *ONLY, *SILENT])}")
            elif key in INFER and value is not None:
                options[INFER[key]] = _checked(path, value, KINDS[key])
    infer = tree["infer"]
    side = infer.get("hint_image_size")
    sides = [_checked(f"infer.{key}", value, (int,)) for key in ("width", "height") if (value := infer.get(key, side))]
    if len(sides) == 2:
        options["size"] = tuple(sides)
    sampler = str(infer.get("sampler_type") or "DDIM").upper()
    if sampler not in SAMPLERS:
        raise ConfigError(f"infer.sampler_type is {sampler}; expected one of {', '.join(SAMPLERS)}")
    options["scheduler"] = SAMPLERS[sampler]
    trainer = tree.get("trainer") or {}
    for key in ("devices", "num_nodes"):
        if trainer.get(key, 1) not in (1, "auto", [0]):
            raise ConfigError(f"trainer.{key} is {trainer[key]}; images are drawn by one process: set it to 1")
    if trainer.get("precision") is not None:
        options["precision"] = precision(trainer["precision"])
    for key in ("prompt", "hint"):
        if key in options:
            options[key] = options[key] if isinstance(options[key], list) else [options[key]]
    if "hint" in options:
        options["hint"] = [[Path(path) for path in options["hint"]]]
    if "checkpoint" in options:
        options["checkpoint"] = [Path(options["checkpoint"])]
    if "images" in options:
        options["images"] = Path(options["images"])
    return options


def _checked(path: str, value: Any, kinds: tuple[type, ...]) -> Any:
    fits = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
    if not fits or (isinstance(value, list) and not all(isinstance(item, str) for item in value)):
        raise ConfigError(f"{path} is {shown(value)}; expected {' or '.join(kind.__name__ for kind in kinds)}")
    return value
