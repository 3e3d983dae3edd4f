"""Checkpoints of wrong names and shapes: each loads or is refused by one CheckpointError, in bounded time.

The files themselves are sound; what is damaged is what the tensors are called and how large they are, from which the
architecture is read. Also their index.json and config.json.
"""

import collections
import json
import random
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import controlnet
from controlnet.checkpoints import CheckpointError
from controlnet.model.controlnet import ControlNet
from controlnet.model.unet import UNet
from tests.controlnet import formats, tiny

_SECONDS = 10.0  # of processor time for models of some hundred tensors
_SHAPE = {"in_channels": 4, "model_channels": 32, "num_res_blocks": 1, "attention_resolutions": [2], "num_heads": 2,
          "channel_mult": [1, 1], "use_spatial_transformer": True, "context_dim": 8, "legacy": False}  # fmt: skip
_XL = {"num_classes": "sequential", "adm_in_channels": 12, "use_linear_in_transformer": True}
_PIECES = (
    "0", "1", "7", "99", "123456789", "9" * 5000, "-1", "", "op", "weight", "down_blocks", "middle_block", "\u0660",
)  # fmt: skip
_MARKS = (
    "difference", "lora_controlnet", "label_emb.0.0.weight", "control_model.zero_convs.0.0.bias",
    "text_projection.weight", "conditioner.embedders.1.model.text_projection", "_orig_mod", "module.",
)  # fmt: skip


def seeds() -> list[dict[str, Tensor]]:
    """The tensors of a U-Net, of a ControlNet and of both together, with and without the vector of SDXL."""
    found = []
    for more in ({}, _XL):
        unet = UNet(**_SHAPE | more, out_channels=4).state_dict()
        control = ControlNet(**_SHAPE | more, hint_channels=3, hint_block_channels=[8, 16]).state_dict()
        both = {f"model.diffusion_model.{name}": t for name, t in unet.items()}
        both |= {f"control_model.{name}": t for name, t in control.items()}
        found += [unet, control, both]
    found[-1] |= {f"first_stage_model.{name}": t for name, t in tiny.original_vae_names(tiny.vae(), 1).items()}
    found[-1] |= {f"conditioner.embedders.1.{name}": tensor for name, tensor in formats.open_clip().items()}
    return [{name: tensor.clone() for name, tensor in tensors.items()} for tensors in found]


def mutated(tensors: dict[str, Tensor], rng: random.Random) -> dict[str, Tensor]:
    """Some names changed in one piece, dropped, doubled or added, some shapes changed."""
    tensors = dict(tensors)
    for _ in range(rng.choice((1, 1, 2, 8, 40))):
        name, kind = rng.choice(sorted(tensors)), rng.randrange(6)
        if kind == 0 and len(tensors) > 1:
            del tensors[name]
        elif kind <= 2:
            pieces = name.split(".")
            pieces[rng.randrange(len(pieces))] = rng.choice(_PIECES)
            tensors[".".join(pieces)] = tensors.pop(name) if kind == 1 else tensors[name].clone()
        elif kind == 3:
            tensors[name] = torch.zeros([rng.choice((0, 1, 2, 3, 32, 33, 64)) for _ in range(rng.randrange(5))])
        else:
            huge = torch.zeros(0, 1 << 40) if rng.random() < 0.5 else torch.zeros(1 << 40, 0, 3, 3)
            tensors[rng.choice((*_MARKS, name))] = huge if kind == 4 else torch.zeros(rng.choice((0, 1, 12)), 1)
    return tensors


def attempt(path: Path, target: Path, format: str) -> str:
    """What loading and converting come to."""
    begin, outcome = time.process_time(), "loaded"
    try:
        controlnet.load(path)
        controlnet.convert(path, target, format)
    except CheckpointError:
        outcome = "refused"
    except Exception:
        outcome = "raised"
    return "hung" if time.process_time() - begin > _SECONDS else outcome


def damaged_json(text: str, rng: random.Random) -> str:
    """A config.json or index.json with a value of another kind, or characters changed."""
    if rng.random() < 0.3:
        place = rng.randrange(len(text))
        return text[:place] + rng.choice(('"', "{", "[" * 9999, "", "\0", "1e999", "null")) + text[place + 1 :]
    tree = json.loads(text)
    key = rng.choice(sorted(tree))
    tree[key] = rng.choice((None, -1, 0, 1e30, "x", [], [0], [None], {}, [[1, 2]], [5] * 40, True, 1 << 70))
    return json.dumps(tree)


def campaign(rounds: int, seed: int) -> dict[str, int]:
    counts: collections.Counter[str] = collections.Counter()
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        good = seeds()
        save_file(good[1], folder / "good.safetensors")
        controlnet.convert(folder / "good.safetensors", folder / "model", "diffusers")
        config = (folder / "model" / "config.json").read_text()
        for number in range(rounds):
            format = rng.choice(("original", "nemo", "diffusers"))
            target = folder / (f"{number}" if format == "diffusers" else "x.safetensors")
            path = folder / "model"
            if rng.random() < 0.2:
                (path / "config.json").write_text(damaged_json(config, rng), encoding="utf-8")
            else:
                path = folder / "mutated.safetensors"
                save_file(mutated(rng.choice(good), rng), path)
            counts[attempt(path, target, format)] += 1
    return dict(counts)
