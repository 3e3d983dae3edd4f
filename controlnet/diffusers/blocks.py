"""Blocks of diffusers' U-Nets, ControlNets and VAEs with a faster forward: the same modules, children and weights.

`controlnet.accelerate` changes the class of such an object to one of these; diffusers' forward of the model goes on
calling it. Where a block differs from what its fast forward supports, it runs diffusers' own forward.
"""

import inspect
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
_TRANSFORMER_ARGUMENTS = tuple(inspect.signature(attention.BasicTransformerBlock.forward).parameters)[1:]  # no self


class Block:
    """The base of all blocks: decides whether a call takes the fast forward."""

    SOURCES: list[tuple[Any, str, Any]] = []  # the functions whose place the fast forward takes
    CHILDREN: tuple[tuple[str, type[nn.Module]], ...] = ()  # the children whose forward it does not call

    def _unsupported(self, call: str | None = None) -> bool:
        """Whether diffusers' own forward must run. Warns, once for each reason, unless that is due to a transform.

        Args:
            call: the reason why this call is not supported, None if it is.
        """
        if checks.transformed():
            return True
        reason = call or checks.replaced(self.SOURCES) or checks.strange(self, self.CHILDREN)
        if reason is not None:
            checks.warn(self, reason)
        return reason is not None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_cn_kept"}


