"""The validated hyperparameters of U-Net and ControlNet."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

GROUPS = 32  # of every group norm, as in all checkpoints of this family

# Parameters of the original implementations that this model takes at these values alone.
ONLY_VALUES = {
    "dims": (2,),
    "num_classes": (None, "sequential"),
    "n_embed": (None,),
    "resblock_gn_groups": (None, GROUPS),
    "lora_network_alpha": (None,),
    "use_te_fp8": (False,),
}


def _require(condition: bool, name: str, got: Any, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {got!r}; expected {expected}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The parameters that U-Net and ControlNet share, under the names of the original implementation.

    Level l works at 1/2^l of the latent's resolution with model_channels * channel_mult[l] channels.

    Args:
        in_channels: channels of the latent.
        model_channels: channels of the first level, a multiple of 32 (group norm has 32 groups).
        num_res_blocks: residual blocks of each encoder level, one number or one for each level; a decoder level has
            one more.
        attention_resolutions: the downsampling factors (1, 2, 4, ...) of the levels that have attention.
        channel_mult: channels of each level, in units of model_channels.
        num_heads: attention heads; not read when num_head_channels is given.
        num_head_channels: channels of a head (-1: given by num_heads).
        num_heads_upsample: heads in the decoder (-1: num_heads); as in the original, of effect only with `legacy` and
            without `use_spatial_transformer` and `num_head_channels`.
        legacy: see num_heads_upsample; no other effect.
        use_spatial_transformer: attention is a transformer that reads the context; else plain self-attention.
        transformer_depth: transformer blocks in each spatial transformer, one number or one for each level (0, or any
            number, for a level without attention).
        transformer_depth_middle: the same of the middle block (None: that of the last level).
        num_classes: "sequential" adds an embedding of a vector y [N, adm_in_channels] to that of the timestep, as
            Stable Diffusion XL has it for the pooled prompt and the image's sizes; None: there is none.
        adm_in_channels: channels of y; required with num_classes, and refused without.
        context_dim: features of the context; required with use_spatial_transformer, and refused without. A list is
            taken when all its entries are the same.
        use_linear_in_transformer: proj_in and proj_out are stored as linear layers, not as 1x1 convolutions.
        disable_self_attentions: one bool for each level; True makes a transformer's first attention read the context.
        disable_middle_self_attn: the same for the middle block.
        num_attention_blocks: how many of a level's residual blocks are followed by attention, one number for each
            level (None: all).
        use_new_attention_order: without spatial transformer, the qkv channels are ordered [3, heads, head_dim], not
            [heads, 3, head_dim].
        use_scale_shift_norm: the timestep embedding scales and shifts the second norm of a residual block, instead of
            being added before it.
        resblock_updown: residual blocks change the resolution, not convolutions.
        conv_resample: resolution changes are convolutions; else average pooling and nearest neighbour alone.
        dropout: probability, in residual blocks.
        use_checkpoint: recompute activations in backward instead of keeping them.
        use_flash_attention: attention through `cnkernels.attention`; else softmax of a materialised score matrix.
        dims, n_embed, resblock_gn_groups, lora_network_alpha, use_te_fp8: taken at their defaults alone.
        from_pretrained, from_NeMo: no effect here; whoever builds the model loads the weights.
        image_size, use_fp16, unet_precision, use_te_dpa, timesteps, offload_to_cpu: no effect. The model works at any
            size, and its precision is that of its weights (`model.to(dtype)`, or autocast).

    Raises:
        ValueError: a value that is not possible; the message names the parameter, what came and what was expected.
        TypeError: an unknown or missing name.
    """

    in_channels: int
    model_channels: int
    num_res_blocks: int | Sequence[int]
    attention_resolutions: Sequence[int]
    channel_mult: Sequence[int] = (1, 2, 4, 8)
    num_heads: int = -1
    num_head_channels: int = -1
    num_heads_upsample: int = -1
    legacy: bool = True
    use_spatial_transformer: bool = False
    transformer_depth: int | Sequence[int] = 1
    transformer_depth_middle: int | None = None
    context_dim: int | Sequence[int] | None = None
    use_linear_in_transformer: bool = False
    disable_self_attentions: Sequence[bool] | None = None
    disable_middle_self_attn: bool = False
    num_attention_blocks: Sequence[int] | None = None
    use_new_attention_order: bool = False
    use_scale_shift_norm: bool = False
    resblock_updown: bool = False
    conv_resample: bool = True
    dropout: float = 0.0
    use_checkpoint: bool = False
    use_flash_attention: bool = True
    dims: int = 2
    num_classes: str | None = None
    n_embed: Any = None
    adm_in_channels: int | None = None
    resblock_gn_groups: Any = None
    lora_network_alpha: Any = None
    use_te_fp8: bool = False
    from_pretrained: Any = None
    from_NeMo: Any = None
    image_size: Any = None
    use_fp16: Any = None
    unet_precision: Any = None
    use_te_dpa: Any = None
    timesteps: Any = None
    offload_to_cpu: Any = None

    def __post_init__(self):
        for name, values in ONLY_VALUES.items():
            _require(getattr(self, name) in values, name, getattr(self, name), " or ".join(map(repr, values)))
        for field in fields(self):
            if field.type is bool:
                _require(isinstance(getattr(self, field.name), bool), field.name, getattr(self, field.name), "a bool")
        _require(_is_count(self.in_channels), "in_channels", self.in_channels, "a positive integer")
        width = self.model_channels
        _require(_is_count(width) and width % GROUPS == 0, "model_channels", width, f"a multiple of {GROUPS}")
        _require(0 <= self.dropout < 1, "dropout", self.dropout, "a probability in [0, 1)")
        self._validate_levels()
        self._validate_depth()
        self._validate_heads()
        self._validate_context()
        self._validate_classes()

    def _validate_levels(self) -> None:
        mult = self.channel_mult
        valid = _is_list(mult) and len(mult) > 0 and all(map(_is_count, mult))
        _require(valid, "channel_mult", mult, "a list of positive integers")
        if _is_count(self.num_res_blocks):
            self._set("num_res_blocks", [self.num_res_blocks] * self.levels)
        self._set("channel_mult", mult)
        self._set_per_level("num_res_blocks", _is_count, "a positive integer, or one for each of")
        if self.num_attention_blocks is not None:
            self._set_per_level("num_attention_blocks", lambda n: n == 0 or _is_count(n), "an integer for each of")
            fits = all(a <= n for a, n in zip(self.num_attention_blocks, self.num_res_blocks, strict=True))
            expected = f"at most num_res_blocks {self.num_res_blocks}"
            _require(fits, "num_attention_blocks", self.num_attention_blocks, expected)
        if self.disable_self_attentions is not None:
            self._set_per_level("disable_self_attentions", lambda flag: isinstance(flag, bool), "a bool for each of")
        factors = [2**level for level in range(self.levels)]
        given = self.attention_resolutions
        valid = _is_list(given) and all(factor in factors for factor in given)
        _require(valid, "attention_resolutions", given, f"a list of downsampling factors out of {factors}")
        self._set("attention_resolutions", given)

    def _validate_depth(self) -> None:
        if _is_count(self.transformer_depth):
            self._set("transformer_depth", [self.transformer_depth] * self.levels)
        expected = "a positive integer, or an integer for each of"
        self._set_per_level("transformer_depth", lambda depth: depth == 0 or _is_count(depth), expected)
        depths = self.transformer_depth
        attends = [2**level in self.attention_resolutions for level in range(self.levels)]
        expected = f"at least 1 at the levels with attention, {[level for level, has in enumerate(attends) if has]}"
        fits = all(depth > 0 or not has for depth, has in zip(depths, attends, strict=True))
        _require(fits, "transformer_depth", depths, expected)
        self._set("transformer_depth", [depth if has else 0 for depth, has in zip(depths, attends, strict=True)])
        middle = self.transformer_depth_middle
        middle = depths[-1] if middle is None else middle
        expected = "a positive integer: the middle block always has attention"
        _require(_is_count(middle), "transformer_depth_middle", middle, expected)
        object.__setattr__(self, "transformer_depth_middle", middle)

    def _validate_classes(self) -> None:
        channels = self.adm_in_channels
        if self.num_classes is None:
            _require(channels is None, "adm_in_channels", channels, "None, as num_classes is not set")
        else:
            _require(_is_count(channels), "adm_in_channels", channels, "a positive integer, as num_classes is set")

    def _validate_heads(self) -> None:
        for name in ("num_heads", "num_head_channels", "num_heads_upsample"):
            value = getattr(self, name)
            _require(value == -1 or _is_count(value), name, value, "a positive integer, or -1 for not given")
        given = self.num_heads != -1 or self.num_head_channels != -1
        _require(given, "num_heads", self.num_heads, "a positive integer, as num_head_channels is not given either")
        widths = [self.channels(level) for level in range(self.levels) if 2**level in self.attention_resolutions]
        by_size = self.num_head_channels != -1
        for width in [*widths, self.channels(self.levels - 1)]:  # the middle block always has attention
            for name in ("num_head_channels",) if by_size else ("num_heads", "num_heads_upsample"):
                value = getattr(self, name)
                divides = value == -1 or width % value == 0
                _require(divides, name, value, f"a divisor of {width}, the channels of a level with attention")

    def _validate_context(self) -> None:
        dim = self.context_dim
        if _is_list(dim) and len(set(dim)) == 1:
            dim = dim[0]
            object.__setattr__(self, "context_dim", dim)
        if self.use_spatial_transformer:
            _require(_is_count(dim), "context_dim", dim, "a positive integer, as use_spatial_transformer is set")
        else:
            _require(dim is None, "context_dim", dim, "None, as use_spatial_transformer is not set")

    def _set(self, name: str, values: Sequence) -> None:
        object.__setattr__(self, name, tuple(values))

    def _set_per_level(self, name: str, valid: Any, expected: str) -> None:
        values = getattr(self, name)
        right = _is_list(values) and len(values) == self.levels and all(map(valid, values))
        _require(right, name, values, f"{expected} the {self.levels} levels of channel_mult")
        self._set(name, values)

    @property
    def levels(self) -> int:
        return len(self.channel_mult)

    @property
    def embedding_channels(self) -> int:
        return 4 * self.model_channels

    def channels(self, level: int) -> int:
        return self.model_channels * self.channel_mult[level]

    def has_attention(self, level: int, block: int) -> bool:
        """True if attention follows residual block `block` of the level, in encoder and decoder alike."""
        count = self.num_attention_blocks
        return 2**level in self.attention_resolutions and (count is None or block < count[level])

    def heads(self, channels: int, *, decoder: bool = False) -> int:
        if self.num_head_channels != -1:
            return channels // self.num_head_channels
        separate = decoder and self.legacy and not self.use_spatial_transformer and self.num_heads_upsample != -1
        return self.num_heads_upsample if separate else self.num_heads

    def depth(self, level: int | None) -> int:
        """Returns the number of transformer blocks at a level (None: in the middle block)."""
        return self.transformer_depth_middle if level is None else self.transformer_depth[level]

    def reads_context_only(self, level: int | None) -> bool:
        """True if the transformers of a level (None: of the middle block) have no self-attention."""
        if level is None:
            return self.disable_middle_self_attn
        return self.disable_self_attentions is not None and self.disable_self_attentions[level]


