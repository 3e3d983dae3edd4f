"""Blocks of diffusers' U-Nets, ControlNets and VAEs with a faster forward: the same modules, children and weights.

An object gets one of these classes by `controlnet.accelerate`; diffusers' forward goes on calling it. A block that is
not what its fast forward knows runs the forward it had before.
"""

from typing import Any

import torch
from diffusers.models import activations, attention, attention_processor, resnet
from diffusers.models.controlnets import controlnet
from diffusers.models.transformers import transformer_2d
from torch import Tensor, nn
from torch.nn import functional as F

import cnkernels
from cnkernels import recompute
from cnkernels.recompute import Later
from controlnet.diffusers import checks, exits, layers, memo

_CONV = (nn.Conv2d, (nn.Conv2d, "_conv_forward"))
_ATTENTION = (
    nn.Linear,
    attention_processor.Attention,
    (F, "scaled_dot_product_attention"),
    *((processor, "__call__") for processor in checks.PROCESSORS),
)


class Block:
    """What all have: `_strange` says why the block, or this call of it, is diffusers' to compute."""

    SOURCES: list[tuple[Any, str, Any]] = []  # what the forward stands for
    CHILDREN: tuple[tuple[str, type[nn.Module]], ...] = ()  # whose calls it leaves out

    def _strange(self, call: str | None = None) -> str | None:
        reason = call or checks.replaced(self.SOURCES) or checks.strange(self, self.CHILDREN)
        if reason is not None:
            checks.warn(self, reason)
        return reason

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_cn_kept"}


