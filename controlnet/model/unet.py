"""The U-Net of latent diffusion in two halves, between which a ControlNet attaches: `encode` and `decode`."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cnkernels.nn import GroupNormSiLU
from controlnet.model.architecture import GROUPS, Architecture, UNetArchitecture
from controlnet.model.layers import (
    Downsample,
    Prepared,
    ResBlock,
    Size,
    TimestepEmbedding,
    Upsample,
    conv3x3,
    vector_embedding,
    zeroed,
)
from controlnet.model.transformer import AttentionBlock, CrossAttention, SpatialTransformer

Context = Tensor | Prepared | None  # [N, T, context_dim], or of `Trunk.prepare_context`


def check_shape(name: str, tensor: Tensor | None, *expected: int | str) -> None:
    """Raises ValueError unless the tensor has the expected sizes; a letter stands for any size."""
    if tensor is None:
        raise ValueError(f"{name} is None; expected a tensor [{', '.join(map(str, expected))}]")
    sizes = zip(tensor.shape, expected, strict=False)
    if tensor.dim() != len(expected) or any(want != got for got, want in sizes if not isinstance(want, str)):
        raise ValueError(f"{name} has shape {list(tensor.shape)}; expected [{', '.join(map(str, expected))}]")


class TimestepSequential(nn.Sequential):
    """Layers in sequence; passes timestep embedding, context and output size to the layers that take them."""

    def forward(self, h: Tensor, embedding: Tensor, context: Context, size: Size | None = None) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                h = layer(h, embedding, size)
            elif isinstance(layer, SpatialTransformer):
                h = layer(h, context)
            elif isinstance(layer, Upsample):
                h = layer(h, size)
            else:
                h = layer(h)
        return h


def res_block(arch: Architecture, channels: int, out_channels: int, **resample: bool) -> ResBlock:
    return ResBlock(
        channels,
        out_channels,
        arch.embedding_channels,
        dropout=arch.dropout,
        use_scale_shift_norm=arch.use_scale_shift_norm,
        use_checkpoint=arch.use_checkpoint,
        **resample,
    )


def attention(arch: Architecture, level: int | None, *, decoder: bool = False) -> nn.Module:
    """Builds the attention of a level, or of the middle block (level None)."""
    channels = arch.channels(arch.levels - 1 if level is None else level)
    heads = arch.heads(channels, decoder=decoder)
    options = {"use_flash_attention": arch.use_flash_attention, "use_checkpoint": arch.use_checkpoint}
    if not arch.use_spatial_transformer:
        return AttentionBlock(channels, heads, new_order=arch.use_new_attention_order, **options)
    return SpatialTransformer(
        channels,
        heads,
        arch.depth(level),
        arch.context_dim,
        use_linear=arch.use_linear_in_transformer,
        disable_self_attn=arch.reads_context_only(level),
        **options,
    )


def downsampling(arch: Architecture, channels: int) -> nn.Module:
    if arch.resblock_updown:
        return res_block(arch, channels, channels, down=True)
    return Downsample(channels, arch.conv_resample)


def upsampling(arch: Architecture, channels: int) -> nn.Module:
    if arch.resblock_updown:
        return res_block(arch, channels, channels, up=True)
    return Upsample(channels, arch.conv_resample)


class Trunk(nn.Module):
    """Base class of U-Net and ControlNet: timestep embedding, encoder and middle block."""

    def __init__(self, arch: Architecture):
        super().__init__()
        self.arch = arch
        channels = arch.model_channels
        self.time_embed = TimestepEmbedding(channels, arch.embedding_channels)
        self.label_emb = vector_embedding(arch.adm_in_channels, arch.embedding_channels) if arch.num_classes else None
        self.input_blocks = nn.ModuleList([TimestepSequential(conv3x3(arch.in_channels, channels))])
        self.skip_channels = [channels]  # of the output of each input block
        for level in range(arch.levels):
            for block in range(arch.num_res_blocks[level]):
                layers = [res_block(arch, channels, arch.channels(level))]
                channels = arch.channels(level)
                if arch.has_attention(level, block):
                    layers.append(attention(arch, level))
                self._add_input_block(channels, *layers)
            if level < arch.levels - 1:
                self._add_input_block(channels, downsampling(arch, channels))
        self.middle_block = TimestepSequential(
            res_block(arch, channels, channels), attention(arch, None), res_block(arch, channels, channels)
        )

    def _add_input_block(self, channels: int, *layers: nn.Module) -> None:
        self.input_blocks.append(TimestepSequential(*layers))
        self.skip_channels.append(channels)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, to which inputs are cast."""
        return self.input_blocks[0][0].weight.dtype

    def embed(self, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """Embeds timesteps [N], integer or float, and y [N, adm_in_channels]: returns [N, 4 * model_channels].

        Raises:
            ValueError: y of another shape, missing where the model has `num_classes`, or given where it has not.
        """
        if self.label_emb is None:
            if y is not None:
                raise ValueError(f"y has shape {list(y.shape)}; expected None, as the model has no num_classes")
            return self.time_embed(timesteps)
        check_shape("y", y, timesteps.shape[0], self.arch.adm_in_channels)
        return self.time_embed(timesteps, self.label_emb(y.to(self.dtype)))

    def prepare_context(self, context: Tensor) -> Prepared:
        """Computes the keys and values of a context [N, T, context_dim], to be passed as `context` to many calls.

        They hold until weights change.
        """
        check_shape("context", context, "N", "T", self.arch.context_dim)
        attentions = (m for m in self.modules() if isinstance(m, CrossAttention) and m.reads_context)
        return Prepared({m: m.project_context(context.to(self.dtype)) for m in attentions})

    def _trunk(self, x: Tensor, embedding: Tensor, context: Context, guided_hint: Tensor | None = None) -> list[Tensor]:
        """Returns the outputs of all input blocks, then that of the middle block."""
        first, *blocks = self.input_blocks
        h = first(x.to(self.dtype), embedding, context)
        if guided_hint is not None:
            h = h + guided_hint
        features = [h]
        for block in [*blocks, self.middle_block]:
            h = block(h, embedding, context)
            features.append(h)
        return features

    def _check_inputs(self, x: Tensor, timesteps: Tensor, context: Context) -> None:
        check_shape("x", x, "N", self.arch.in_channels, "H", "W")
        check_shape("timesteps", timesteps, x.shape[0])
        if self.arch.use_spatial_transformer and not isinstance(context, Prepared):
            check_shape("context", context, x.shape[0], "T", self.arch.context_dim)

    def _cast(self, context: Context) -> Context:
        return context.to(self.dtype) if isinstance(context, Tensor) else context


class UNet(Trunk):
    """The noise predictor of latent diffusion.

        h, skips = encode(x, timesteps, context)
        prediction = decode(h, skips, control, timesteps, context)

    Args:
        params: the fields of `UNetArchitecture`, by the names of the original implementation.

    Notes:
        The state_dict has the keys of the original checkpoints, without prefix. The residual blocks' and transformers'
        last layers and the output convolution start at zero, as in the original.
        Ho et al., "Denoising Diffusion Probabilistic Models", 2020; Rombach et al., "High-Resolution Image Synthesis
        with Latent Diffusion Models", 2022.
    """

    __signature__ = inspect.signature(UNetArchitecture)  # of the constructor, for help() and configuration checks

    def __init__(self, **params: Any):
        arch = UNetArchitecture(**params)
        super().__init__(arch)
        channels = arch.channels(arch.levels - 1)
        skip_channels = list(self.skip_channels)
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(arch.levels)):
            for block in range(arch.num_res_blocks[level] + 1):
                layers = [res_block(arch, channels + skip_channels.pop(), arch.channels(level))]
                channels = arch.channels(level)
                if arch.has_attention(level, block):
                    layers.append(attention(arch, level, decoder=True))
                if level > 0 and block == arch.num_res_blocks[level]:
                    layers.append(upsampling(arch, channels))
                self.output_blocks.append(TimestepSequential(*layers))
        self.out = nn.Sequential(
            GroupNormSiLU(GROUPS, channels),
            nn.Identity(),  # SiLU: in the norm
            zeroed(conv3x3(channels, arch.out_channels)),
        )

    def encode(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Context = None,
        *,
        y: Tensor | None = None,
        embedding: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Runs the encoder and the middle block.

        Args:
            x: [N, in_channels, H, W], cast to the dtype of the weights.
            timesteps: [N], integer or float, in the units of training (0 to 999 for Stable Diffusion).
            context: [N, T, context_dim], or `prepare_context` of it; not read without `use_spatial_transformer`.
            y: [N, adm_in_channels], of a model with `num_classes`; not read if embedding is given.
            embedding: `embed` of timesteps and y, if it has been computed before.

        Returns:
            h, the middle block's output, and the skips, the output of each input block: 12 for Stable Diffusion.
        """
        self._check_inputs(x, timesteps, context)
        embedding = self.embed(timesteps, y) if embedding is None else embedding
        *skips, h = self._trunk(x, embedding, self._cast(context))
        return h, skips

    def decode(
        self,
        h: Tensor,
        skips: Sequence[Tensor],
        control: Sequence[Tensor] | None,
        timesteps: Tensor,
        context: Context = None,
        *,
        only_mid_control: bool = False,
        y: Tensor | None = None,
        embedding: Tensor | None = None,
    ) -> Tensor:
        """Runs the decoder on skips[i] + control[i] and h + control[-1].

        Args:
            h, skips: of `encode`.
            control: of `ControlNet.forward`, one tensor for each skip, then one for h; None: no control. Not changed.
            timesteps, context, y, embedding: as in `encode`.
            only_mid_control: add the last of `control` alone.

        Returns:
            The prediction [N, out_channels, H, W], in the dtype of the model (or of autocast).
        """
        if control is not None and len(control) != len(skips) + 1:
            raise ValueError(f"control has {len(control)} tensors; expected {len(skips) + 1}")
        embedding = self.embed(timesteps, y) if embedding is None else embedding
        context = self._cast(context)
        if control is not None:
            h = h + control[-1]
        for block, i in zip(self.output_blocks, reversed(range(len(skips))), strict=True):
            skip = skips[i] if control is None or only_mid_control else skips[i] + control[i]
            size = skips[i - 1].shape[2:]  # output size of an upsampling at the end of the block
            h = block(torch.cat([h, skip], dim=1), embedding, context, size)
        norm, _, conv = self.out
        return conv(norm.later(h))

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Context = None,
        control: Sequence[Tensor] | None = None,
        only_mid_control: bool = False,
        embedding: Tensor | None = None,
        y: Tensor | None = None,
    ) -> Tensor:
        """Runs `encode`, then `decode`, with their arguments."""
        embedding = self.embed(timesteps, y) if embedding is None else embedding
        h, skips = self.encode(x, timesteps, context, embedding=embedding)
        return self.decode(
            h, skips, control, timesteps, context, only_mid_control=only_mid_control, embedding=embedding
        )