@dataclass(frozen=True, kw_only=True)
class UNetArchitecture(Architecture):
    """Architecture of a U-Net.

    Args:
        out_channels: channels of the prediction.
    """

    out_channels: int

    def __post_init__(self):
        super().__post_init__()
        _require(_is_count(self.out_channels), "out_channels", self.out_channels, "a positive integer")


@dataclass(frozen=True, kw_only=True)
class ControlNetArchitecture(Architecture):
    """Architecture of a ControlNet: that of the encoder and middle block that it copies, and of the hint encoder.

    Args:
        hint_channels: channels of the hint.
        hint_block_channels: channels of the hint encoder's stages; each but the first halves the resolution. The
            original's four stages bring an image to the resolution of Stable Diffusion's latents, 1/8.
        from_pretrained_unet: no effect here; whoever builds the model loads the weights.
    """

    hint_channels: int
    hint_block_channels: Sequence[int] = (16, 32, 96, 256)
    from_pretrained_unet: Any = None

    def __post_init__(self):
        super().__post_init__()
        _require(_is_count(self.hint_channels), "hint_channels", self.hint_channels, "a positive integer")
        widths = self.hint_block_channels
        valid = _is_list(widths) and len(widths) > 0 and all(map(_is_count, widths))
        _require(valid, "hint_block_channels", widths, "a list of positive integers")
        self._set("hint_block_channels", widths)

    @property
    def hint_factor(self) -> int:
        """The hint's side divided by the latent's."""
        return 2 ** (len(self.hint_block_channels) - 1)
