"""Layers of diffusers' blocks, computed by cnkernels where they are plain, and called as the modules they are if not.

Where gradients flow, layers are chained as in `cnkernels.recompute`, which saves less for backward.
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
    own = norm._parameters
    if torch.is_grad_enabled() and dropout is None and checks.plain_conv(conv):
        later = recompute.group_norm_silu(norm, x, addend)
        return recompute.chain(later, recompute.ConvProduct(conv.stride[0], conv.padding[0]), conv.weight, conv.bias)
    h = cnkernels.group_norm_silu(x, norm.num_groups, own["weight"], own["bias"], norm.eps, "silu", addend)
    return conv(h if dropout is None else dropout(h))


def layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor | Later:
    if torch.is_grad_enabled():
        return recompute.layer_norm(norm, x)
    own = norm._parameters
    return F.layer_norm(x, norm.normalized_shape, own["weight"], own["bias"], norm.eps)


def now(x: Tensor | Later) -> Tensor:
    return x.now() if isinstance(x, Later) else x


def linear(layer: nn.Module, x: Tensor | Later) -> Tensor:
    if not checks.plain(layer, nn.Linear):
        return layer(now(x))
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
    """What the blocks of one model have in common.

    Attributes:
        warned: the reasons for which a block ran diffusers' own code, each said once.
        blocks: those that read the timestep embedding by their `time_emb_proj`.
    """

    def __init__(self, blocks: Sequence[nn.Module] = ()):
        self.warned: set[str] = set()
        self.blocks = list(blocks)
        self._latest = threading.local()

    def __reduce__(self) -> tuple[Any, ...]:
        return Shared, (), {"blocks": self.blocks}

    def projection(self, block: nn.Module, temb: Tensor) -> Tensor:
        """The block's time_emb_proj of silu(temb), [N, D] -> [N, C]; without gradients all blocks' are one product."""
        if memo.keeps(temb) and not temb.is_inference():
            latest = getattr(self._latest, "rows", None)
            if latest is None or latest[0] is not temb or latest[1] != temb._version:
                latest = self._latest.rows = (temb, temb._version, self._project(temb))
            row = latest[2].pop(block, None)
            if row is not None:
                return row
        return linear(block.time_emb_proj, temb if block.skip_time_act else F.silu(temb))

    def _project(self, temb: Tensor) -> dict[nn.Module, Tensor]:
        blocks, weights, biases = [], [], []
        for block in self.blocks:
            layer = block._modules.get("time_emb_proj")
            if checks.plain(layer, nn.Linear) and layer.bias is not None and not block.skip_time_act:
                blocks.append(block)
                weights.append(layer._parameters["weight"])
                biases.append(layer._parameters["bias"])
        if not blocks:
            return {}
        weight, bias = memo.keep(self, weights + biases, lambda: (torch.cat(weights), torch.cat(biases)))
        rows = recompute.linear(F.silu(temb), weight, bias)
        return dict(zip(blocks, torch.split_with_sizes_copy(rows, [len(w) for w in weights], dim=1), strict=True))
