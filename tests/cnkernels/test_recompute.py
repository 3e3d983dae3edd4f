"""Deferred activations before a product: equal values bit for bit, equal gradients to rounding, fewer saved bytes."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import cnkernels
from cnkernels import recompute
from cnkernels.recompute import Later
from tests.cnkernels.harness import DEVICE

WIDTH, OUT = 12, 10
IMAGE, TOKENS = (2, WIDTH, 5, 3), (2, 7, WIDTH)


@dataclass(frozen=True)
class Case:
    """`lean` and `plain` are functions of one tensor of each shape; a norm keeps so many numbers as its statistics."""

    lean: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    shapes: dict[str, tuple[int, ...]]
    statistics: int = 0

    def leaves(self, dtype: torch.dtype = torch.float64, memory_format=torch.contiguous_format) -> list[Tensor]:
        tensors = [torch.randn(shape, dtype=torch.float64, device=DEVICE) for shape in self.shapes.values()]
        tensors = [t.contiguous(memory_format=memory_format) if t.dim() == 4 else t for t in tensors]
        return [t.to(dtype).requires_grad_() for t in tensors]


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, addend: Tensor | None, activation: str | None) -> Later:
    return Later(recompute._PromisedGroupNorm(4, 1e-5, activation), (x, weight, bias, addend))


@dataclass
class Parameters:
    """What is read of a layer norm."""

    weight: Tensor
    bias: Tensor
    eps: float = 1e-5


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Later:
    return recompute.layer_norm(Parameters(weight, bias), x)


def plain_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if torch.is_autocast_enabled(x.device.type):  # PyTorch does this by itself on a GPU
        x, weight, bias = x.float(), weight.float(), bias.float()
    return F.layer_norm(x, (WIDTH,), weight, bias)


def tokens(image: Tensor) -> Tensor:
    return image.permute(0, 2, 3, 1).flatten(1, 2)


def norm_conv(stride: int) -> Case:
    return Case(
        lambda x, a, b, add, w, c: recompute.chain(
            group_norm(x, a, b, add, "silu"), recompute.ConvProduct(stride, padding=1), w, c
        ),
        lambda x, a, b, add, w, c: F.conv2d(cnkernels.group_norm_silu(x, 4, a, b, addend=add), w, c, stride, padding=1),
        {"x": IMAGE, "a": (WIDTH,), "b": (WIDTH,), "addend": IMAGE[:2], "weight": (OUT, WIDTH, 3, 3), "bias": (OUT,)},
        statistics=2 * 2 * 4,
    )


PARAMETERS = {"a": (WIDTH,), "b": (WIDTH,), "weight": (OUT, WIDTH), "bias": (OUT,)}
CASES = {
    "group norm, convolution": norm_conv(stride=1),
    "group norm, strided convolution": norm_conv(stride=2),
    "group norm, linear": Case(
        lambda x, a, b, w, c: recompute.chain(group_norm(x, a, b, None, None), recompute.LINEAR, w, c),
        lambda x, a, b, w, c: F.linear(tokens(cnkernels.group_norm_silu(x, 4, a, b, activation=None)), w, c),
        {"x": IMAGE, **PARAMETERS},
        statistics=2 * 2 * 4,
    ),
    "layer norm, linear": Case(
        lambda x, a, b, w, c: recompute.chain(layer_norm(x, a, b), recompute.LINEAR, w, c),
        lambda x, a, b, w, c: F.linear(plain_layer_norm(x, a, b), w, c),
        {"x": TOKENS, **PARAMETERS},
        statistics=2 * 2 * 7,
    ),
    "silu, convolution without bias": Case(
        lambda x, w: recompute.chain(recompute.silu(x), recompute.ConvProduct(), w),
        lambda x, w: F.conv2d(F.silu(x), w),
        {"x": IMAGE, "weight": (OUT, WIDTH, 2, 2)},
    ),
    "geglu, linear added": Case(
        lambda x, w, c, r: recompute.chain(recompute.geglu(x), recompute.LINEAR, w, c, r),
        lambda x, w, c, r: recompute.linear_add(cnkernels.geglu(x), w, c, r),
        {"x": (2, 7, 2 * WIDTH), "weight": (OUT, WIDTH), "bias": (OUT,), "residual": (2, 7, OUT)},
    ),
}
OPAQUE = [case for name, case in CASES.items() if "group norm" in name or "geglu" in name]
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def run(function: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor | None]:
    """[result, gradients of the leaves] for the upstream gradient that stays the same for a shape."""
    out = function(*leaves)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    gradients = iter(torch.autograd.grad(out, wanted, upstream))
    return [out, *(next(gradients) if leaf.requires_grad else None for leaf in leaves)]


def assert_same(got: list[Tensor | None], want: list[Tensor | None], rtol: float = 1e-12) -> None:
    assert torch.equal(got[0], want[0])
    for ours, theirs in zip(got[1:], want[1:], strict=True):
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
            assert theirs.abs().max() > 0 and (ours - theirs).norm() <= rtol * theirs.norm()


def saved(function: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """What autograd keeps, a tensor for each storage, apart from the leaves."""
    own = {leaf.untyped_storage().data_ptr() for leaf in leaves}
    kept: dict[int, Tensor] = {}

    def keep(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept.setdefault(t.untyped_storage().data_ptr(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = function(*leaves)
    assert out.requires_grad
    return list(kept.values())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@each_case
def test_equals_the_composition(case, memory_format):
    leaves = case.leaves(memory_format=memory_format)
    got, want = run(case.lean, leaves), run(case.plain, leaves)
    assert_same(got, want)
    assert got[0].stride() == want[0].stride()


@each_case
def test_trainable_in_any_mix(case):
    leaves = case.leaves()
    for mix in itertools.product([False, True], repeat=len(leaves)):
        if any(mix):
            for leaf, trainable in zip(leaves, mix, strict=True):
                leaf.requires_grad_(trainable)
            assert_same(run(case.lean, leaves), run(case.plain, leaves))


@each_case
def test_saves_its_inputs_and_statistics_alone(case):
    leaves = case.leaves()
    assert sum(t.numel() for t in saved(case.lean, leaves)) == case.statistics
    intermediate = leaves[0].numel() // (2 if leaves[0].shape[-1] == 2 * WIDTH else 1)
    assert sum(t.numel() for t in saved(case.plain, leaves)) == case.statistics + intermediate


@each_case
def test_a_frozen_weight_saves_no_input(case):
    leaves = case.leaves()
    for name, leaf in zip(case.shapes, leaves, strict=True):
        leaf.requires_grad_(name == "x")
    assert sum(t.numel() for t in saved(case.lean, leaves)) == case.statistics


def test_frozen_convolution():
    x, weight, bias = norm_conv(1).leaves()[0], *norm_conv(1).leaves()[4:]
    for stride, padding in ((1, 1), (2, 1), (2, 0)):
        for trainable_bias in (False, True):
            leaves = [x * 1, weight.detach(), bias.detach().requires_grad_(trainable_bias)]

            def lean(*leaves, options=(stride, padding)):
                return recompute.conv2d(*leaves, *options)

            def plain(*leaves, options=(stride, padding)):
                return F.conv2d(*leaves, *options)

            assert_same(run(lean, leaves), run(plain, leaves))
            parameters = leaves[1:]
            assert saved(lambda *rest, x=leaves[0], f=lean: f(x, *rest), parameters) == []
            assert len(saved(lambda *rest, x=leaves[0], f=plain: f(x, *rest), parameters)) == 1


@each_case
def test_autocast(case):
    """Under autocast, too, the bits are the composition's; a gradient may round otherwise once."""
    leaves = case.leaves(torch.float32)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        got, want = run(case.lean, leaves), run(case.plain, leaves)
    assert got[0].dtype == torch.bfloat16 and all(gradient.dtype == torch.float32 for gradient in got[1:])
    assert_same(got, want, rtol=2**-8)


