"""Layers that keep less for backward than autograd's composition of the same operations, for the same values.

PyTorch's convolution saves its input even where its weight is frozen: `conv2d` does not. A trainable layer needs its
input for the gradient of its weight, but where that input is a normalised activation or a gated product, it follows
from what is saved anyway: `chain` computes it again in backward.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cnkernels
from cnkernels import layout, onednn, plans, register
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
    return register.record_or_apply(_FrozenConv, *register.autocast(x, weight, bias), stride, padding)


def _on_onednn(x: Tensor) -> bool:
    """Whether to call oneDNN directly: on a CPU, without autograd, autocast and compilers."""
    if torch.is_grad_enabled() or torch._C._is_any_autocast_enabled() or torch.compiler.is_compiling():
        return False
    return onednn.serves(x)


def linear(x: Tensor, weight: Tensor, bias: Maybe = None) -> Tensor:
    """`torch.nn.functional.linear`, or oneDNN's."""
    return onednn.linear(x, weight, bias) if _on_onednn(x) else F.linear(x, weight, bias)


def linear_add(x: Tensor, weight: Tensor, bias: Maybe, residual: Tensor) -> Tensor:
    """residual + linear(x) for x [..., K], weight [N, K], bias [N] or None, residual [..., N].

    A product of PyTorch's and an addition: oneDNN has them in one call, cuBLAS behind PyTorch not with a bias.
    """
    if _on_onednn(x):
        return onednn.linear_add(x, weight, bias, residual)
    return _added(F.linear(x, weight, bias), residual)


def pixels_add(tokens: Tensor, weight: Tensor, bias: Maybe, image: Tensor) -> Tensor:
    """image + linear(tokens) as an image: tokens [N, H * W, K], weight [Cout, K], image [N, Cout, H, W], its format."""
    n, channels, height, width = image.shape
    if _on_onednn(tokens) and layout.is_channels_last(image):
        rows = onednn.linear_add(tokens, weight, bias, image.permute(0, 2, 3, 1).reshape(n, -1, channels))
        return rows.view(n, height, width, channels).permute(0, 3, 1, 2)
    rows = linear(tokens, weight, bias).view(n, height, width, channels)
    return _added(rows.permute(0, 3, 1, 2), image, first=True)


def conv1x1_add(x: Tensor, weight: Tensor, bias: Maybe, residual: Tensor) -> Tensor:
    """residual + a 1x1 convolution: x [N, Cin, H, W], weight [Cout, Cin, 1, 1], residual [N, Cout, H, W]."""
    if _on_onednn(x):
        if layout.is_channels_last(x):
            tokens = x.permute(0, 2, 3, 1).flatten(1, 2)
            return pixels_add(tokens, weight.flatten(1), bias, layout.match(residual, x))
        return onednn.conv1x1(x, weight, bias).add_(residual)
    return _added(conv2d(x, weight, bias), residual)


def _added(y: Tensor, residual: Tensor, first: bool = False) -> Tensor:
    """residual + y in y's dtype, which is autocast's where that is on; `first`: in the residual's memory format."""
    residual = residual if residual.dtype == y.dtype else residual.to(y.dtype)
    return residual + y if first else y + residual


class Promise(Protocol):
    """A function of up to four inputs that is deferred, and computed again in backward instead of being saved."""

    def value(self, x: Tensor, a: Maybe, b: Maybe, c: Maybe) -> Tensor:
        """Differentiable."""

    def forward(self, x: Tensor, a: Maybe, b: Maybe, c: Maybe) -> tuple[Tensor, ...]:
        """The value, and what backward needs besides the inputs; without gradients."""

    def again(self, x: Tensor, a: Maybe, b: Maybe, c: Maybe) -> Tensor:
        """The value, recomputed in backward."""

    def backward(
        self, dy: Tensor, inputs: Inputs, saved: tuple[Tensor, ...], need: tuple[bool, ...]
    ) -> tuple[Maybe, ...]:
        """The gradients of the four inputs, None where not needed."""


