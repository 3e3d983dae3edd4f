"""Attention over the pixels of an image: the spatial transformer, and the attention block of models without context.

Projections take the deferred output of the norm before them, which backward recomputes (`cnkernels.recompute`); output
projections add the residual in the same kernel.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import cnkernels
from cnkernels import recompute
from cnkernels.nn import GroupNormSiLU
from cnkernels.recompute import Later
from controlnet.model.architecture import GROUPS
from controlnet.model.layers import Prepared, checkpointed, zeroed


class Projection(nn.Linear):
    """A linear layer over tokens, which may be deferred (`recompute.Later`), added to a residual, if given."""

    def forward(self, x: Tensor | Later, residual: Tensor | None = None) -> Tensor:
        return recompute.chain(x, recompute.LINEAR, self.weight, self.bias, residual)


class PixelProjection(nn.Linear):
    """A linear layer over the pixels of an image, its weight stored as that of a 1x1 convolution: [out, in, 1, ...].

    The two are the same product; channels_last images need no copy on the way in or out.
    """

    def __init__(self, in_features: int, out_features: int, kernel_dims: int):
        super().__init__(in_features, out_features)
        self.weight = nn.Parameter(self.weight.detach().reshape(out_features, in_features, *[1] * kernel_dims))

    def matrix(self) -> Tensor:
        return self.weight if self.weight.dim() == 2 else self.weight.flatten(1)

    def forward(self, image: Later) -> Tensor:
        """image [N, in, H, W] -> tokens [N, H * W, out]."""
        return recompute.chain(image, recompute.LINEAR, self.matrix(), self.bias)


class PixelProjectionBack(PixelProjection):
    """The output projection: tokens [N, H * W, in], added to an image [N, out, H, W], in its memory format."""

    def forward(self, tokens: Tensor, image: Tensor) -> Tensor:
        return recompute.pixels_add(tokens, self.matrix(), self.bias, image)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, unfused, with the score matrix in memory. q: [N, Sq, H, D]; k, v: [N, Sk, H, D]."""
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
        self.reads_context = context_dim is not None
        if context_dim is None:
            self.packed, self.parts = "to_qkv", ("to_q", "to_k", "to_v")
        else:
            self.packed, self.parts = "to_kv", ("to_k", "to_v")
            self.to_q = Projection(channels, channels, bias=False)
        packed = nn.Linear(context_dim or channels, len(self.parts) * channels, bias=False)
        self.register_parameter(self.packed, packed.weight)
        self.to_out = nn.Sequential(Projection(channels, channels))

    def forward(self, tokens: Later, context: Tensor | Prepared | None, residual: Tensor) -> Tensor:
        """tokens, residual [N, S, channels], context [N, T, context_dim] or None -> [N, S, channels]."""
        if context is None:
            q, k, v = self.project(tokens)
        else:
            q = self.to_q(tokens).unflatten(2, (self.heads, -1))
            k, v = (context[self] if isinstance(context, Prepared) else self.project_context(context)).unbind(2)
        return self.to_out[0](self.attend(q, k, v).flatten(2), residual)

    def project(self, tokens: Later) -> tuple[Tensor, Tensor, Tensor]:
        """Projects tokens to q, k and v [N, S, H, D] for self-attention."""
        packed = recompute.chain(tokens, recompute.LINEAR, self.to_qkv)
        return packed.unflatten(2, (3, self.heads, -1)).unbind(2)

    def project_context(self, context: Tensor) -> Tensor:
        """Projects a context to k and v, [N, T, 2, H, D]."""
        return recompute.linear(context, self.to_kv).unflatten(2, (2, self.heads, -1))

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
        self.proj = Projection(channels, 2 * out_channels)

    def forward(self, x: Later) -> Later:
        return recompute.geglu(self.proj(x))


class FeedForward(nn.Module):
    """GEGLU with four times the width, projected back and added to a residual."""

    def __init__(self, channels: int):
        super().__init__()
        inner = 4 * channels
        # In the original, a dropout of probability 0 stands between the two.
        self.net = nn.ModuleList([GEGLUProjection(channels, inner), nn.Identity(), Projection(inner, channels)])

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

    def forward(self, tokens: Tensor, context: Tensor | Prepared) -> Tensor:
        return checkpointed(self._forward, tokens, context, enabled=self.use_checkpoint)

    def _forward(self, tokens: Tensor, context: Tensor | Prepared) -> Tensor:
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
        self.proj_in = PixelProjection(channels, channels, kernel_dims)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(channels, context_dim, heads, **block_options) for _ in range(depth)
        )
        self.proj_out = zeroed(PixelProjectionBack(channels, channels, kernel_dims))

    def forward(self, x: Tensor, context: Tensor | Prepared) -> Tensor:
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
        self.qkv = PixelProjection(channels, 3 * channels, kernel_dims=1)
        self.proj_out = zeroed(PixelProjectionBack(channels, channels, kernel_dims=1))

    def forward(self, x: Tensor) -> Tensor:
        return checkpointed(self._forward, x, enabled=self.use_checkpoint)

    def _forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm.later(x))
        if self.new_order:
            q, k, v = qkv.unflatten(2, (3, self.heads, -1)).unbind(2)  # [N, S, H, D]
        else:
            q, k, v = qkv.unflatten(2, (self.heads, 3, -1)).unbind(3)
        return self.proj_out(self.attend(q, k, v).flatten(2), x)
