"""Layers that keep less for backward than autograd's composition of the same operations, for the same values.

PyTorch's convolution saves its input even where its weight is frozen: `conv2d` does not. A trainable layer needs its
input for the gradient of its weight, but where that input is a normalised activation or a gated product, it follows
from what is saved anyway: `chain` computes it again in backward.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cnkernels import layout, onednn, register
from cnkernels.geglu import registration as geglu_registration
from cnkernels.group_norm_silu import registration as group_norm_registration

Maybe = Tensor | None
Inputs = tuple[Tensor, Maybe, Maybe, Maybe]  # x, then up to three parameters


def conv2d(x: Tensor, weight: Tensor, bias: Maybe = None, stride: int = 1, padding: int = 0) -> Tensor:
    """`torch.nn.functional.conv2d`, which saves x only if weight needs a gradient.

    Args:
        x: [N, Cin, H, W].
        weight: [Cout, Cin, kh, kw].
        bias: [Cout] or None.
        stride, padding: of both dimensions.
    """
    if not torch.is_grad_enabled() or weight.requires_grad or not x.requires_grad:
        return F.conv2d(x, weight, bias, stride, padding)
    return _FrozenConv.apply(*register.autocast(x, weight, bias), stride, padding)


def linear(x: Tensor, weight: Tensor, bias: Maybe = None) -> Tensor:
    """`torch.nn.functional.linear`; on a CPU oneDNN's, where neither autograd nor autocast nor a compiler looks on."""
    watched = torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type) or torch.compiler.is_compiling()
    return F.linear(x, weight, bias) if watched else onednn.linear(x, weight, bias)


def conv1x1_add(x: Tensor, weight: Tensor, bias: Maybe, residual: Tensor) -> Tensor:
    """`cnkernels.zero_conv_add` of scale 1, which a compiler may take for the constant that it is."""
    return torch.ops.cnkernels.zero_conv_add(*register.autocast(x, weight, bias, residual), None, 1.0)


@dataclass(frozen=True)
class Later:
    """What `function` makes of `inputs`, not computed yet: the argument of `chain`."""

    function: "GroupNormSiLU | LayerNorm | SiLU | GEGLU"
    inputs: Inputs

    def now(self) -> Tensor:
        return self.function.forward(*self.inputs)[0]


def chain(
    x: Tensor | Later, product: "Conv | Linear | LinearAdd", weight: Tensor, bias: Maybe = None, residual: Maybe = None
) -> Tensor:
    """product(x, weight, bias, residual), which saves the inputs of an x that is yet to be computed, and not x.

    Args:
        x: a tensor, or what `group_norm_silu`, `layer_norm`, `silu` or `geglu` of this module promise.
        product: what reads it; says the shapes of the other arguments.

    Notes:
        The values are those of the composition, bit for bit; in backward x is computed once more if weight needs a
        gradient, and nothing is saved that a frozen weight has no use for. As in PyTorch, under autocast the product
        runs in autocast's dtype, and a layer norm in float32. A promised x cannot be differentiated twice.
    """
    if isinstance(x, Tensor):
        return product.forward(x, weight, bias, residual)
    if torch.is_grad_enabled() and weight.requires_grad:
        return _Chain.apply(x.function, product, *x.inputs, *register.autocast(weight, bias, residual))
    return product.forward(x.now(), weight, bias, residual)


def group_norm_silu(norm: nn.GroupNorm, x: Tensor, addend: Maybe = None, activation: str | None = "silu") -> Later:
    """cnkernels.group_norm_silu with the groups and parameters of `norm`."""
    return Later(GroupNormSiLU(norm.num_groups, norm.eps, activation), (x, norm.weight, norm.bias, addend))


def layer_norm(norm: nn.LayerNorm, x: Tensor) -> Later:
    """The layer norm over the last dimension; computed in float32 under autocast."""
    narrow = x.dtype == torch.float64 or not torch.is_autocast_enabled(x.device.type)
    return Later(LayerNorm(norm.eps, x.dtype if narrow else torch.float32), (x, norm.weight, norm.bias, None))


def silu(x: Tensor) -> Later:
    return Later(SiLU(), (x, None, None, None))


def geglu(projected: Tensor) -> Later:
    """cnkernels.geglu."""
    return Later(GEGLU(), (projected, None, None, None))