class Product(Protocol):
    """The layer that reads a deferred x: a convolution or a linear layer."""

    saves_frozen: bool  # whether PyTorch saves x even where the weight is frozen

    def forward(self, x: Tensor, weight: Tensor, bias: Maybe, residual: Maybe) -> Tensor: ...

    def backward(self, dout: Tensor, x: Tensor, weight: Tensor, bias: Maybe, need: list[bool]) -> list[Maybe]:
        """The gradients of x, weight and bias; the values of x are read only for the gradient of weight."""


class Later(NamedTuple):
    """A deferred activation, promise(*inputs): the argument of `chain`."""

    promise: Promise
    inputs: Inputs

    def now(self) -> Tensor:
        return self.promise.value(*self.inputs)


def chain(x: Tensor | Later, product: Product, weight: Tensor, bias: Maybe = None, residual: Maybe = None) -> Tensor:
    """product(x, weight, bias) + residual, which saves the inputs of an x that is yet to be computed, and not x.

    Args:
        x: a tensor, or a deferred activation of `group_norm_silu`, `layer_norm`, `silu` or `geglu` of this module.
        product: the layer that reads it; says the shapes of the other arguments.

    Notes:
        The values are those of the composition, bit for bit. In backward x is recomputed if weight needs a gradient; it
        is not saved for a frozen weight either. As in PyTorch, under autocast the product runs in autocast's dtype, and
        a layer norm in float32.
    """
    if isinstance(x, Tensor):
        return product.forward(x, weight, bias, residual)
    promise, inputs = x
    if torch.is_grad_enabled() and (weight.requires_grad or (product.saves_frozen and plans.recorded(*inputs))):
        arguments = register.autocast(weight, bias, residual)
        return register.record_or_apply(_Chain, promise, product, *inputs, *arguments)
    return product.forward(promise.value(*inputs), weight, bias, residual)


def group_norm_silu(norm: nn.GroupNorm, x: Tensor, addend: Maybe = None, activation: str | None = "silu") -> Later:
    """cnkernels.group_norm_silu with the groups and parameters of `norm`."""
    return Later(_PromisedGroupNorm(norm.num_groups, norm.eps, activation), (x, norm.weight, norm.bias, addend))


def layer_norm(norm: nn.LayerNorm, x: Tensor) -> Later:
    """The layer norm over the last dimension; computed in float32 under autocast."""
    dtype = x.dtype
    if dtype != torch.float64 and torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
        dtype = torch.float32
    return Later(_PromisedLayerNorm(norm.eps, dtype), (x, norm.weight, norm.bias, None))


def silu(x: Tensor) -> Later:
    return Later(_PromisedSiLU(), (x, None, None, None))


def geglu(projected: Tensor) -> Later:
    """cnkernels.geglu."""
    return Later(_PromisedGEGLU(), (projected, None, None, None))


class _PromisedGroupNorm(NamedTuple):
    """cnkernels.group_norm_silu(x, groups, weight, bias, eps, activation, addend) of (x, weight, bias, addend)."""

    groups: int
    eps: float
    activation: str | None

    def value(self, x: Tensor, weight: Maybe, bias: Maybe, addend: Maybe) -> Tensor:
        return cnkernels.group_norm_silu(x, self.groups, weight, bias, self.eps, self.activation, addend)

    def forward(self, x: Tensor, weight: Maybe, bias: Maybe, addend: Maybe) -> tuple[Tensor, ...]:
        return group_norm_registration.call(x, self.groups, weight, bias, self.eps, self.activation, addend)

    def again(self, x: Tensor, weight: Maybe, bias: Maybe, addend: Maybe) -> Tensor:
        arguments = (x, self.groups, weight, bias, self.eps, self.activation, addend)
        if plans.straight(x, weight, bias, addend):
            return group_norm_registration.forward(*arguments)[0]
        return torch.ops.cnkernels.group_norm_silu_again(*arguments)

    def backward(
        self, dy: Tensor, inputs: Inputs, saved: tuple[Tensor, ...], need: tuple[bool, ...]
    ) -> tuple[Maybe, ...]:
        x, weight, bias, addend = inputs
        return group_norm_registration.gradients(
            dy, x, self.groups, weight, bias, *saved, self.activation, addend, need
        )


