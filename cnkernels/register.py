"""The contract that the ops share: how one is registered, how it refuses an argument, how its gradients are packed."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.utils import _pytree as pytree

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def dtype_name(dtype: torch.dtype) -> str:
    """The name without its package: "float16"."""
    return str(dtype).removeprefix("torch.")


def op(
    name: str,
    schema: str,
    forward: Callable,
    fake: Callable,
    *,
    setup_context: Callable | None = None,
    autograd: Callable | None = None,
    differentiable: bool = True,
) -> None:
    """Registers torch.ops.cnkernels.<name>.

    Without `autograd`, differentiating through it is an error that says so; `differentiable=False` is for an op that
    only writes into an argument, where torch.library takes no derivative. A backward op takes both functions from
    `derivatives_of`.
    """
    qualified = f"cnkernels::{name}"
    torch.library.define(qualified, schema, tags=(torch.Tag.needs_fixed_stride_order,))
    torch.library.impl(qualified, "default", forward)
    torch.library.register_fake(qualified, fake)
    if differentiable:
        torch.library.register_autograd(qualified, autograd or _no_derivative(name), setup_context=setup_context)


def _no_derivative(name: str) -> Callable:
    def refuse(ctx, *gradients):
        raise RuntimeError(f"{name}: has no derivative")

    return refuse


def derivatives_of(function: Callable) -> dict[str, Callable]:
    """The `setup_context` and `autograd` of a backward op, for gradients of gradients (`create_graph=True`).

    Args:
        function: takes the op's arguments, and computes its result in differentiable operations of PyTorch. It runs
            only if the backward pass is differentiated, which may be repeated.
    """

    def setup_context(ctx, inputs, output):
        leaves, ctx.spec = pytree.tree_flatten(inputs, is_leaf=_holds_no_tensors)
        ctx.others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        ctx.save_for_backward(*(leaf if isinstance(leaf, Tensor) else None for leaf in leaves))

    def autograd(ctx, *gradients):
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            # Aliases: one input may have been computed from another, which is not a part of this derivative.
            tensors = [t if t is None else t.view_as(t) for t in ctx.saved_tensors]
            leaves = [other if t is None else t for t, other in zip(tensors, ctx.others, strict=True)]
            outputs = pytree.tree_leaves(function(*pytree.tree_unflatten(leaves, ctx.spec)))
        pairs = zip(outputs, pytree.tree_leaves(gradients), strict=True)
        outputs, gradients = zip(
            *(pair for pair in pairs if pair[1] is not None and pair[0].requires_grad), strict=True
        )
        wanted = [i for i, t in enumerate(tensors) if t is not None and t.requires_grad]
        computed = torch.autograd.grad(
            outputs, [tensors[i] for i in wanted], gradients, create_graph=create_graph, allow_unused=True
        )
        result = dict(zip(wanted, computed, strict=True))
        return tuple(pytree.tree_unflatten([result.get(i) for i in range(len(leaves))], ctx.spec))

    return {"setup_context": setup_context, "autograd": autograd}


def _holds_no_tensors(argument: object) -> bool:
    """False for the tuple of all arguments, and for a list of tensors; a list of numbers has one gradient, None."""
    tensors = isinstance(argument, list) and all(isinstance(t, Tensor) for t in argument)
    return not (isinstance(argument, tuple) or tensors)


def expect(condition: bool, op: str, argument: str, expected: str, got: object) -> None:
    """Raises ValueError "op: `argument` must be <expected>, got <got>" unless `condition` holds."""
    if not condition:
        raise ValueError(f"{op}: `{argument}` must be {expected}, got {got}")


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and accumulators: float32, and float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def expect_floating(name: str, argument: str, tensor: Tensor) -> None:
    expect(tensor.dtype in FLOATING, name, argument, "float32, float16, bfloat16 or float64", tensor.dtype)


def expect_parameter(name: str, argument: str, tensor: Tensor | None, shape: Sequence[int], x: Tensor) -> None:
    """A parameter of an op on `x`: None, or of that shape, on x's device, of x's dtype or its wide one."""
    if tensor is None:
        return
    expect(
        tuple(tensor.shape) == tuple(shape), name, argument, f"of shape {list(shape)}", f"shape {list(tensor.shape)}"
    )
    expect(tensor.device == x.device, name, argument, f"on the device of `x`, {x.device}", tensor.device)
    allowed = {x.dtype, wide_dtype(x.dtype)}
    expect(tensor.dtype in allowed, name, argument, f"of dtype {' or '.join(sorted(map(str, allowed)))}", tensor.dtype)


def contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.contiguous() for t in tensors)


def keep_requested(values: Sequence[Tensor | None], requested: Sequence[bool]) -> list[Tensor]:
    """Keeps only the requested gradients: a backward op returns Tensor[], which cannot hold None."""
    return [value for value, wanted in zip(values, requested, strict=True) if wanted]


def restore_none(kept: Sequence[Tensor], requested: Sequence[bool]) -> list[Tensor | None]:
    """The inverse of `keep_requested`: one entry for each of `requested`, None where it is False."""
    remaining = iter(kept)
    return [next(remaining) if wanted else None for wanted in requested]


class EagerFunction(torch.autograd.Function):
    """An autograd.Function for eager calls.

    `record` is `apply` without its handling of function transforms (vmap, torch.func.grad), which costs 3 us. Use it
    only where `plans.straight` holds, or through `record_or_apply`.
    """

    record: Callable

    def __init_subclass__(cls, **options: object):
        super().__init_subclass__(**options)
        cls.record = super(torch.autograd.Function, cls).apply  # that of C++


def record_or_apply(function: type[EagerFunction], *inputs: object):
    """Calls `function.record`, or `function.apply` where a compiler or a function transform is active."""
    if is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*inputs)
    return function.record(*inputs)


def eager_function(name: str, compute: Callable, keep: Callable, differentiate: Callable) -> type[EagerFunction]:
    """The autograd.Function of an op for calls that go straight to its plan.

    torch.library's own autograd costs several times as much.

    Args:
        name: of the class.
        compute: the op without gradients. Only the first of several results is returned and differentiable.
        keep: keep(ctx, inputs, output) saves what backward needs.
        differentiate: differentiate(ctx, gradient) returns the gradients of the inputs.
    """

    def forward(ctx, *inputs: object) -> Tensor:
        output = compute(*inputs)
        ctx.set_materialize_grads(False)
        keep(ctx, inputs, output)
        return output[0] if type(output) is tuple else output

    functions = {"forward": staticmethod(forward), "backward": staticmethod(differentiate)}
    return type(name, (EagerFunction,), functions)


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in autocast's dtype where autocast is on for their device, as for a matrix product."""
    if not torch._C._is_any_autocast_enabled():  # one question instead of one for a device by its name
        return tensors
    device = next(t.device.type for t in tensors if t is not None)
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)
