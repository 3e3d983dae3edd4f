"""The blocks of the U-Net: timestep embedding, residual block, transformer, attention block, resampling.

Modules carry the names of the original latent-diffusion code, so that its checkpoints load as they are. Where a module
of the original is computed elsewhere here, an `nn.Identity` keeps its place in the numbering.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import cnkernels
from cnkernels import layout, recompute
from cnkernels.nn import GroupNormSiLU
from cnkernels.recompute import Later
from controlnet.architecture import GROUPS

Size = tuple[int, int]


class Conv2d(nn.Conv2d):
    """nn.Conv2d with square strides that keeps its input only for the gradient of its weight, and no promised input."""

    def forward(self, x: Tensor | Later) -> Tensor:
        return recompute.chain(x, recompute.Conv(self.stride[0], self.padding[0]), self.weight, self.bias)


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> Conv2d:
    return Conv2d(in_channels, out_channels, 3, stride, padding=1)


class Conv1x1(nn.Conv2d):
    """A 1x1 convolution added to a residual."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return recompute.conv1x1_add(x, self.weight, self.bias, residual)


class Linear(nn.Linear):
    """nn.Linear, whose input may be promised."""

    def forward(self, x: Tensor | Later) -> Tensor:
        return recompute.chain(x, recompute.Linear(), self.weight, self.bias)


class LinearAdd(nn.Linear):
    """A linear layer over tokens, added to a residual."""

    def forward(self, x: Tensor | Later, residual: Tensor) -> Tensor:
        return recompute.chain(x, recompute.LinearAdd(), self.weight, self.bias, residual)


def zeroed(module: nn.Module) -> nn.Module:
    """The module, with all its parameters set to zero."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def checkpointed(function: Callable[..., Tensor], *args: Any, enabled: bool, dropout: float = 0.0) -> Tensor:
    """function(*args), recomputed in backward if enabled. Random state is restored only where dropout draws on it."""
    if enabled and torch.is_grad_enabled():
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=dropout > 0)
    return function(*args)


class TimestepEmbedding(nn.Sequential):
    """SiLU(MLP([cos(t f), sin(t f)])) with frequencies f_i = 10000^(-i / half), half = channels / 2.

    The sinusoids are computed in float32 whatever the dtype of the weights: bfloat16 cannot tell t = 999 from 1000. The
    last SiLU stands at the head of every residual block in the original; it is applied here, once for all of them.

    Args:
        channels: even; the width of the sinusoidal embedding.
        embedding_channels: the width of the result.
    """

    def __init__(self, channels: int, embedding_channels: int):
        super().__init__(
            nn.Linear(channels, embedding_channels), nn.SiLU(), nn.Linear(embedding_channels, embedding_channels)
        )
        self.half = channels // 2
        self.register_buffer("frequencies", None, persistent=False)
        self.register_load_state_dict_post_hook(TimestepEmbedding._place_frequencies)
        self._place_frequencies()

    def _place_frequencies(self, *_: Any) -> None:
        index = torch.arange(self.half, dtype=torch.float32, device=self[0].weight.device)
        self.frequencies = torch.exp(-math.log(10000) * index / self.half)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Move or cast the module; the frequencies move with the weights, and stay float32 when those are cast."""
        super()._apply(fn, recurse)
        self._place_frequencies()
        return self

    def forward(self, timesteps: Tensor) -> Tensor:
        """[N] -> [N, embedding_channels] in the dtype of the weights."""
        angles = timesteps.float()[:, None] * self.frequencies  # [N, half]
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=1)
        return F.silu(super().forward(sinusoids.to(self[0].weight.dtype)))


