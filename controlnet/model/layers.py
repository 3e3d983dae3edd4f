"""The convolutional blocks of the U-Net: timestep embedding, residual block, resampling.

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

from cnkernels import recompute
from cnkernels.nn import GroupNormSiLU
from cnkernels.recompute import Later
from controlnet.model.architecture import GROUPS

Size = tuple[int, int]


class Prepared(dict[nn.Module, Any]):
    """Keys and values of a context by cross-attention layer, computed once and passed in the context's place."""


class Conv2d(nn.Conv2d):
    """nn.Conv2d that saves its input only if its weight is trained, and recomputes a deferred input in backward."""

    def forward(self, x: Tensor | Later) -> Tensor:
        return recompute.chain(x, recompute.ConvProduct(self.stride[0], self.padding[0]), self.weight, self.bias)


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> Conv2d:
    return Conv2d(in_channels, out_channels, 3, stride, padding=1)


class Conv1x1Add(nn.Conv2d):
    """A 1x1 convolution whose result is added to a residual by the same kernel."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return recompute.conv1x1_add(x, self.weight, self.bias, residual)


def zeroed(module: nn.Module) -> nn.Module:
    """Sets all parameters of the module to zero; returns it."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def checkpointed(function: Callable[..., Tensor], *args: Any, enabled: bool, dropout: float = 0.0) -> Tensor:
    """Calls function(*args), with activation checkpointing if enabled; keeps random state only for dropout."""
    if enabled and torch.is_grad_enabled():
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=dropout > 0)
    return function(*args)


class TimestepEmbedding(nn.Sequential):
    """SiLU(MLP([cos(t f), sin(t f)]) + added) with frequencies f_i = 10000^(-i / half), half = channels / 2.

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
        """Moves or casts the module. The frequencies move with the weights, but stay float32."""
        super()._apply(fn, recurse)
        self._place_frequencies()
        return self

    def forward(self, timesteps: Tensor, added: Tensor | None = None) -> Tensor:
        """timesteps [N], added [N, embedding_channels] -> [N, embedding_channels] in the dtype of the weights."""
        angles = timesteps.float()[:, None] * self.frequencies  # [N, half]
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=1)
        embedding = super().forward(sinusoids.to(self[0].weight.dtype))
        return F.silu(embedding if added is None else embedding + added)


def sinusoids(values: Tensor, channels: int) -> Tensor:
    """Returns [cos(v f), sin(v f)] of each value, float32, with the frequencies of `TimestepEmbedding`.

    Stable Diffusion XL's vector y is the pooled prompt and, with 256 channels, the sinusoids of the original size, the
    crop's corner and the target size, each (height, width) or (top, left).

    Args:
        values: [N, K], integer or float.
        channels: even; of the sinusoids of one value.

    Returns:
        [N, K * channels].
    """
    index = torch.arange(channels // 2, dtype=torch.float32, device=values.device)
    angles = values.float()[..., None] * torch.exp(-math.log(10000) * index / (channels // 2))  # [N, K, channels / 2]
    return torch.cat([angles.cos(), angles.sin()], dim=-1).flatten(1)


def vector_embedding(channels: int, embedding_channels: int) -> nn.Sequential:
    """Builds the MLP that embeds the vector y, the original's `label_emb`, in its nesting."""
    layers = nn.Linear(channels, embedding_channels), nn.SiLU(), nn.Linear(embedding_channels, embedding_channels)
    return nn.Sequential(nn.Sequential(*layers))


class Downsample(nn.Module):
    """Halves the resolution by a strided convolution (rounds up), or with use_conv=False by pooling (rounds down)."""

    def __init__(self, channels: int, use_conv: bool):
        super().__init__()
        self.op = conv3x3(channels, channels, stride=2) if use_conv else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Nearest-neighbour upsampling to a given size, then a convolution if use_conv.

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
        self.skip_connection = nn.Identity() if channels == out_channels else Conv1x1Add(channels, out_channels)

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
        """Second half of the residual branch. embedding: [N, out_channels], or twice that with use_scale_shift_norm."""
        norm, _, dropout, conv = self.out_layers
        if self.use_scale_shift_norm:
            scale, shift = embedding[:, :, None, None].chunk(2, dim=1)
            h = recompute.silu(norm(h) * (1 + scale) + shift)
        else:
            h = norm.later(h, embedding)
        return conv(dropout(h.now()) if self.dropout > 0 else h)