class ResnetBlock2D(Block, resnet.ResnetBlock2D):
    SOURCES = checks.sources(resnet.ResnetBlock2D, nn.GroupNorm, nn.SiLU, nn.Linear, *_CONV)
    CHILDREN = (("norm1", nn.GroupNorm), ("norm2", nn.GroupNorm), ("nonlinearity", nn.SiLU))

    def forward(self, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        if exits.skipping():
            return input_tensor.new_zeros(input_tensor.shape[0], self.conv2.out_channels, *input_tensor.shape[2:])
        if checks.watched() or self._strange(self._call(input_tensor, temb, args or kwargs)):
            return super().forward(input_tensor, temb, *args, **kwargs)
        own = self._modules
        h = layers.norm_conv(own["norm1"], own["conv1"], input_tensor, None, None)
        dropout = own["dropout"] if checks.active(own["dropout"]) else None
        addend = self.__dict__["_cn"].projection(self, temb) if own.get("time_emb_proj") is not None else None
        if self.time_embedding_norm == "scale_shift":
            scale, shift = addend[:, :, None, None].chunk(2, dim=1)
            h = F.silu(layers.group_norm(own["norm2"], h) * (1 + scale) + shift)
            h = own["conv2"](h if dropout is None else dropout(h))
        else:
            if addend is not None and addend.shape[0] != h.shape[0]:
                addend = addend.expand(h.shape[0], -1)
            h = layers.norm_conv(own["norm2"], own["conv2"], h, addend, dropout)
        shortcut = own.get("conv_shortcut")
        h = input_tensor + h if shortcut is None else layers.conv_add(shortcut, input_tensor, h)
        return h if self.output_scale_factor == 1 else h / self.output_scale_factor

    def _call(self, x: Tensor, temb: Tensor | None, more: Any) -> str | None:
        if self.upsample is not None or self.downsample is not None:
            return "resampling in a ResnetBlock2D"
        if self._modules.get("time_emb_proj") is None:
            fits = temb is None
        elif self.time_embedding_norm not in ("default", "scale_shift"):
            return f"time_embedding_norm={self.time_embedding_norm}"
        else:
            fits = temb is not None and temb.shape[0] in (1, x.shape[0])
        if more or not fits or x.dim() != 4:
            return "a ResnetBlock2D with other arguments"
        return None


class Attention(Block, attention_processor.Attention):
    SOURCES = checks.sources(nn.GroupNorm, *_ATTENTION)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        x, context = hidden_states, encoder_hidden_states
        if checks.watched() or self._strange(self.call(x, context, attention_mask, kwargs)):
            return super().forward(x, context, attention_mask, **kwargs)
        if x.dim() == 3 and self.group_norm is None:
            out = self.attend(x, context)
        else:
            rows = layers.tokens(x if self.group_norm is None else layers.group_norm(self.group_norm, x))
            out = layers.image(self.attend(rows, context), x)
        if self.residual_connection:
            out = out + x
        return out if self.rescale_output_factor == 1 else out / self.rescale_output_factor

    def call(self, x: Tensor, context: Any, mask: Tensor | None, kwargs: dict[str, Any]) -> str | None:
        """What of this call `attend` does not know, in words."""
        kind = type(self.processor)
        if kind not in checks.PROCESSORS:
            return f"the attention processor {kind.__name__}"
        if mask is not None:
            return "an attention mask"
        if kwargs and kwargs.keys() != {"temb"}:  # which the spatial norm alone reads
            return f"the attention arguments {', '.join(kwargs)}"
        if (
            self.spatial_norm is not None
            or self.norm_cross is not None
            or self.norm_q is not None
            or self.norm_k is not None
        ):
            return "an attention with norms of its own"
        group_norm = self.group_norm
        if group_norm is not None and not (x.dim() == 4 and checks.plain(group_norm, nn.GroupNorm)):
            return "an attention with a group norm"
        if context is not None and not (isinstance(context, Tensor) and x.dim() == 3 and len(context) == len(x)):
            return "a context of another kind or batch"
        return None

    def attend(self, x: Tensor | Later, context: Tensor | None, residual: Tensor | None = None) -> Tensor:
        """to_out(softmax(q k^T) v) + residual, of tokens x [N, S, C] and context [N, T, D], or x itself for None."""
        own = self._modules
        to_q, to_k, to_v = own["to_q"], own["to_k"], own["to_v"]
        if context is None:
            q, k, v = self._project(x, (to_q, to_k, to_v))
        else:
            q = layers.linear(to_q, x)
            if checks.plain(to_k, nn.Linear) and checks.plain(to_v, nn.Linear):
                sources = [p for m in (to_k, to_v) for p in m._parameters.values() if p is not None]
                k, v = memo.keep(self, [context, *sources], lambda: [layers.linear(m, context) for m in (to_k, to_v)])
            else:
                k, v = to_k(context), to_v(context)
        heads = self.heads
        q, k, v = (t.reshape(t.shape[0], t.shape[1], heads, -1) for t in (q, k, v))
        scale = self.scale if checks.PROCESSORS[type(self.processor)] else None
        out = cnkernels.attention(q, k, v, scale).flatten(2)
        project, dropout = own["to_out"]._modules.values()
        if residual is not None and not checks.active(dropout):
            return layers.linear_add(project, out, residual)
        out = layers.linear(project, out)
        out = dropout(out) if checks.active(dropout) else out
        return out if residual is None else out + residual

    def _project(self, x: Tensor | Later, modules: tuple[nn.Module, ...]) -> list[Tensor]:
        """q, k and v of tokens; of one product where gradients flow, so that backward reads the tokens once."""
        if torch.is_grad_enabled() and all(checks.plain(m, nn.Linear) and m.bias is None for m in modules):
            weights = [m.weight for m in modules]
            parts = recompute.chain(x, recompute.LINEAR, torch.cat(weights)).split([len(w) for w in weights], dim=2)
            return list(parts)
        x = layers.now(x)
        return [layers.linear(m, x) for m in modules]


class GEGLU(Block, activations.GEGLU):
    SOURCES = checks.sources(activations.GEGLU, nn.Linear)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or checks.watched() or self._strange():
            return super().forward(hidden_states, *args, **kwargs)
        return cnkernels.geglu(layers.linear(self.proj, hidden_states))


class BasicTransformerBlock(Block, attention.BasicTransformerBlock):
    SOURCES = checks.sources(
        attention.BasicTransformerBlock, attention.FeedForward, activations.GEGLU, nn.LayerNorm, *_ATTENTION
    )
    CHILDREN = (("norm1", nn.LayerNorm), ("norm3", nn.LayerNorm))

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        more = cross_attention_kwargs or {}
        if checks.watched() or self._strange(self._call(hidden_states, more, kwargs)):
            return super().forward(
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                timestep,
                cross_attention_kwargs,
                class_labels,
                added_cond_kwargs,
                **kwargs,
            )
        own = self._modules
        context = encoder_hidden_states if self.only_cross_attention else None
        h = _attend(own["attn1"], own["norm1"], hidden_states, context, attention_mask, more)
        if own.get("attn2") is not None:
            h = _attend(own["attn2"], own["norm2"], h, encoder_hidden_states, encoder_attention_mask, more)
        return _feed_forward(own["ff"], layers.layer_norm(own["norm3"], h), h)

    def _call(self, x: Tensor, more: dict[str, Any], kwargs: dict[str, Any]) -> str | None:
        if self.norm_type != "layer_norm" or self.pos_embed is not None or x.dim() != 3:
            return f"a transformer block with norm_type={self.norm_type}"
        if self._chunk_size is not None:
            return "a feed-forward in chunks"
        if kwargs or "gligen" in more:
            return f"the argument {next(iter(kwargs), 'gligen')}"
        norm2 = self._modules.get("norm2")
        return None if norm2 is None or checks.plain(norm2, nn.LayerNorm) else "norm2 of another kind"


def _attend(
    attn: nn.Module, norm: nn.LayerNorm, h: Tensor, context: Any, mask: Tensor | None, more: dict[str, Any]
) -> Tensor:
    """attn(norm(h), ...) + h."""
    x = layers.layer_norm(norm, h)
    known = type(attn) is Attention and checks.bare(attn) and attn.call(h, context, mask, more) is None
    if known and not attn.residual_connection and attn.rescale_output_factor == 1:
        return attn.attend(x, context, h)
    return attn(layers.now(x), encoder_hidden_states=context, attention_mask=mask, **more) + h


def _feed_forward(ff: nn.Module, x: Tensor | Later, h: Tensor) -> Tensor:
    """ff(x) + h."""
    if type(ff) is attention.FeedForward and checks.bare(ff) and len(ff.net) == 3:
        gate, dropout, last = ff.net._modules.values()
        if type(gate) is GEGLU and checks.bare(gate) and not checks.active(dropout):
            projected = layers.linear(gate.proj, x)
            grad = torch.is_grad_enabled()
            return layers.linear_add(last, recompute.geglu(projected) if grad else cnkernels.geglu(projected), h)
    return ff(layers.now(x)) + h


class Transformer2DModel(Block, transformer_2d.Transformer2DModel):
    SOURCES = checks.sources(
        (transformer_2d.Transformer2DModel, "_operate_on_continuous_inputs"),
        (transformer_2d.Transformer2DModel, "_get_output_for_continuous_inputs"),
        *(nn.GroupNorm, nn.Linear, *_CONV),
    )
    CHILDREN = (("norm", nn.GroupNorm),)

    def forward(self, hidden_states: Tensor, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        if not exits.skipping():
            return super().forward(hidden_states, *args, return_dict=return_dict, **kwargs)
        return transformer_2d.Transformer2DModelOutput(sample=hidden_states) if return_dict else (hidden_states,)

    def _operate_on_continuous_inputs(self, hidden_states: Tensor) -> tuple[Tensor, int]:
        if checks.watched() or self._strange():
            return super()._operate_on_continuous_inputs(hidden_states)
        norm, proj = self._modules["norm"], self._modules["proj_in"]
        known = checks.plain(proj, nn.Linear) or checks.pointwise(proj)
        if known and torch.is_grad_enabled():
            later = recompute.group_norm_silu(norm, hidden_states, activation=None)
            rows = recompute.chain(later, recompute.LINEAR, proj.weight.flatten(1), proj.bias)
        else:
            image = layers.group_norm(norm, hidden_states)
            if known:
                rows = recompute.linear(layers.tokens(image), proj.weight.flatten(1), proj.bias)
            elif self.use_linear_projection:
                rows = proj(layers.tokens(image))
            else:
                rows = layers.tokens(proj(image))
        return rows, rows.shape[2]

    def _get_output_for_continuous_inputs(
        self, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
    ) -> Tensor:
        proj = self.proj_out
        known = checks.plain(proj, nn.Linear) or checks.pointwise(proj)
        if checks.watched() or not known or hidden_states.dtype != residual.dtype or checks.replaced(self.SOURCES):
            return super()._get_output_for_continuous_inputs(
                hidden_states, residual, batch_size, height, width, inner_dim
            )
        return recompute.pixels_add(hidden_states, proj.weight.flatten(1), proj.bias, residual)


class ControlNetConditioningEmbedding(Block, controlnet.ControlNetConditioningEmbedding):
    SOURCES = checks.sources(controlnet.ControlNetConditioningEmbedding, *_CONV)

    def forward(self, conditioning: Tensor) -> Tensor:
        convs = [self.conv_in, *self.blocks, self.conv_out]
        if checks.watched() or not all(map(checks.plain_conv, convs)) or self._strange():
            return super().forward(conditioning)
        if not torch.is_grad_enabled():
            weights = [p for conv in convs for p in conv._parameters.values() if p is not None]
            return memo.keep(self, [conditioning, *weights], lambda: self._encode(conditioning))
        h: Tensor | Later = conditioning
        for conv in convs:
            if isinstance(h, Later):
                h = recompute.chain(h, recompute.ConvProduct(conv.stride[0], conv.padding[0]), conv.weight, conv.bias)
            else:
                h = conv(h)
            h = h if conv is convs[-1] else recompute.silu(h)
        return h

    def _encode(self, hint: Tensor) -> Tensor:
        """diffusers' forward, of the first image of a batch of equal ones or the first half of two equal halves."""
        if memo.keeps(hint) and not hint.is_meta:
            for count in (1, len(hint) // 2):
                if 0 < count < len(hint) and len(hint) % count == 0:
                    part = hint[:count]
                    if torch.equal(hint.unflatten(0, (-1, count)), part.expand(len(hint) // count, *part.shape)):
                        return super().forward(part).repeat(len(hint) // count, 1, 1, 1)
        return super().forward(hint)


class GroupNorm(Block, nn.GroupNorm):
    """The norm before the last convolution."""

    SOURCES = checks.sources(nn.GroupNorm)

    def forward(self, input: Tensor) -> Tensor:
        if checks.watched() or type(self.weight) is not nn.Parameter or checks.replaced(self.SOURCES):
            return super().forward(input)
        return layers.group_norm(self, input)


SWAPS = {
    cls.__mro__[2]: cls
    for cls in (
        ResnetBlock2D,
        Attention,
        GEGLU,
        BasicTransformerBlock,
        Transformer2DModel,
        ControlNetConditioningEmbedding,
    )
}