class Downsample(nn.Module):
    """Halve the resolution, rounding up (a strided convolution) or down (average pooling, when use_conv is False)."""

    def __init__(self, channels: int, use_conv: bool):
        super().__init__()
        self.op = conv3x3(channels, channels, stride=2) if use_conv else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Nearest neighbour to a given size, then a convolution if use_conv.

    The size is that of the skip to be joined, hence twice the input's, or one less where the encoder met an odd size.
    """

    def __init__(self, channels: int, use_conv: bool):
        super().__init__()
        self.conv = conv3x3(channels, channels) if use_conv else nn.Identity()

    def forward(self, x: Tensor, size: Size) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class ResBlock(nn.Module):
    """skip(x) + conv(SiLU(GN(conv(SiLU(GN(x))) + linear(embedding)))).

    Args:
        channels, out_channels: of input and output; where they differ, skip is a 1x1 convolution.
        embedding_channels: of the timestep embedding.
        dropout: probability, before the last convolution.
        use_scale_shift_norm: GN(h) * (1 + scale) + shift, with scale and shift from the embedding, instead of
            GN(h + linear(embedding)).
        up, down: change the resolution, of both branches, after the first activation.
        use_checkpoint: recompute the activations in backward.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        embedding_channels: int,
        *,
        dropout: float = 0.0,
        use_scale_shift_norm: bool = False,
        up: bool = False,
        down: bool = False,
        use_checkpoint: bool = False,
    ):
        super().__init__()
        self.dropout = dropout
        self.use_scale_shift_norm = use_scale_shift_norm
        self.up = up
        self.down = down
        self.use_checkpoint = use_checkpoint
        self.in_layers = nn.Sequential(
            GroupNormSiLU(GROUPS, channels),
            nn.Identity(),  # SiLU: in the norm
            conv3x3(channels, out_channels),
        )
        self.emb_layers = nn.Sequential(
            nn.Identity(),  # SiLU: in TimestepEmbedding
            nn.Linear(embedding_channels, 2 * out_channels if use_scale_shift_norm else out_channels),
        )
        self.out_layers = nn.Sequential(
            GroupNormSiLU(GROUPS, out_channels, activation=None if use_scale_shift_norm else "silu"),
            nn.Identity(),  # SiLU: in the norm, or after scale and shift
            nn.Dropout(dropout),
            zeroed(conv3x3(out_channels, out_channels)),
        )
        self.skip_connection = nn.Identity() if channels == out_channels else Conv1x1(channels, out_channels)

    def forward(self, x: Tensor, embedding: Tensor, size: Size | None = None) -> Tensor:
        """x [N, channels, H, W], embedding [N, embedding_channels], size: of the output if `up`."""
        return checkpointed(self._forward, x, embedding, size, enabled=self.use_checkpoint, dropout=self.dropout)

    def _forward(self, x: Tensor, embedding: Tensor, size: Size | None) -> Tensor:
        norm, _, conv = self.in_layers
        if self.down:
            h, x = conv(F.avg_pool2d(norm(x), 2)), F.avg_pool2d(x, 2)
        elif self.up:
            h, x = (F.interpolate(t, size=size, mode="nearest") for t in (norm(x), x))
            h = conv(h)
        else:
            h = conv(norm.later(x))
        h = self._second(h, self.emb_layers(embedding))
        return h + x if isinstance(self.skip_connection, nn.Identity) else self.skip_connection(x, h)

    def _second(self, h: Tensor, embedding: Tensor) -> Tensor:
        """The second half of the residual branch; embedding [N, out_channels], or twice with use_scale_shift_norm."""
        norm, _, dropout, conv = self.out_layers
        if self.use_scale_shift_norm:
            scale, shift = embedding[:, :, None, None].chunk(2, dim=1)
            h = recompute.silu(norm(h) * (1 + scale) + shift)
        else:
            h = norm.later(h, embedding)
        return conv(dropout(h.now()) if self.dropout > 0 else h)


class TokenLinear(nn.Linear):
    """A linear layer over the pixels of an image, its weight stored as that of a 1x1 convolution: [out, in, 1, ...].

    The two are the same product; channels_last images need no copy on the way in or out.
    """

    def __init__(self, in_features: int, out_features: int, kernel_dims: int):
        super().__init__(in_features, out_features)
        self.weight = nn.Parameter(self.weight.detach().reshape(out_features, in_features, *[1] * kernel_dims))

    def forward(self, image: Later) -> Tensor:
        """image [N, in, H, W] -> tokens [N, H * W, out]."""
        return recompute.chain(image, recompute.Linear(), self.weight.flatten(1), self.bias)