class _PromisedLayerNorm(NamedTuple):
    """torch.nn.functional.layer_norm over the last dimension of (x, weight, bias, None)."""

    eps: float
    dtype: torch.dtype  # in which it is computed

    def _cast(self, x: Tensor, weight: Maybe, bias: Maybe) -> tuple[Tensor, Maybe, Maybe]:
        dtype = self.dtype
        if x.dtype == dtype and (weight is None or weight.dtype == dtype) and (bias is None or bias.dtype == dtype):
            return x, weight, bias
        return tuple(None if t is None else t.to(dtype) for t in (x, weight, bias))

    def value(self, x: Tensor, weight: Maybe, bias: Maybe, _: Maybe) -> Tensor:
        x, weight, bias = self._cast(x, weight, bias)
        return F.layer_norm(x, x.shape[-1:], weight, bias, self.eps)

    def forward(self, x: Tensor, weight: Maybe, bias: Maybe, _: Maybe) -> tuple[Tensor, ...]:
        x, weight, bias = self._cast(x, weight, bias)
        return torch.native_layer_norm(x, x.shape[-1:], weight, bias, self.eps)

    def again(self, *inputs: Maybe) -> Tensor:
        return self.forward(*inputs)[0]

    def backward(
        self, dy: Tensor, inputs: Inputs, saved: tuple[Tensor, ...], need: tuple[bool, ...]
    ) -> tuple[Maybe, ...]:
        given = inputs[:3]
        x, weight, bias = self._cast(*given)
        gradients = torch.ops.aten.native_layer_norm_backward(dy, x, x.shape[-1:], *saved, weight, bias, need[:3])
        if x is given[0] and weight is given[1] and bias is given[2]:
            return *gradients, None  # of the dtypes of the inputs, and None where not needed
        requested = zip(gradients, given, need, strict=False)
        return *(gradient.to(t.dtype) if wanted else None for gradient, t, wanted in requested), None


class _PromisedSiLU(NamedTuple):
    """torch.nn.functional.silu of (x, None, None, None)."""

    def value(self, x: Tensor, *_: Maybe) -> Tensor:
        return F.silu(x)

    def forward(self, x: Tensor, *_: Maybe) -> tuple[Tensor, ...]:
        return (F.silu(x),)

    def again(self, x: Tensor, *_: Maybe) -> Tensor:
        return F.silu(x)

    def backward(
        self, dy: Tensor, inputs: Inputs, saved: tuple[Tensor, ...], need: tuple[bool, ...]
    ) -> tuple[Maybe, ...]:
        x = inputs[0]
        if torch.is_grad_enabled():  # PyTorch's operation has no derivative
            gate = torch.sigmoid(x)
            return dy * gate * (1 + x * (1 - gate)), None, None, None
        return torch.ops.aten.silu_backward(dy, x), None, None, None


class _PromisedGEGLU(NamedTuple):
    """cnkernels.geglu of (projected, None, None, None)."""

    def value(self, projected: Tensor, *_: Maybe) -> Tensor:
        return cnkernels.geglu(projected)

    def forward(self, projected: Tensor, *_: Maybe) -> tuple[Tensor, ...]:
        return (geglu_registration.call(projected),)

    def again(self, projected: Tensor, *_: Maybe) -> Tensor:
        if plans.straight(projected):
            return geglu_registration.forward(projected)
        return torch.ops.cnkernels.geglu_again(projected)

    def backward(
        self, dy: Tensor, inputs: Inputs, saved: tuple[Tensor, ...], need: tuple[bool, ...]
    ) -> tuple[Maybe, ...]:
        return geglu_registration.gradient(dy, inputs[0]), None, None, None