@each_case
def test_activation_checkpointing_and_double_use(case):
    leaves = case.leaves()
    want = run(lambda *leaves: case.plain(*leaves) * 2, leaves)
    assert_same(run(lambda *leaves: case.lean(*leaves) + case.lean(*leaves), leaves), want)
    want = run(case.plain, leaves)
    assert_same(run(lambda *leaves: checkpoint(case.lean, *leaves, use_reentrant=False), leaves), want)


@each_case
def test_compiled(case):
    """One graph, the same values; where a compiler cannot look inside, it keeps no more than eager execution."""
    torch._dynamo.reset()
    compiled = torch.compile(case.lean, backend="aot_eager_decomp_partition", fullgraph=True)
    leaves = case.leaves()
    got, want = run(compiled, leaves), run(case.plain, leaves)
    assert_same([want[0], *got[1:]], want)
    assert (got[0] - want[0]).norm() <= 1e-12 * want[0].norm()
    if case in OPAQUE:
        assert sum(t.numel() for t in saved(compiled, leaves)) == case.statistics


@pytest.mark.parametrize("op", ["group_norm_silu_again", "geglu_again"])
def test_opcheck(op):
    x = torch.randn(2, 8, 3, 4, device=DEVICE)
    parameters = {"group_norm_silu_again": (2, torch.randn(8, device=DEVICE), None, 1e-5, "silu", None)}
    torch.library.opcheck(getattr(torch.ops.cnkernels, op), (x, *parameters.get(op, ())))


def test_a_promise_kept_at_once():
    case = CASES["silu, convolution without bias"]
    x = case.leaves()[0]
    assert torch.equal(recompute.silu(x).now(), F.silu(x))
