"""torch.ops.cnkernels.zero_conv_add_group, its out variant and its backward: zero_conv_add for a list of layers.

torch.library follows gradients only through lists without None. So the ops take each argument's tensors without the
gaps, and `given`, argument by argument and layer by layer, says where there is one.
"""

from collections.abc import Callable, Iterable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from cnkernels import dispatch, layout, plans, register
from cnkernels.register import expect
from cnkernels.zero_conv_add import registration

_NAME = "zero_conv_add_group"
_OP = "zero_conv_add"  # by whose name backends are chosen
_FORWARD, _FORWARD_OUT, _BACKWARD = plans.Plans(), plans.Plans(), plans.Plans()

Column = Sequence[Tensor | None]  # one argument of every layer


def pack(columns: Sequence[Column]) -> tuple[list[list[Tensor]], list[bool]]:
    return [[t for t in column if t is not None] for column in columns], [t is not None for c in columns for t in c]


def unpack(lists: Sequence[Sequence[Tensor]], given: Sequence[bool]) -> list[Column]:
    count = len(given) // len(lists)
    return [register.restore_none(tensors, given[i * count : (i + 1) * count]) for i, tensors in enumerate(lists)]


def _validate(layers: Sequence[tuple]) -> None:
    """Of layers (x, weight, bias, residual, scale, factor)."""
    first = layers[0][0]
    for index, layer in enumerate(layers):
        name, x = f"{_NAME}, layer {index}", layer[0]
        registration.validate(name, *layer[:5])
        expect(x.dtype == first.dtype, name, "x", f"of the first layer's dtype, {first.dtype}", x.dtype)
        expect(x.device == first.device, name, "x", f"on the first layer's device, {first.device}", x.device)


def _kernels(xs: Iterable[Tensor], direction: str = "forward") -> ModuleType:
    """Those that serve the largest layer serve the group; several layers are one launch in CUDA."""
    xs = list(xs)
    return dispatch.implementation(
        _OP, max(xs, key=Tensor.numel), direction=direction, first="cuda" if len(xs) > 1 else None
    )


def _of_layers(layers: Sequence[tuple], tensors: int) -> tuple:
    return tuple(plans.of(t) for layer in layers for t in layer[:tensors])


def forward(layers: Sequence[tuple]) -> list[Tensor]:
    """Of layers (x, weight, bias, residual, scale, factor)."""
    key = (_of_layers(layers, 5), dispatch.current())
    plan = _FORWARD.get(key) or _FORWARD.add(key, _plan_forward(layers))
    return plan(layers)


def _plan_forward(layers: Sequence[tuple]) -> Callable[[Sequence[tuple]], list[Tensor]]:
    _validate(layers)
    if layers[0][0].is_meta:
        return _new_outs
    recipes = [registration.plan_out(x, weight) for x, weight, *_ in layers]
    new = [recipe for recipe, _ in recipes]
    into = _plan_into(layers, [like for _, like in recipes])

    def run(layers):
        outs = [make(layer[0]) for make, layer in zip(new, layers, strict=True)]
        into(layers, outs)
        return outs

    return run


def _plan_into(layers: Sequence[tuple], outs: Sequence[Tensor]) -> Callable[[Sequence[tuple], Sequence[Tensor]], None]:
    """One launch where the backend has one for a group, else one call after the other."""
    kernels = _kernels(layer[0] for layer in layers)
    plan_together = getattr(kernels, f"{_NAME}_fwd_plan", None)
    if plan_together is None:
        alone = [registration.plan_into(*given, out, kernels) for given, out in zip(layers, outs, strict=True)]

        def one_by_one(layers, outs):
            for run, layer, out in zip(alone, layers, outs, strict=True):
                run(*layer, out)

        return one_by_one

    def calls_of(layers, outs):
        pairs = zip(layers, outs, strict=True)
        return [registration.call_of(*layer, out) for layer, out in pairs if out.numel()]

    calls = calls_of(layers, outs)
    together = plan_together(calls) if calls else lambda calls: None
    return lambda layers, outs: together(calls_of(layers, outs))