class ConvProduct(NamedTuple):
    """A convolution with `stride` and `padding` in both dimensions; takes no residual."""

    stride: int = 1
    padding: int = 0
    saves_frozen = True

    def forward(self, x: Tensor, weight: Tensor, bias: Maybe, _: None) -> Tensor:
        return conv2d(x, weight, bias, self.stride, self.padding)

    def backward(self, dout: Tensor, x: Tensor, weight: Tensor, bias: Maybe, need: list[bool]) -> list[Maybe]:
        return _conv_backward(dout, x, weight, bias, self.stride, self.padding, need)


class LinearProduct(NamedTuple):
    """A linear layer of tokens [N, S, C], or of the pixels of an image [N, C, H, W] as tokens; may add a residual."""

    saves_frozen = False

    def forward(self, x: Tensor, weight: Tensor, bias: Maybe, residual: Maybe) -> Tensor:
        x = _tokens(x)
        return linear(x, weight, bias) if residual is None else linear_add(x, weight, bias, residual)

    def backward(self, dout: Tensor, x: Tensor, weight: Tensor, bias: Maybe, need: list[bool]) -> list[Maybe]:
        rows = dout.flatten(0, -2)
        dx = (rows @ weight).view(*dout.shape[:-1], weight.shape[1]) if need[0] else None
        if dx is not None and x.dim() == 4:
            dx = dx.view(*dx.shape[:1], *x.shape[2:], -1).permute(0, 3, 1, 2)
        dweight = rows.t() @ _tokens(x).flatten(0, -2) if need[1] else None
        return [dx, dweight, rows.sum(0) if need[2] else None]


LINEAR = LinearProduct()


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


class _FrozenConv(register.EagerFunction):
    """A convolution that does not save x, for a weight without a gradient."""

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
        x = _placeholder(ctx.shape, ctx.channels_last, dout)
        need = [needs[0], False, bias is not None and needs[2]]
        dx, _, dbias = _conv_backward(dout, x, weight, bias, ctx.stride, ctx.padding, need)
        return dx, None, dbias if need[2] else None, None, None


def _placeholder(shape: torch.Size, channels_last: bool, dout: Tensor) -> Tensor:
    """Stands for x where a convolution's backward reads only its shape and memory format."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dout.dtype, device=dout.device, memory_format=memory_format)


class _Chain(register.EagerFunction):
    """product(promise(x, a, b, c), weight, bias) + residual, which does not save what the promise computes."""

    @staticmethod
    def forward(ctx: Any, promise: Promise, product: Product, x, a, b, c, weight, bias, residual) -> Tensor:
        y, *saved = promise.forward(x, a, b, c)
        ctx.promise, ctx.product, ctx.dtype = promise, product, y.dtype
        if not ctx.needs_input_grad[6]:  # y is not recomputed
            ctx.shape, ctx.channels_last = y.shape, layout.is_channels_last(y)
        ctx.save_for_backward(x, a, b, c, weight, bias, *saved)
        return product.forward(y if y.dtype == weight.dtype else y.to(weight.dtype), weight, bias, residual)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Maybe, ...]:
        x, a, b, c, weight, bias, *saved = ctx.saved_tensors
        needs = ctx.needs_input_grad
        need_inputs = tuple(needs[2:6])
        need_product = [any(need_inputs), needs[6], needs[7]]
        if needs[6]:
            # For gradients of gradients (create_graph=True) y must be a function of its inputs.
            y = ctx.promise.value(x, a, b, c) if torch.is_grad_enabled() else ctx.promise.again(x, a, b, c)
            y = y if y.dtype == weight.dtype else y.to(weight.dtype)
        else:
            y = _placeholder(ctx.shape, ctx.channels_last, dout)
        dy, dweight, dbias = ctx.product.backward(dout, y, weight, bias, need_product)
        gradients = [None] * 4
        if need_product[0]:
            gradients = ctx.promise.backward(
                dy if dy.dtype == ctx.dtype else dy.to(ctx.dtype), (x, a, b, c), saved, need_inputs
            )
        return None, None, *gradients, dweight, dbias if needs[7] else None, dout if needs[8] else None


# Recomputation has ops of its own: a compiler that met the forward's op in backward would merge the two and keep the
# result in memory.
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