@dataclass(frozen=True)
class GroupNormSiLU:
    """cnkernels.group_norm_silu(x, groups, weight, bias, eps, activation, addend) of (x, weight, bias, addend)."""

    groups: int
    eps: float
    activation: str | None

    def forward(self, x: Tensor, weight: Maybe, bias: Maybe, addend: Maybe) -> tuple[Tensor, ...]:
        """The result, and what backward needs besides the inputs."""
        return torch.ops.cnkernels.group_norm_silu(x, self.groups, weight, bias, self.eps, self.activation, addend)

    def again(self, x: Tensor, weight: Maybe, bias: Maybe, addend: Maybe) -> Tensor:
        return torch.ops.cnkernels.group_norm_silu_again(
            x, self.groups, weight, bias, self.eps, self.activation, addend
        )

    def backward(self, dy: Tensor, inputs: Inputs, saved: tuple[Tensor, ...], need: list[bool]) -> list[Maybe]:
        x, weight, bias, addend = inputs
        gradients = torch.ops.cnkernels.group_norm_silu_backward(
            dy, x, self.groups, weight, bias, *saved, self.activation, addend, need
        )
        return register.spread(gradients, need)


@dataclass(frozen=True)
class LayerNorm:
    """torch.nn.functional.layer_norm over the last dimension of (x, weight, bias, None)."""

    eps: float
    dtype: torch.dtype  # in which it is computed

    def forward(self, x: Tensor, weight: Maybe, bias: Maybe, _: Maybe) -> tuple[Tensor, ...]:
        x, weight, bias = (None if t is None else t.to(self.dtype) for t in (x, weight, bias))
        return torch.native_layer_norm(x, x.shape[-1:], weight, bias, self.eps)

    def again(self, *inputs: Maybe) -> Tensor:
        return self.forward(*inputs)[0]

    def backward(self, dy: Tensor, inputs: Inputs, saved: tuple[Tensor, ...], need: list[bool]) -> list[Maybe]:
        given = inputs[:3]
        x, weight, bias = (None if t is None else t.to(self.dtype) for t in given)
        gradients = torch.ops.aten.native_layer_norm_backward(
            dy, x, x.shape[-1:], *saved, weight, bias, [need[0], need[1], need[2]]
        )
        wanted = zip(gradients, given, need, strict=False)
        return [*(gradient.to(t.dtype) if needed else None for gradient, t, needed in wanted), None]


@dataclass(frozen=True)
class SiLU:
    """torch.nn.functional.silu of (x, None, None, None)."""

    def forward(self, x: Tensor, *_: Maybe) -> tuple[Tensor, ...]:
        return (F.silu(x),)

    def again(self, x: Tensor, *_: Maybe) -> Tensor:
        return F.silu(x)

    def backward(self, dy: Tensor, inputs: Inputs, saved: tuple[Tensor, ...], need: list[bool]) -> list[Maybe]:
        return [torch.ops.aten.silu_backward(dy, inputs[0]), None, None, None]


@dataclass(frozen=True)
class GEGLU:
    """cnkernels.geglu of (projected, None, None, None)."""

    def forward(self, projected: Tensor, *_: Maybe) -> tuple[Tensor, ...]:
        return (torch.ops.cnkernels.geglu(projected),)

    def again(self, projected: Tensor, *_: Maybe) -> Tensor:
        return torch.ops.cnkernels.geglu_again(projected)

    def backward(self, dy: Tensor, inputs: Inputs, saved: tuple[Tensor, ...], need: list[bool]) -> list[Maybe]:
        return [torch.ops.cnkernels.geglu_backward(dy, inputs[0]), None, None, None]


@dataclass(frozen=True)
class Conv:
    """A convolution with `stride` and `padding` in both dimensions."""

    stride: int = 1
    padding: int = 0

    def forward(self, x: Tensor, weight: Tensor, bias: Maybe, _: None) -> Tensor:
        return conv2d(x, weight, bias, self.stride, self.padding)

    def backward(self, dout: Tensor, x: Tensor, weight: Tensor, bias: Maybe, need: list[bool]) -> list[Maybe]:
        return _conv_backward(dout, x, weight, bias, self.stride, self.padding, need)


@dataclass(frozen=True)
class Linear:
    """torch.nn.functional.linear of tokens [N, S, C], or of the pixels of an image [N, C, H, W] as tokens."""

    def forward(self, x: Tensor, weight: Tensor, bias: Maybe, _: None) -> Tensor:
        return linear(_tokens(x), weight, bias)

    def backward(self, dout: Tensor, x: Tensor, weight: Tensor, bias: Maybe, need: list[bool]) -> list[Maybe]:
        rows = dout.flatten(0, -2)
        dx = (rows @ weight).view(*dout.shape[:-1], weight.shape[1]) if need[0] else None
        if dx is not None and x.dim() == 4:
            dx = dx.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
        dweight = rows.t() @ _tokens(x).flatten(0, -2) if need[1] else None
        return [dx, dweight, rows.sum(0) if need[2] else None]


