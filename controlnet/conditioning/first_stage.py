"""First stages, which turn images into latents and back: Stable Diffusion's VAE, and one without weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from controlnet import checkpoints
from controlnet.common.extras import require
from controlnet.config import dtype, refuse_unknown

DDCONFIG = (
    "ch", "ch_mult", "num_res_blocks", "z_channels", "in_channels", "out_ch", "attn_resolutions", "resolution",
    "double_z", "dropout",
)  # fmt: skip


class SpaceToDepth(nn.Module):
    """A first stage without weights, for small models: moves each factor x factor square of pixels into the channels.

    Lossless: decode(encode(x)) is x bit for bit, also through `Conditioning` when its scale_factor is a power of two.
    """

    def __init__(self, factor: int):
        super().__init__()
        if not isinstance(factor, int) or factor < 1:
            raise ValueError(f"factor is {factor!r}; expected a positive integer")
        self.factor = factor
        self.latent_channels = 3 * factor**2

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return nn.functional.pixel_unshuffle(images, self.factor)

    def moments(self, images: Tensor) -> Tensor:
        """The latents as [N, 1, C, h, w]: there is no posterior, and so no standard deviation."""
        return self.encode(images).unsqueeze(1)

    def decode(self, latents: Tensor) -> Tensor:
        return nn.functional.pixel_shuffle(latents, self.factor)


class AutoencoderKL(nn.Module):
    """The variational autoencoder of Stable Diffusion, by diffusers.

    It encodes in `precision` and always decodes in float32: in bf16 the pictures lose levels of brightness, and in fp16
    the decoder's activations leave the range of the type, which gives black pictures or NaN.

    Args:
        from_pretrained: a diffusers folder (of the VAE, or of a pipeline, whose `vae` is taken); or a file
            (.safetensors, .bin, .ckpt) with the VAE's weights in diffusers' or the original's layout, or a whole Stable
            Diffusion checkpoint (`first_stage_model.*`). None leaves random weights.
        ddconfig: architecture, by the original's names: ch, ch_mult, num_res_blocks, z_channels, in_channels, out_ch,
            and attn_resolutions, which must be empty. Not read for a folder, which has its own. `resolution` (any size
            works), `double_z` (the encoder always gives mean and variance) and `dropout` (it is never trained) have
            no effect.
        embed_dim: channels of the latent.
        precision: of encoding: "fp32", "fp16" or "bf16" (and their usual spellings). Stable Diffusion's VAE overflows
            in fp16.

    Raises:
        ImportError: diffusers is not installed.
        CheckpointError, FileNotFoundError: the weights cannot be read.
        ValueError: an architecture with attention outside the middle block.
    """

    def __init__(
        self,
        from_pretrained: str | None = None,
        ddconfig: Mapping[str, Any] | None = None,
        embed_dim: int = 4,
        precision: Any = "fp32",
    ):
        super().__init__()
        require("diffusers", extra="diffusers", wanted_by="it has the VAE of Stable Diffusion")
        import diffusers

        folder = _model_folder(from_pretrained, "vae")
        if folder is not None:
            self.vae = diffusers.AutoencoderKL.from_pretrained(folder, local_files_only=True)
        else:
            self.vae = diffusers.AutoencoderKL(**_vae_architecture(ddconfig or {}, embed_dim))
            if from_pretrained is not None:
                self.load(checkpoints.part_tensors(from_pretrained, "first_stage"), from_pretrained)
        self.vae.requires_grad_(False).eval()
        for part in (self.vae.encoder, self.vae.quant_conv):
            if part is not None:
                part.to(dtype(precision, "precision"))
        self.factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.latent_channels = self.vae.config.latent_channels

    def load(self, tensors: Mapping[str, Tensor], origin: str) -> None:
        """Takes the weights, under diffusers' names; `origin` names the file in errors."""
        checkpoints.fill(self.vae, tensors, origin, lambda name: False)

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Samples the posterior: mean + std * noise."""
        mean, std = self.moments(images).unbind(1)
        return mean + std * noise_like(mean, generator)

    def moments(self, images: Tensor) -> Tensor:
        """Returns mean and standard deviation of the posterior, float32 [N, 2, C, h, w]."""
        posterior = self.vae.encode(images.to(self.vae.encoder.conv_in.weight.dtype)).latent_dist
        return torch.stack([posterior.mean.float(), posterior.std.float()], 1)

    def decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents.float()).sample


def noise_like(mean: Tensor, generator: torch.Generator | None) -> Tensor:
    """Normal noise of the shape of `mean`, drawn on the generator's device."""
    device = mean.device if generator is None else generator.device
    return torch.randn(mean.shape, generator=generator, device=device).to(mean.device, non_blocking=True)


def _model_folder(path: str | None, part: str) -> Path | None:
    """Finds the folder with the config.json: the path itself, or its subfolder `part`. None for a file."""
    if path is None or Path(path).is_file():
        return None
    for folder in (Path(path), Path(path) / part):
        if (folder / "config.json").is_file():
            return folder
    if Path(path).exists():
        raise FileNotFoundError(f"the folder {path} has no config.json, nor has its subfolder {part}")
    raise FileNotFoundError(f"nothing at {path}; expected a {part} file or folder")


def _vae_architecture(ddconfig: Mapping[str, Any], embed_dim: int) -> dict[str, Any]:
    """Translates the original's `ddconfig` into diffusers' arguments."""
    for key in ddconfig:
        if key not in DDCONFIG:
            refuse_unknown("ddconfig", key, DDCONFIG)
    if ddconfig.get("attn_resolutions"):
        raise ValueError(
            f"ddconfig.attn_resolutions is {list(ddconfig['attn_resolutions'])}; expected none (attention is in the"
            " middle block alone)"
        )
    if ddconfig.get("z_channels", embed_dim) != embed_dim:
        raise ValueError(f"ddconfig.z_channels is {ddconfig['z_channels']}; expected embed_dim, {embed_dim}")
    mult = list(ddconfig.get("ch_mult", (1, 2, 4, 4)))
    return {
        "in_channels": ddconfig.get("in_channels", 3),
        "out_channels": ddconfig.get("out_ch", 3),
        "latent_channels": embed_dim,
        "block_out_channels": tuple(ddconfig.get("ch", 128) * m for m in mult),
        "layers_per_block": ddconfig.get("num_res_blocks", 2),
        "down_block_types": ("DownEncoderBlock2D",) * len(mult),
        "up_block_types": ("UpDecoderBlock2D",) * len(mult),
    }