class TokenLinearAdd(TokenLinear):
    """The way back: tokens [N, H * W, in] added to an image [N, out, H, W], in its memory format."""

    def forward(self, tokens: Tensor, image: Tensor) -> Tensor:
        x = tokens.unflatten(1, image.shape[2:]).permute(0, 3, 1, 2)
        weight = self.weight.flatten(1)[:, :, None, None]
        return recompute.conv1x1_add(layout.match(x, image), weight, self.bias, image)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for q [N, Sq, H, D] and k, v [N, Sk, H, D], with the score matrix in memory."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [N, H, S, D]
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)  # [N, H, Sq, Sk]
    return (scores.softmax(dim=-1) @ v).transpose(1, 2)


def attention_function(use_flash_attention: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return cnkernels.attention if use_flash_attention else softmax_attention


class CrossAttention(nn.Module):
    """Multi-head attention of tokens to a context, or to themselves (context_dim None), added to a residual.

    What reads one tensor is one product: the weights of q, k and v, or of k and v alone, are one parameter, `to_qkv` or
    `to_kv`. The state_dict has them apart, as `to_q.weight`, `to_k.weight` and `to_v.weight`, views of it.
    """

    def __init__(self, channels: int, context_dim: int | None, heads: int, use_flash_attention: bool):
        super().__init__()
        self.heads = heads
        self.attend = attention_function(use_flash_attention)
        if context_dim is None:
            self.packed, self.parts = "to_qkv", ("to_q", "to_k", "to_v")
        else:
            self.packed, self.parts = "to_kv", ("to_k", "to_v")
            self.to_q = Linear(channels, channels, bias=False)
        packed = nn.Linear(context_dim or channels, len(self.parts) * channels, bias=False)
        self.register_parameter(self.packed, packed.weight)
        self.to_out = nn.Sequential(LinearAdd(channels, channels))

    def forward(self, tokens: Later, context: Tensor | None, residual: Tensor) -> Tensor:
        """tokens, residual [N, S, channels], context [N, T, context_dim] or None -> [N, S, channels]."""
        if context is None:
            packed = recompute.chain(tokens, recompute.Linear(), self.to_qkv)
            q, k, v = packed.unflatten(2, (3, self.heads, -1)).unbind(2)  # [N, S, H, D]
        else:
            q = self.to_q(tokens).unflatten(2, (self.heads, -1))
            k, v = F.linear(context, self.to_kv).unflatten(2, (2, self.heads, -1)).unbind(2)
        return self.to_out[0](self.attend(q, k, v).flatten(2), residual)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        views = destination.pop(prefix + self.packed).chunk(len(self.parts))
        destination.update({f"{prefix}{part}.weight": view for part, view in zip(self.parts, views, strict=True)})

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        views = getattr(self, self.packed).detach().chunk(len(self.parts))
        own = {f"{prefix}{part}.weight": view for part, view in zip(self.parts, views, strict=True)}
        given = {key: state_dict.pop(key) for key in own if key in state_dict}
        missing += [key for key in own if key not in given] if strict else []
        for key, tensor in given.items():
            if tensor.shape != own[key].shape:
                found, expected = list(tensor.shape), list(own[key].shape)
                errors.append(f"size mismatch for {key}: the checkpoint has {found}, the model {expected}.")
                given[key] = own[key]
        state_dict[prefix + self.packed] = torch.cat([given.get(key, tensor) for key, tensor in own.items()])
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)