@dataclass(frozen=True)
class LinearAdd:
    """residual + linear(x) over tokens [N, S, C], as one cnkernels.zero_conv_add."""

    def forward(self, x: Tensor, weight: Tensor, bias: Maybe, residual: Tensor) -> Tensor:
        return _row(conv1x1_add(_column(x), weight[:, :, None, None], bias, _column(residual)))

    def backward(self, dout: Tensor, x: Tensor, weight: Tensor, bias: Maybe, need: list[bool]) -> list[Maybe]:
        need = [*need, False]
        gradients = torch.ops.cnkernels.zero_conv_add_backward(
            _column(dout), _column(x), weight[:, :, None, None], bias, None, 1.0, True, need
        )
        dx, dweight, dbias, _ = register.spread(gradients, need)
        return [dx if dx is None else _row(dx), dweight if dweight is None else dweight.view(weight.shape), dbias]


def _column(tokens: Tensor) -> Tensor:
    """[N, S, C] -> [N, C, S, 1], a channels_last view."""
    return tokens.transpose(1, 2).unsqueeze(3)


def _row(column: Tensor) -> Tensor:
    return column.squeeze(3).transpose(1, 2)


def _tokens(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, H * W, C], a view if channels_last; tokens as they are."""
    return x.permute(0, 2, 3, 1).flatten(1, 2) if x.dim() == 4 else x


def _conv_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Maybe, stride: int, padding: int, need: list[bool]
) -> list[Maybe]:
    sizes = None if bias is None else [bias.shape[0]]
    return torch.ops.aten.convolution_backward(
        dout, x, weight, sizes, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1, need
    )


class _FrozenConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Maybe, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(weight, bias)
        ctx.shape, ctx.channels_last = x.shape, layout.is_channels_last(x)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Maybe, ...]:
        weight, bias = ctx.saved_tensors
        needs = ctx.needs_input_grad
        # Only the sizes and the memory format of x are read where the gradient of the weight is not asked for.
        memory_format = torch.channels_last if ctx.channels_last else torch.contiguous_format
        x = torch.empty(ctx.shape, dtype=dout.dtype, device=dout.device, memory_format=memory_format)
        need = [needs[0], False, bias is not None and needs[2]]
        dx, _, dbias = _conv_backward(dout, x, weight, bias, ctx.stride, ctx.padding, need)
        return dx, None, dbias if need[2] else None, None, None


class _Chain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Any, product: Any, x, a, b, c, weight, bias, residual) -> Tensor:
        y, *saved = function.forward(x, a, b, c)
        ctx.function, ctx.product, ctx.dtype = function, product, y.dtype
        ctx.save_for_backward(x, a, b, c, weight, bias, *saved)
        return product.forward(y.to(weight.dtype), weight, bias, residual)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Maybe, ...]:
        x, a, b, c, weight, bias, *saved = ctx.saved_tensors
        needs = ctx.needs_input_grad
        need_inputs = [needs[2], needs[3], needs[4], needs[5]]
        need_product = [any(need_inputs), needs[6], needs[7]]
        y = ctx.function.again(x, a, b, c).to(weight.dtype)
        dy, dweight, dbias = ctx.product.backward(dout, y, weight, bias, need_product)
        gradients = [None] * 4
        if need_product[0]:
            gradients = ctx.function.backward(dy.to(ctx.dtype), (x, a, b, c), saved, need_inputs)
        return None, None, *gradients, dweight, dbias if needs[7] else None, dout if needs[8] else None


# Ops of their own, because a compiler that met the forward's op again in backward would merge the two and keep the
# result, which is what is to be avoided.
register.op(
    "group_norm_silu_again",
    "(Tensor x, int groups, Tensor? weight, Tensor? bias, float eps, str? activation, Tensor? addend) -> Tensor",
    lambda *arguments: torch.ops.cnkernels.group_norm_silu(*arguments)[0],
    lambda *arguments: group_norm_registration.fake_forward(*arguments)[0],
)
register.op(
    "geglu_again",
    "(Tensor projected) -> Tensor",
    lambda projected: torch.ops.cnkernels.geglu(projected),
    geglu_registration.fake_forward,
)
