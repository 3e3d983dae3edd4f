"""Drop-in classes for the encoder and decoder of diffusers' AutoencoderKL, with fused group norms."""

import torch
from diffusers.models.autoencoders import vae
from torch import Tensor, nn
from torch.nn import functional as F

import cnkernels
from controlnet.diffusers.watch import Watch


class _Accelerated:
    """What both share: their blocks, computed here as long as they are what AutoencoderKL makes them."""

    OWN = ("_watch", "_plain", "_was_contiguous")  # attributes of instances
    _watch: Watch | None = None

    @torch.compiler.disable
    def _serves(self) -> bool:
        if self._watch is None or not self._watch.unchanged():
            self._watch = Watch(self)
            self._plain = self._watch.foreign() is None and _is_plain(self)
        return self._plain and self._watch.feature() is None

    def _finish(self, h: Tensor) -> Tensor:
        return self.conv_out(_norm(self.conv_norm_out, h, "silu"))

    def __getstate__(self):
        return {key: value for key, value in vars(self).items() if key not in self.OWN[:2]}


class Encoder(_Accelerated, vae.Encoder):
    """`diffusers.models.autoencoders.vae.Encoder`, faster."""

    def forward(self, sample: Tensor) -> Tensor:
        """Images [N, 3, H, W] -> moments [N, 2 * latent_channels, H / 8, W / 8]."""
        if not self._serves():
            return super().forward(sample)
        h = self.conv_in(sample.contiguous(memory_format=torch.channels_last))
        for block in self.down_blocks:
            for resnet in block.resnets:
                h = _resnet(resnet, h)
            for downsampler in block.downsamplers or ():
                h = downsampler.conv(F.pad(h, (0, 1, 0, 1)))
        return self._finish(_middle(self.mid_block, h))


class Decoder(_Accelerated, vae.Decoder):
    """`diffusers.models.autoencoders.vae.Decoder`, faster."""

    def forward(self, sample: Tensor, latent_embeds: Tensor | None = None) -> Tensor:
        """Latents [N, latent_channels, h, w] -> images [N, 3, 8 * h, 8 * w]."""
        if latent_embeds is not None or not self._serves():
            return super().forward(sample, latent_embeds)
        h = self.conv_in(sample.contiguous(memory_format=torch.channels_last))
        h = _middle(self.mid_block, h)
        for block in self.up_blocks:
            for resnet in block.resnets:
                h = _resnet(resnet, h)
            for upsampler in block.upsamplers or ():
                h = upsampler.conv(F.interpolate(h, scale_factor=2.0, mode="nearest"))
        return self._finish(h)


DROP_INS = {vae.Encoder: Encoder, vae.Decoder: Decoder}


def _is_plain(module: nn.Module) -> bool:
    """Whether the blocks are those of an AutoencoderKL without options: SiLU, no timestep, convolutions to resample."""
    names = {type(child).__name__ for child in module.modules()} - {type(module).__name__}
    known = "DownEncoderBlock2D UpDecoderBlock2D UNetMidBlock2D ResnetBlock2D Attention Downsample2D Upsample2D"
    torch_known = "ModuleList Conv2d GroupNorm Linear SiLU Dropout"
    blocks = [child for child in module.modules() if type(child).__name__ == "ResnetBlock2D"]
    samplers = [child for child in module.modules() if type(child).__name__ in ("Downsample2D", "Upsample2D")]
    plain_blocks = all(
        isinstance(block.nonlinearity, nn.SiLU)
        and block.time_emb_proj is None
        and block.output_scale_factor == 1
        and block.upsample is None
        and block.downsample is None
        for block in blocks
    )
    plain_samplers = all(sampler.use_conv and getattr(sampler, "padding", 0) == 0 for sampler in samplers)
    return names <= {*known.split(), *torch_known.split()} and plain_blocks and plain_samplers


def _norm(norm: nn.GroupNorm, x: Tensor, activation: str | None) -> Tensor:
    return cnkernels.group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps, activation)


def _resnet(block: nn.Module, x: Tensor) -> Tensor:
    h = block.conv1(_norm(block.norm1, x, "silu"))
    h = block.conv2(_norm(block.norm2, h, "silu"))
    return h + (x if block.conv_shortcut is None else block.conv_shortcut(x))


def _middle(block: nn.Module, h: Tensor) -> Tensor:
    first, *rest = block.resnets
    h = _resnet(first, h)
    for attention, resnet in zip(block.attentions, rest, strict=True):
        h = h if attention is None else _attend(attention, h)
        h = _resnet(resnet, h)
    return h


def _attend(block: nn.Module, x: Tensor) -> Tensor:
    """Self-attention over the pixels, added to them."""
    tokens = _norm(block.group_norm, x, None).permute(0, 2, 3, 1).flatten(1, 2)  # [N, S, C]
    q, k, v = (layer(tokens).unflatten(2, (block.heads, -1)) for layer in (block.to_q, block.to_k, block.to_v))
    out = block.to_out[0](cnkernels.attention(q, k, v).flatten(2))
    return x + out.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
