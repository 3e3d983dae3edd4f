"""Layers of diffusers' blocks: ordinary ones are computed by cnkernels, any other is called as a module.

With gradients, layers are chained by `cnkernels.recompute`, which saves less for backward.
"""

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cnkernels
from cnkernels import recompute
from cnkernels.recompute import Later
from controlnet.diffusers import checks, memo


def group_norm(norm: nn.GroupNorm, x: Tensor, activation: str | None = None) -> Tensor:
    own = norm._parameters
    return cnkernels.group_norm_silu(x, norm.num_groups, own["weight"], own["bias"], norm.eps, activation)


def norm_conv(
    norm: nn.GroupNorm, conv: nn.Module, x: Tensor, addend: Tensor | None, dropout: nn.Module | None
) -> Tensor:
    """conv(dropout(silu(norm(x + addend[:, :, None, None])))); no dropout for None."""
    normed = recompute.group_norm_silu(norm, x, addend)
    return conv_of(conv, normed) if dropout is None else conv(dropout(normed.now()))


def conv_of(conv: nn.Module, x: Later) -> Tensor:
    if not checks.plain_conv(conv):
        return conv(x.now())
    own = conv._parameters
    return recompute.chain(x, recompute.ConvProduct(conv.stride[0], conv.padding[0]), own["weight"], own["bias"])


def linear(layer: nn.Module, x: Tensor | Later) -> Tensor:
    if not checks.plain(layer, nn.Linear):
        return layer(x.now() if isinstance(x, Later) else x)
    own = layer._parameters
    return recompute.chain(x, recompute.LINEAR, own["weight"], own["bias"])


def linear_add(layer: nn.Module, x: Tensor | Later, residual: Tensor) -> Tensor:
    """layer(x) + residual, for tokens [N, S, C]."""
    own = layer._parameters
    if not checks.plain(layer, nn.Linear) or residual.dtype != own["weight"].dtype:
        return linear(layer, x) + residual
    return recompute.chain(x, recompute.LINEAR, own["weight"], own["bias"], residual)


def conv_add(conv: nn.Module, x: Tensor, residual: Tensor) -> Tensor:
    """conv(x) + residual."""
    if not checks.pointwise(conv) or residual.dtype != conv.weight.dtype:
        return conv(x) + residual
    return recompute.conv1x1_add(x, conv.weight, conv.bias, residual)


def tokens(image: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, H * W, C], a view if channels_last."""
    return image.permute(0, 2, 3, 1).flatten(1, 2)


def image(rows: Tensor, like: Tensor) -> Tensor:
    """[N, H * W, C] -> [N, C, H, W] of like's size: a channels_last view."""
    return rows.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2)


class Shared:
    """State that the blocks of one model share.

    Attributes:
        warned: the reasons for which a block ran diffusers' own code and that were warned of.
        blocks: those with a `time_emb_proj` of the timestep embedding.
    """

    def __init__(self, blocks: Sequence[nn.Module] = ()):
        self.warned: set[str] = set()
        self.blocks = list(blocks)
        self._latest = threading.local()

    def __reduce__(self) -> tuple[Any, ...]:
        return Shared, (), {"blocks": self.blocks}

    def projection(self, block: nn.Module, temb: Tensor) -> Tensor:
        """The block's time_emb_proj of silu(temb), [N, D] -> [N, C]. Without gradients, one product for all blocks."""
        if not (torch.is_grad_enabled() or torch.compiler.is_compiling() or temb.is_inference()):
            state = temb._version, memo.keeps(temb)  # what was computed before a recording is not a part of it
            latest = getattr(self._latest, "rows", None)
            if latest is None or latest[0] is not temb or latest[1] != state:
                latest = self._latest.rows = (temb, state, self._project(temb))
            row = latest[2].pop(block, None)
            if row is not None:
                return row
        return linear(block.time_emb_proj, temb if block.skip_time_act else F.silu(temb))

    def _project(self, temb: Tensor) -> dict[nn.Module, Tensor]:
        """The rows of all blocks whose projection is an ordinary layer."""
        layers = {block: block._modules.get("time_emb_proj") for block in self.blocks if not block.skip_time_act}
        layers = {b: m for b, m in layers.items() if checks.plain(m, nn.Linear) and m.bias is not None}
        if not layers or (temb.is_cuda and torch.cuda.is_current_stream_capturing() and not memo.keeps(temb)):
            return {}
        weights, biases = ([m._parameters[name] for m in layers.values()] for name in ("weight", "bias"))
        weight, bias = memo.keep(self, weights + biases, lambda: (torch.cat(weights), torch.cat(biases)))
        rows = recompute.linear(F.silu(temb), weight, bias)
        return dict(zip(layers, torch.split_with_sizes_copy(rows, [len(w) for w in weights], dim=1), strict=True))