def _new_outs(layers: Sequence[tuple]) -> list[Tensor]:
    return [registration.new_out(x, weight) for x, weight, *_ in layers]


def _rows(lists: Sequence[Sequence[Tensor]], given: Sequence[bool], factors: Sequence[float]) -> list[tuple]:
    return list(zip(*unpack(lists, given), factors, strict=True))


def _forward(xs, weights, biases, residuals, scales, given, factors):
    return forward(_rows((xs, weights, biases, residuals, scales), given, factors))


def _fake_forward(xs, weights, biases, residuals, scales, given, factors):
    layers = _rows((xs, weights, biases, residuals, scales), given, factors)
    _validate(layers)
    return _new_outs(layers)


def forward_out(layers: Sequence[tuple], outs: Sequence[Tensor]) -> None:
    key = (_of_layers(layers, 5), tuple(map(plans.of, outs)), dispatch.current())
    plan = _FORWARD_OUT.get(key) or _FORWARD_OUT.add(key, _plan_forward_out(layers, outs))
    _expect_apart(outs, [t for layer in layers for t in layer[:5] if t is not None])
    plan(layers, outs)


def _plan_forward_out(layers, outs):
    _validate(layers)
    for index, (layer, out) in enumerate(zip(layers, outs, strict=True)):
        registration.validate_out(f"{_NAME}, layer {index}", out, *layer[:2])
    return _plan_into(layers, outs)


def _forward_out(xs, weights, biases, residuals, scales, given, factors, outs):
    forward_out(_rows((xs, weights, biases, residuals, scales), given, factors), outs)


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
    layers = _rows((xs, weights, biases, residuals, scales), given, factors)
    _validate(layers)
    for index, ((x, weight, *_), out) in enumerate(zip(layers, outs, strict=True)):
        registration.expect_like(f"{_NAME}, layer {index}", x, "out", out, registration.out_shape(x, weight))


def backward(rows: Sequence[tuple]) -> list[tuple[Tensor | None, ...]]:
    """(dx, dweight, dbias, dscale) of each (dout, x or None, weight, bias, scale, factor, channels_last, need)."""
    key = (_of_layers(rows, 5), tuple(row[6:] for row in rows), dispatch.current())
    plan = _BACKWARD.get(key) or _BACKWARD.add(key, _plan_backward(rows))
    return plan(rows)


def _plan_backward(rows: Sequence[tuple]) -> Callable[[Sequence[tuple]], list[tuple[Tensor | None, ...]]]:
    kernels = _kernels((registration.backward_call_of(*row)[1] for row in rows), "backward")
    plan_together = getattr(kernels, f"{_NAME}_bwd_plan", None)
    if plan_together is None:
        alone = [registration.plan_backward(*row, kernels) for row in rows]
        return lambda rows: [run(*row) for run, row in zip(alone, rows, strict=True)]

    calls = [registration.backward_call_of(*row) for row in rows]
    some = [call for call in calls if not registration.is_empty(call)]
    together = plan_together(some) if some else lambda calls: []

    def at_once(rows):
        calls = [registration.backward_call_of(*row) for row in rows]
        computed = iter(together([call for call in calls if not registration.is_empty(call)]))
        return [
            registration.zero_gradients(call, row[4], row[7])
            if registration.is_empty(call)
            else registration.as_parameters(next(computed), call[2], row[4], row[7])
            for call, row in zip(calls, rows, strict=True)
        ]

    return at_once


def _backward_rows(lists, given, factors, channels_last, need) -> list[tuple]:
    needs = [tuple(need[i : i + 4]) for i in range(0, len(need), 4)]
    return list(zip(*unpack(lists, given), factors, channels_last, needs, strict=True))


