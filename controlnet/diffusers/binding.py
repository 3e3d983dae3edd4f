"""A U-Net or ControlNet of diffusers, computed by this library's model: the same parameters, two sets of modules."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cnkernels import recompute
from cnkernels.recompute import Later
from controlnet.checkpoints import bundle, diffusers, folders, shapes
from controlnet.checkpoints.errors import CheckpointError
from controlnet.diffusers.memo import Memo
from controlnet.diffusers.watch import Watch
from controlnet.model.controlnet import ControlNet
from controlnet.model.layers import Prepared, ResBlock
from controlnet.model.scales import Scale
from controlnet.model.transformer import CrossAttention, Projection
from controlnet.model.unet import Embedding, UNet

# A schedule longer than this is not prepared: the projections of 1000 steps would take more memory than they save time.
_LONGEST_SCHEDULE = 256


class Unserved(Exception):
    """Says what diffusers' module has that this library's model has not."""


class _SharedAttention(CrossAttention):
    """CrossAttention on the weights of an attention of diffusers, which has q, k and v apart.

    They are not packed: a copy would not follow the originals, and views of one pack in their place would not survive
    `.to()`. Where gradients flow they are joined in each call, so that backward reads the tokens once.
    """

    @property
    def to_qkv(self) -> Tensor:
        return torch.cat([self.to_q.weight, self.to_k.weight, self.to_v.weight])

    def project(self, tokens: Later) -> tuple[Tensor, Tensor, Tensor]:
        if torch.is_grad_enabled():
            return super().project(tokens)
        x = tokens.now().to(self.to_q.weight.dtype)
        return self._heads_of(x, self.to_q), self._heads_of(x, self.to_k), self._heads_of(x, self.to_v)

    def project_context(self, context: Tensor) -> Tensor:
        return torch.stack([self._heads_of(context, self.to_k), self._heads_of(context, self.to_v)], dim=2)

    def _heads_of(self, x: Tensor, layer: nn.Linear) -> Tensor:
        return recompute.linear(x, layer.weight).unflatten(2, (self.heads, -1))


class Binding:
    """This library's model on the parameters of a module of diffusers, and what it keeps between the steps of a loop.

    Kept are the encoded hint, the keys and values of the context, and the projections of the timestep embedding for the
    whole schedule, each while the tensors that it was made of, weights included, are the same (see `Memo`).

    Args:
        module: of diffusers.
        compile: arguments of torch.compile for this library's model, or None. What is kept stays outside of what is
            compiled.

    Raises:
        Unserved: the module computes something that this library's model does not.
    """

    def __init__(self, module: nn.Module, compile: Mapping[str, Any] | None = None):
        self.watch = Watch(module)
        foreign = self.watch.foreign()
        if foreign:
            raise Unserved(foreign)
        self.model = _model(module)
        self._is_compiled = compile is not None
        if compile is not None:
            self.model.compile(**compile)
        self._guided_hint: Memo[Tensor] = Memo()
        self._context: Memo[Prepared] = Memo()
        self._schedule: Memo[Prepared] = Memo()
        modules = list(self.model.modules())
        attentions = [m for m in modules if isinstance(m, CrossAttention) and m.reads_context]
        self._context_weights = [layer.weight for m in attentions for layer in (m.to_k, m.to_v)]
        embeddings = [self.model.time_embed, *(m.emb_layers for m in modules if isinstance(m, ResBlock))]
        self._embedding_weights = [p for m in embeddings for p in m.parameters()]
        if isinstance(self.model, ControlNet):
            self._hint_weights = list(self.model.input_hint_block.parameters())

    def unet(
        self, x: Tensor, timestep: Any, context: Tensor, control: Sequence[Tensor] | None, schedules: Iterable[Tensor]
    ) -> Tensor:
        """UNet.forward on diffusers' arguments; `schedules` are those that the timestep may be an item of."""
        timesteps, embedding = self._embed(x, timestep, schedules)
        prediction = self.model(_nhwc(x), timesteps, self._prepared(context), control, embedding=embedding)
        return self._own([prediction])[0]

    def controlnet(
        self,
        x: Tensor,
        timestep: Any,
        context: Tensor,
        hint: Tensor,
        scales: Sequence[Scale],
        schedules: Iterable[Tensor],
    ) -> list[Tensor]:
        """ControlNet.forward on diffusers' arguments."""
        timesteps, embedding = self._embed(x, timestep, schedules)
        outputs = self.model(
            _nhwc(x),
            None,
            timesteps,
            self._prepared(context),
            scales=scales,
            guided_hint=self._encoded(hint),
            embedding=embedding,
        )
        return self._own(outputs)

    def zeros(self, x: Tensor) -> list[Tensor]:
        """What `controlnet` gives with scales 0, for x [N, C, h, w]: views of one zero."""
        arch, (height, width) = self.model.arch, x.shape[2:]
        sizes = [(height, width)]
        for level, blocks in enumerate(arch.num_res_blocks):
            sizes += [(height, width)] * blocks
            if level < arch.levels - 1:
                height, width = (height + 1) // 2, (width + 1) // 2
                sizes.append((height, width))
        sizes.append((height, width))
        channels = [*self.model.skip_channels, self.model.skip_channels[-1]]
        zero = x.new_zeros((), dtype=self.model.dtype)
        return [zero.expand(x.shape[0], c, *size) for c, size in zip(channels, sizes, strict=True)]

    def _own(self, outputs: list[Tensor]) -> list[Tensor]:
        """Copies where the outputs may be a CUDA graph's, whose next replay would write over them."""
        return [t.clone() for t in outputs] if self._is_compiled and outputs[0].is_cuda else outputs

    def _embed(self, x: Tensor, timestep: Any, schedules: Iterable[Tensor]) -> tuple[Tensor, Embedding]:
        n = x.shape[0]
        timesteps = torch.as_tensor(timestep, device=x.device).reshape(-1).expand(n)
        if self.model.time_embed.frequencies.device != x.device:
            self.model.time_embed._place_frequencies()  # a buffer, which the parameters' move did not take along
        if torch.compiler.is_compiling():
            return timesteps, self.model.embed(timesteps)
        found = next((found for schedule in schedules if (found := _item(timestep, schedule)) is not None), None)
        if found is None:
            return timesteps, self.model.embed(timesteps)
        schedule, index = found

        def prepare() -> Prepared:
            return self.model.prepare_timesteps(schedule.to(x.device).repeat_interleave(n))

        prepared = self._schedule([schedule, *self._embedding_weights], prepare, n)
        return timesteps, prepared.rows(index * n, (index + 1) * n)

    def _prepared(self, context: Tensor) -> Tensor | Prepared:
        if torch.compiler.is_compiling():
            return context
        return self._context([context, *self._context_weights], lambda: self.model.prepare_context(context))

    def _encoded(self, hint: Tensor) -> Tensor:
        def encode() -> Tensor:
            distinct = hint if torch.compiler.is_compiling() else _distinct(hint)
            encoded = self.model.encode_hint(_nhwc(distinct))
            return encoded if distinct is hint else encoded.repeat(hint.shape[0] // distinct.shape[0], 1, 1, 1)

        return encode() if torch.compiler.is_compiling() else self._guided_hint([hint, *self._hint_weights], encode)


def _model(module: nn.Module) -> UNet | ControlNet:
    """This library's model of a module's configuration, with the module's own parameters."""
    part = "control" if hasattr(module, "controlnet_mid_block") else "unet"
    origin = type(module).__name__
    theirs = dict(module.named_parameters())
    try:
        heads = folders.heads(module.config, origin)
        params = shapes.parameters(shapes.to_original(theirs, part, origin), part, origin, **heads)
        architecture = shapes.architecture(params, part, origin)
        if architecture.num_classes is not None:
            raise CheckpointError("the added embeddings of Stable Diffusion XL")
        names = diffusers.module_names(architecture)
    except CheckpointError as error:
        raise Unserved(str(error)) from error
    model = bundle.skeleton(architecture, part)
    for attention in [m for m in model.modules() if isinstance(m, CrossAttention)]:
        _unpack(attention)
    for name, parameter in list(model.named_parameters()):
        source = theirs.pop(diffusers.rename(name, names), None)
        if source is None or source.shape != parameter.shape:
            raise Unserved(f"{name}, which is {'missing' if source is None else list(source.shape)}")
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, source)
    if theirs:
        raise Unserved(f"the parameter {next(iter(theirs))}")
    model.time_embed._place_frequencies()
    return model