class GEGLUProjection(nn.Module):
    """value * GELU(gate), both linear in the input."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.proj = Linear(channels, 2 * out_channels)

    def forward(self, x: Later) -> Later:
        return recompute.geglu(self.proj(x))


class FeedForward(nn.Module):
    """GEGLU to four times the width, and back, added to a residual."""

    def __init__(self, channels: int):
        super().__init__()
        inner = 4 * channels
        # In the original, a dropout of probability 0 stands between the two.
        self.net = nn.ModuleList([GEGLUProjection(channels, inner), nn.Identity(), LinearAdd(inner, channels)])

    def forward(self, x: Later, residual: Tensor) -> Tensor:
        gated, _, out = self.net
        return out(gated(x), residual)


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each after a layer norm and added to its input.

    With disable_self_attn the first attention reads the context, too.
    """

    def __init__(
        self,
        channels: int,
        context_dim: int,
        heads: int,
        *,
        disable_self_attn: bool = False,
        use_flash_attention: bool = False,
        use_checkpoint: bool = False,
    ):
        super().__init__()
        self.disable_self_attn = disable_self_attn
        self.use_checkpoint = use_checkpoint
        attn1_dim = context_dim if disable_self_attn else None
        self.attn1 = CrossAttention(channels, attn1_dim, heads, use_flash_attention)
        self.ff = FeedForward(channels)
        self.attn2 = CrossAttention(channels, context_dim, heads, use_flash_attention)
        self.norm1 = nn.LayerNorm(channels)
        self.norm2 = nn.LayerNorm(channels)
        self.norm3 = nn.LayerNorm(channels)

    def forward(self, tokens: Tensor, context: Tensor) -> Tensor:
        return checkpointed(self._forward, tokens, context, enabled=self.use_checkpoint)

    def _forward(self, tokens: Tensor, context: Tensor) -> Tensor:
        later = recompute.layer_norm
        tokens = self.attn1(later(self.norm1, tokens), context if self.disable_self_attn else None, tokens)
        tokens = self.attn2(later(self.norm2, tokens), context, tokens)
        return self.ff(later(self.norm3, tokens), tokens)


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of an image, added to it.

    Args:
        channels, heads, depth, context_dim: width, attention heads, number of blocks, features of the context.
        use_linear: proj_in and proj_out are stored as linear layers, not as 1x1 convolutions.
        block_options: of `BasicTransformerBlock`.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        depth: int,
        context_dim: int,
        *,
        use_linear: bool = False,
        **block_options: bool,
    ):
        super().__init__()
        kernel_dims = 0 if use_linear else 2
        self.norm = GroupNormSiLU(GROUPS, channels, eps=1e-6, activation=None)
        self.proj_in = TokenLinear(channels, channels, kernel_dims)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(channels, context_dim, heads, **block_options) for _ in range(depth)
        )
        self.proj_out = zeroed(TokenLinearAdd(channels, channels, kernel_dims))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x [N, C, H, W], context [N, T, context_dim]."""
        tokens = self.proj_in(self.norm.later(x))
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return self.proj_out(tokens, x)


class AttentionBlock(nn.Module):
    """Self-attention over the pixels of an image, added to it: the attention of a model that has no context.

    Args:
        channels, heads: width and attention heads.
        new_order: the qkv channels are ordered [3, heads, head_dim]; else [heads, 3, head_dim].
        use_flash_attention, use_checkpoint: as in the transformer.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        *,
        new_order: bool,
        use_flash_attention: bool = False,
        use_checkpoint: bool = False,
    ):
        super().__init__()
        self.heads = heads
        self.new_order = new_order
        self.use_checkpoint = use_checkpoint
        self.attend = attention_function(use_flash_attention)
        self.norm = GroupNormSiLU(GROUPS, channels, activation=None)
        self.qkv = TokenLinear(channels, 3 * channels, kernel_dims=1)
        self.proj_out = zeroed(TokenLinearAdd(channels, channels, kernel_dims=1))

    def forward(self, x: Tensor) -> Tensor:
        return checkpointed(self._forward, x, enabled=self.use_checkpoint)

    def _forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm.later(x))
        if self.new_order:
            q, k, v = qkv.unflatten(2, (3, self.heads, -1)).unbind(2)  # [N, S, H, D]
        else:
            q, k, v = qkv.unflatten(2, (self.heads, 3, -1)).unbind(3)
        return self.proj_out(self.attend(q, k, v).flatten(2), x)


class TimestepSequential(nn.Sequential):
    """Layers in sequence, each given what it takes of the timestep embedding, the context and the size to reach."""

    def forward(self, h: Tensor, embedding: Tensor, context: Tensor | None, size: Size | None = None) -> Tensor:
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