class ResnetBlock2D(Block, resnet.ResnetBlock2D):
    SOURCES = checks.sources(resnet.ResnetBlock2D, nn.GroupNorm, nn.SiLU, nn.Linear, *_CONV)
    CHILDREN = (("norm1", nn.GroupNorm), ("norm2", nn.GroupNorm), ("nonlinearity", nn.SiLU))

    def forward(self, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        if exits.skipping():
            return input_tensor.new_zeros(input_tensor.shape[0], self.conv2.out_channels, *input_tensor.shape[2:])
        if self._unsupported(self._call(input_tensor, temb, args or kwargs)):
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
        if self._unsupported(self.call(x, context, attention_mask, kwargs)):
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
        """The reason why `attend` cannot serve this call, None if it can."""
        kind = type(self.processor)
        if kind not in checks.PROCESSORS:
            return f"the attention processor {kind.__name__}"
        if mask is not None:
            return "an attention mask"
        if kwargs and kwargs.keys() != {"temb"}:  # which the spatial norm alone reads
            return f"the attention arguments {', '.join(kwargs)}"
        if not (self.spatial_norm is self.norm_cross is self.norm_q is self.norm_k is None):
            return "an attention with norms of its own"
        group_norm = self.group_norm
        if group_norm is not None and not (x.dim() == 4 and checks.plain(group_norm, nn.GroupNorm)):
            return "an attention with a group norm"
        if context is not None and not (isinstance(context, Tensor) and x.dim() == 3 and len(context) == len(x)):
            return "a context of another kind or batch"
        return None

    def attend(self, x: Tensor | Later, context: Tensor | None, residual: Tensor | None = None) -> Tensor:
        """to_out(softmax(scale * q k^T) v) + residual, of tokens x [N, S, C] and context [N, T, D] or None for x."""
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
        """q, k and v of tokens x. With gradients by one product, so that backward reads x once."""
        if torch.is_grad_enabled() and all(checks.plain(m, nn.Linear) and m.bias is None for m in modules):
            weights = [m.weight for m in modules]
            rows = recompute.chain(x, recompute.LINEAR, torch.cat(weights))
            return list(rows.split([len(w) for w in weights], dim=2))
        x = x.now() if isinstance(x, Later) else x
        return [layers.linear(m, x) for m in modules]


class BasicTransformerBlock(Block, attention.BasicTransformerBlock):
    SOURCES = checks.sources(
        attention.BasicTransformerBlock, attention.FeedForward, activations.GEGLU, nn.LayerNorm, *_ATTENTION
    )
    CHILDREN = (("norm1", nn.LayerNorm), ("norm3", nn.LayerNorm))

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given = dict(zip(_TRANSFORMER_ARGUMENTS[1:], args, strict=False)) | kwargs
        more = given.get("cross_attention_kwargs") or {}
        if self._unsupported(self._call(hidden_states, more, given)):
            return super().forward(hidden_states, *args, **kwargs)
        own, context = self._modules, given.get("encoder_hidden_states")
        known = context if self.only_cross_attention else None
        h = _attend(own["attn1"], own["norm1"], hidden_states, known, given.get("attention_mask"), more)
        if own.get("attn2") is not None:
            h = _attend(own["attn2"], own["norm2"], h, context, given.get("encoder_attention_mask"), more)
        return _feed_forward(own["ff"], recompute.layer_norm(own["norm3"], h), h)

    def _call(self, x: Tensor, more: dict[str, Any], given: dict[str, Any]) -> str | None:
        if self.norm_type != "layer_norm" or self.pos_embed is not None or x.dim() != 3:
            return f"a transformer block with norm_type={self.norm_type}"
        if self._chunk_size is not None:
            return "a feed-forward in chunks"
        unknown = [name for name in given if name not in _TRANSFORMER_ARGUMENTS]
        if unknown or "gligen" in more:
            return f"the argument {(*unknown, 'gligen')[0]}"
        norm2 = self._modules.get("norm2")
        return None if norm2 is None or checks.plain(norm2, nn.LayerNorm) else "norm2 of another kind"


def _attend(
    attn: nn.Module, norm: nn.LayerNorm, h: Tensor, context: Any, mask: Tensor | None, more: dict[str, Any]
) -> Tensor:
    """attn(norm(h), ...) + h."""
    x = recompute.layer_norm(norm, h)
    known = type(attn) is Attention and checks.bare(attn) and attn.call(h, context, mask, more) is None
    if known and not attn.residual_connection and attn.rescale_output_factor == 1:
        return attn.attend(x, context, h)
    return attn(x.now(), encoder_hidden_states=context, attention_mask=mask, **more) + h


def _feed_forward(ff: nn.Module, x: Later, h: Tensor) -> Tensor:
    """ff(x) + h."""
    if type(ff) is attention.FeedForward and checks.bare(ff) and len(ff.net) == 3:
        gate, dropout, last = ff.net._modules.values()
        if type(gate) is activations.GEGLU and checks.bare(gate) and not checks.active(dropout):
            return layers.linear_add(last, recompute.geglu(layers.linear(gate.proj, x)), h)
    return ff(x.now()) + h


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
        if self._unsupported():
            return super()._operate_on_continuous_inputs(hidden_states)
        normed = recompute.group_norm_silu(self._modules["norm"], hidden_states, activation=None)
        proj = self._modules["proj_in"]
        if _is_projection(proj):
            rows = recompute.chain(normed, recompute.LINEAR, proj.weight.flatten(1), proj.bias)
        elif self.use_linear_projection:
            rows = proj(layers.tokens(normed.now()))
        else:
            rows = layers.tokens(proj(normed.now()))
        return rows, rows.shape[2]

    def _get_output_for_continuous_inputs(self, hidden_states: Tensor, residual: Tensor, **sizes: int) -> Tensor:
        proj, same = self.proj_out, hidden_states.dtype == residual.dtype
        if checks.transformed() or not same or not _is_projection(proj) or checks.replaced(self.SOURCES):
            return super()._get_output_for_continuous_inputs(hidden_states, residual, **sizes)
        return recompute.pixels_add(hidden_states, proj.weight.flatten(1), proj.bias, residual)


def _is_projection(layer: nn.Module) -> bool:
    return checks.plain(layer, nn.Linear) or checks.pointwise(layer)


class ControlNetConditioningEmbedding(Block, controlnet.ControlNetConditioningEmbedding):
    SOURCES = checks.sources(controlnet.ControlNetConditioningEmbedding, *_CONV)

    def forward(self, conditioning: Tensor) -> Tensor:
        convs = [self.conv_in, *self.blocks, self.conv_out]
        if not all(map(checks.plain_conv, convs)) or self._unsupported():
            return super().forward(conditioning)
        if not torch.is_grad_enabled():
            weights = [p for conv in convs for p in conv._parameters.values() if p is not None]
            return memo.keep(self, [conditioning, *weights], lambda: self._encode(conditioning))
        h = convs[0](conditioning)
        for conv in convs[1:]:
            h = layers.conv_of(conv, recompute.silu(h))
        return h

    def _encode(self, hint: Tensor) -> Tensor:
        """diffusers' forward. A batch of equal images, or of two equal halves (guidance), is encoded once."""
        if memo.keeps(hint) and not hint.is_meta:
            for count in (1, len(hint) // 2):
                if 0 < count < len(hint) and len(hint) % count == 0:
                    part = hint[:count]
                    if torch.equal(hint.unflatten(0, (-1, count)), part.expand(len(hint) // count, *part.shape)):
                        return super().forward(part).repeat(len(hint) // count, 1, 1, 1)
        return super().forward(hint)


class GroupNorm(Block, nn.GroupNorm):
    """The norm before a model's last convolution."""

    SOURCES = checks.sources(nn.GroupNorm)

    def forward(self, input: Tensor) -> Tensor:
        if checks.transformed() or type(self.weight) is not nn.Parameter or checks.replaced(self.SOURCES):
            return super().forward(input)
        return layers.group_norm(self, input)


_BLOCKS = (ResnetBlock2D, Attention, BasicTransformerBlock, Transformer2DModel, ControlNetConditioningEmbedding)
SWAPS = {cls.__mro__[2]: cls for cls in _BLOCKS}
