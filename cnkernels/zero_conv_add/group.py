"""torch.ops.cnkernels.zero_conv_add_group, its out variant and its backward: zero_conv_add for a list of layers.

torch.library follows gradients only through lists without None. So the ops take each argument's tensors without the
gaps, and `given`, argument by argument and layer by layer, says where there is one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cnkernels import dispatch, layout, register
from cnkernels.errors import expect
from cnkernels.zero_conv_add import registration

_NAME = "zero_conv_add_group"
_OP = "zero_conv_add"  # by whose name backends are chosen

Column = Sequence[Tensor | None]  # one argument of every layer


def pack(columns: Sequence[Column]) -> tuple[list[list[Tensor]], list[bool]]:
    return [[t for t in column if t is not None] for column in columns], [t is not None for c in columns for t in c]


def _unpack(lists: Sequence[Sequence[Tensor]], given: Sequence[bool]) -> list[Column]:
    count = len(given) // len(lists)
    return [register.spread(tensors, given[i * count : (i + 1) * count]) for i, tensors in enumerate(lists)]


def _layers(lists, given, factors) -> list[tuple]:
    """(x, weight, bias, residual, scale, factor) of each layer, validated."""
    layers = list(zip(*_unpack(lists, given), factors, strict=True))
    first = layers[0][0]
    for index, layer in enumerate(layers):
        name, x = f"{_NAME}, layer {index}", layer[0]
        registration.validate(name, *layer[:5])
        expect(x.dtype == first.dtype, name, "x", f"of the first layer's dtype, {first.dtype}", x.dtype)
        expect(x.device == first.device, name, "x", f"on the first layer's device, {first.device}", x.device)
    return layers


def _run(direction: str, calls: list[tuple], x_index: int) -> list:
    """One launch where the backend of the largest layer has one for a group, else one call after the other."""
    if not calls:
        return []
    largest = max((call[x_index] for call in calls), key=Tensor.numel)
    kernels = dispatch.implementation(_OP, largest)
    together = getattr(kernels, f"{_NAME}_{direction}", None)
    if together is not None:
        return together(calls)
    alone = getattr(kernels, f"{_OP}_{direction}")
    return [alone(*call) for call in calls]


def _forward_into(layers: Sequence[tuple], outs: Sequence[Tensor]) -> None:
    pairs = zip(layers, outs, strict=True)
    _run("fwd", [registration.call_of(*layer, out) for layer, out in pairs if out.numel()], x_index=0)


def _new_outs(layers: Sequence[tuple]) -> list[Tensor]:
    return [registration.new_out(x, weight) for x, weight, *_ in layers]


def _forward(xs, weights, biases, residuals, scales, given, factors):
    layers = _layers((xs, weights, biases, residuals, scales), given, factors)
    outs = _new_outs(layers)
    _forward_into(layers, outs)
    return outs


def _fake_forward(xs, weights, biases, residuals, scales, given, factors):
    return _new_outs(_layers((xs, weights, biases, residuals, scales), given, factors))


def _forward_out(xs, weights, biases, residuals, scales, given, factors, outs):
    layers = _layers((xs, weights, biases, residuals, scales), given, factors)
    for index, (layer, out) in enumerate(zip(layers, outs, strict=True)):
        registration.validate_out(f"{_NAME}, layer {index}", out, *layer[:2])
    _expect_apart(outs, (*xs, *weights, *biases, *residuals, *scales))
    _forward_into(layers, outs)


def _expect_apart(outs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
    """That no output overlaps another or an input, of any layer: they are written in no order."""
    in_storage = {}
    for tensor in inputs:
        in_storage.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
    for index, out in enumerate(outs):
        beside = in_storage.setdefault(out.untyped_storage().data_ptr(), [])
        overlap = any(layout.overlap(out, tensor) for tensor in beside)
        beside.append(out)
        expect(not overlap, _NAME, f"outs[{index}]", "apart from all other tensors in memory", "one that overlaps")


def _fake_forward_out(xs, weights, biases, residuals, scales, given, factors, outs):
    layers = _layers((xs, weights, biases, residuals, scales), given, factors)
    for index, (layer, out) in enumerate(zip(layers, outs, strict=True)):
        x, weight, *_ = layer
        registration.expect_like(f"{_NAME}, layer {index}", x, "out", out, registration.out_shape(x, weight))


def _backward_rows(lists, given, factors, channels_last, need) -> list[tuple]:
    """(dout, x or None, weight, bias, scale, factor, channels_last, need) of each layer."""
    needs = [need[i : i + 4] for i in range(0, len(need), 4)]
    return list(zip(*_unpack(lists, given), factors, channels_last, needs, strict=True))


def _backward(douts, xs, weights, biases, scales, given, factors, channels_last, need):
    rows = _backward_rows((douts, xs, weights, biases, scales), given, factors, channels_last, need)
    calls = [registration.backward_call_of(*row) for row in rows]
    computed = iter(_run("bwd", [call for call in calls if not registration.is_empty(call)], x_index=1))
    gradients = []
    for row, call in zip(rows, calls, strict=True):
        *_, scale, _, _, wanted = row
        gradients += registration.asked_for(
            None if registration.is_empty(call) else next(computed), call, scale, wanted
        )
    return gradients


def _fake_backward(douts, xs, weights, biases, scales, given, factors, channels_last, need):
    rows = _backward_rows((douts, xs, weights, biases, scales), given, factors, channels_last, need)
    return [gradient for row in rows for gradient in registration.fake_backward(*row)]


def _setup_context(ctx, inputs, output):
    *lists, ctx.given, ctx.factors = inputs
    xs, weights, biases, _, scales = _unpack(lists, ctx.given)
    ctx.set_materialize_grads(False)
    ctx.channels_last = [layout.is_channels_last(x) for x in xs]
    saved = [
        x if weight.requires_grad or _differentiable(scale) else None
        for x, weight, scale in zip(xs, weights, scales, strict=True)
    ]
    ctx.save_for_backward(*saved, *weights, *biases, *scales)


def _differentiable(t: Tensor | None) -> bool:
    return t is not None and t.requires_grad


def _autograd(ctx, douts):
    count = len(douts)
    of_xs, of_weights, of_biases, of_residuals, of_scales = _unpack(ctx.needs_input_grad[:5], ctx.given)
    needs = [
        [bool(wanted) and dout is not None for wanted in row]
        for dout, *row in zip(douts, of_xs, of_weights, of_biases, of_scales, strict=True)
    ]
    gradients = iter(_backward_op(ctx, douts, needs))
    dx, dweight, dbias, dscale = zip(*(register.spread(gradients, need) for need in needs), strict=True)
    dresidual = [dout if wanted else None for dout, wanted in zip(douts, of_residuals, strict=True)]
    columns = (dx, dweight, dbias, dresidual, dscale)
    lists = [register.needed(c, ctx.given[i * count : (i + 1) * count]) for i, c in enumerate(columns)]
    return (*lists, None, None)


def _backward_op(ctx, douts: Column, needs: Sequence[Sequence[bool]]) -> list[Tensor]:
    """The gradients asked for, from the layers of which any is."""
    count = len(douts)
    asked = [index for index in range(count) if any(needs[index])]
    if not asked:
        return []
    columns = [douts, *(ctx.saved_tensors[i * count : (i + 1) * count] for i in range(4))]
    lists, given = pack([[column[index] for index in asked] for column in columns])
    factors, channels_last = ([values[index] for index in asked] for values in (ctx.factors, ctx.channels_last))
    need = [wanted for index in asked for wanted in needs[index]]
    return torch.ops.cnkernels.zero_conv_add_group_backward(*lists, given, factors, channels_last, need)


_ARGUMENTS = (
    "Tensor[] xs, Tensor[] weights, Tensor[] biases, Tensor[] residuals, Tensor[] scales, bool[] given, float[] factors"
)

register.op(
    _NAME, f"({_ARGUMENTS}) -> Tensor[]", _forward, _fake_forward, setup_context=_setup_context, autograd=_autograd
)
register.op(
    f"{_NAME}_out", f"({_ARGUMENTS}, Tensor(a!)[] outs) -> ()", _forward_out, _fake_forward_out, differentiable=False
)
register.op(
    f"{_NAME}_backward",
    "(Tensor[] douts, Tensor[] xs, Tensor[] weights, Tensor[] biases, Tensor[] scales, bool[] given, float[] factors, "
    "bool[] channels_last, bool[] need) -> Tensor[]",
    _backward,
    _fake_backward,
)