def _unpack(attention: CrossAttention) -> None:
    weight = getattr(attention, attention.packed)
    delattr(attention, attention.packed)
    attention.__class__ = _SharedAttention
    for part in attention.parts:
        layer = Projection(weight.shape[1], weight.shape[0] // len(attention.parts), bias=False, device="meta")
        setattr(attention, part, layer)


def _item(timestep: Any, schedule: Any) -> tuple[Tensor, int] | None:
    """The schedule and the timestep's place in it, found by its address: reading its value would wait for the GPU."""
    if not (isinstance(timestep, Tensor) and isinstance(schedule, Tensor) and timestep.numel() == 1):
        return None
    same = timestep.untyped_storage()._cdata == schedule.untyped_storage()._cdata and timestep.dtype == schedule.dtype
    if not same or schedule.dim() != 1 or not 0 < len(schedule) <= _LONGEST_SCHEDULE:
        return None
    index, rest = divmod(timestep.storage_offset() - schedule.storage_offset(), schedule.stride(0))
    return (schedule, index) if rest == 0 and 0 <= index < len(schedule) else None


def _distinct(hint: Tensor) -> Tensor:
    """The first image of a batch of equal ones, the first half of a batch of two equal halves, or the batch."""
    for count in (1, len(hint) // 2):
        if 0 < count < len(hint) and len(hint) % count == 0:
            part = hint[:count]
            if torch.equal(hint.unflatten(0, (-1, count)), part.expand(len(hint) // count, *part.shape)):
                return part
    return hint


def _nhwc(image: Tensor) -> Tensor:
    return image.contiguous(memory_format=torch.channels_last)