def _backward(douts, xs, weights, biases, scales, given, factors, channels_last, need):
    rows = _backward_rows((douts, xs, weights, biases, scales), given, factors, channels_last, need)
    return [
        t
        for gradients, row in zip(backward(rows), rows, strict=True)
        for t in register.keep_requested(gradients, row[7])
    ]


def _fake_backward(douts, xs, weights, biases, scales, given, factors, channels_last, need):
    rows = _backward_rows((douts, xs, weights, biases, scales), given, factors, channels_last, need)
    return [gradient for row in rows for gradient in registration.fake_backward(*row)]


def _differentiable_backward(douts, xs, weights, biases, scales, given, factors, channels_last, need):
    rows = _backward_rows((douts, xs, weights, biases, scales), given, factors, channels_last, need)
    return [gradient for row in rows for gradient in registration.differentiable_backward(*row)]


def _setup_context(ctx, inputs, output):
    *lists, ctx.given, ctx.factors = inputs
    _save(ctx, *unpack(lists, ctx.given))


def _save(ctx, xs: Column, weights: Column, biases: Column, _: Column, scales: Column) -> None:
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
    columns = _gradients(ctx, douts, unpack(ctx.needs_input_grad[:5], ctx.given))
    lists = [register.keep_requested(c, ctx.given[i * count : (i + 1) * count]) for i, c in enumerate(columns)]
    return (*lists, None, None)


def _gradients(ctx, douts: Column, needed: Sequence[Sequence[bool | None]]) -> list[Column]:
    """Those of xs, weights, biases, residuals and scales that `needed` asks for, column by column as it is."""
    of_xs, of_weights, of_biases, of_residuals, of_scales = needed
    needs = [
        tuple(bool(wanted) and dout is not None for wanted in row)
        for dout, *row in zip(douts, of_xs, of_weights, of_biases, of_scales, strict=True)
    ]
    count = len(douts)
    saved = [ctx.saved_tensors[i * count : (i + 1) * count] for i in range(4)]
    rows = list(zip(douts, *saved, ctx.factors, ctx.channels_last, needs, strict=True))
    asked = [index for index in range(count) if any(needs[index])]
    computed = dict(zip(asked, _backward_of([rows[index] for index in asked]), strict=True))
    dx, dweight, dbias, dscale = zip(*(computed.get(index, (None,) * 4) for index in range(count)), strict=True)
    dresidual = [dout if wanted else None for dout, wanted in zip(douts, of_residuals, strict=True)]
    return [dx, dweight, dbias, dresidual, dscale]


def _backward_of(rows: Sequence[tuple]) -> list[tuple[Tensor | None, ...]]:
    """`backward`, as the registered op where something looks on."""
    if not rows:
        return []
    if plans.straight(*(row[0] for row in rows)) and not plans.recorded(*(t for row in rows for t in row[:5])):
        return backward(rows)
    *columns, factors, channels_last, needs = zip(*rows, strict=True)
    lists, given = pack(columns)
    need = [wanted for row in needs for wanted in row]
    packed = torch.ops.cnkernels.zero_conv_add_group_backward(*lists, given, list(factors), list(channels_last), need)
    flat = register.restore_none(packed, need)
    return [tuple(flat[i : i + 4]) for i in range(0, len(flat), 4)]


class Eager(torch.autograd.Function):
    """The autograd of `forward`: of the tensors of every layer, one after the other, with gaps where there is none."""

    @staticmethod
    def forward(ctx, layers: Sequence[tuple], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        *columns, ctx.factors = zip(*layers, strict=True)
        _save(ctx, *columns)
        return tuple(forward(layers))

    @staticmethod
    def backward(ctx, *douts: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        columns = _gradients(ctx, douts, [needed[i::5] for i in range(5)])
        return None, *(t for layer in zip(*columns, strict=True) for t in layer)


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
    **register.derivatives_of(_differentiable_backward),
)
