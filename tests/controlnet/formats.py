"""One small Stable Diffusion checkpoint with a ControlNet, written the way each system writes it."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from controlnet.checkpoints import nemo
from controlnet.model.controlnet import ControlNet
from controlnet.model.unet import UNet
from tests.controlnet import tiny, twins

BASE = twins.BASE | {"num_heads": 8, "context_dim": 16}
SD2 = {"num_heads": -1, "num_head_channels": 64, "model_channels": 64, "use_linear_in_transformer": True}
FAMILIES = {"sd15": {}, "sd21": SD2}
HINT = {"hint_channels": 3, "hint_block_channels": (8, 16)}
PREFIXES = {
    "unet": "model.diffusion_model.",
    "control": "control_model.",
    "first_stage": "first_stage_model.",
    "cond_stage": "cond_stage_model.",
}


def unet(seed: int = 1, **params) -> UNet:
    return tiny.randomised(UNet(**BASE | params, out_channels=4), seed)


def control(seed: int = 2, **params) -> ControlNet:
    return tiny.randomised(ControlNet(**BASE | params, **HINT), seed)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def original(*names: str, folder: Path, **params) -> dict[str, Tensor]:
    """The tensors of the named parts under the original's full names; "extras" are those of no part."""
    tensors = {}
    for name in names:
        if name == "extras":
            tensors |= {"betas": torch.rand(5), "model_ema.decay": torch.tensor(0.5)}
            continue
        if name == "first_stage":
            found = tiny.original_vae_names(tiny.vae(), 1)
        elif name == "cond_stage":
            found = tiny.clip_folder(folder / "clip").state_dict()
            found = {f"transformer.text_model.{key.removeprefix('text_model.')}": t for key, t in found.items()}
        else:
            found = state({"unet": unet, "control": control}[name](**params))
        tensors |= {PREFIXES[name] + key: tensor.clone().contiguous() for key, tensor in found.items()}
    return tensors


def open_clip(width=32, layers=2, vocabulary=20, length=12, projection=24):
    """An OpenCLIP text encoder's tensors, by that library's names."""
    generator = torch.Generator().manual_seed(7)
    shapes = {"token_embedding.weight": (vocabulary, width), "positional_embedding": (length, width),
              "ln_final.weight": (width,), "ln_final.bias": (width,), "text_projection": (width, projection),
              "logit_scale": ()}  # fmt: skip
    for layer in range(layers):
        inner = {"attn.in_proj_weight": (3 * width, width), "attn.in_proj_bias": (3 * width,),
                 "attn.out_proj.weight": (width, width), "attn.out_proj.bias": (width,),
                 "mlp.c_fc.weight": (4 * width, width), "mlp.c_fc.bias": (4 * width,),
                 "mlp.c_proj.weight": (width, 4 * width), "mlp.c_proj.bias": (width,)}  # fmt: skip
        inner |= {f"ln_{i}.{kind}": (width,) for i in (1, 2) for kind in ("weight", "bias")}
        shapes |= {f"transformer.resblocks.{layer}.{name}": shape for name, shape in inner.items()}
    return {f"model.{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def to_nemo(tensors: dict[str, Tensor], *, release_1: bool = False) -> dict[str, Tensor]:
    """The original's full names -> NeMo's; the models' own layers renamed, the rest under "model." alone."""
    renamed = {}
    for key, tensor in tensors.items():
        prefix = next((PREFIXES[part] for part in ("unet", "control") if key.startswith(PREFIXES[part])), None)
        if prefix is not None:
            key = prefix + nemo.from_original(key.removeprefix(prefix), release_1=release_1)
        renamed[f"model.{key}"] = tensor
    return renamed


def save(tensors: dict[str, Tensor], path: Path) -> Path:
    save_file(tensors, path)
    return path


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """The same names, and under each the same bits."""
    assert sorted(got) == sorted(want)
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name
