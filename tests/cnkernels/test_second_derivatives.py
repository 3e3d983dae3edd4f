"""Gradients of gradients (`create_graph=True`): of every op, and of layers that compute their input again."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import cnkernels
from cnkernels import recompute
from tests.cnkernels.harness import randn


def norm(x, weight, bias, addend, activation="silu"):
    return cnkernels.group_norm_silu(x, 3, weight, bias, 1e-5, activation, addend)


def group(a, b, v, w, bias, residual, scale):
    return tuple(cnkernels.zero_conv_add_group([a, b], [v, w], [bias, None], [None, residual], [scale, 0.5]))


X = (2, 6, 3, 3)
CALLS = {
    "attention": (cnkernels.attention, [(1, 3, 2, 4), (1, 5, 2, 4), (1, 5, 2, 4)]),
    "geglu": (cnkernels.geglu, [(2, 3, 8)]),
    "group_norm_silu": (norm, [X, (6,), (6,), (2, 6)]),
    "group norm": (lambda *tensors: norm(*tensors, None), [X, (6,), (6,), (2, 6)]),
    "group norm without parameters": (lambda x: norm(x, None, None, None), [X]),
    "zero_conv_add": (cnkernels.zero_conv_add, [(2, 3, 2, 2), (4, 3, 1, 1), (4,), (2, 4, 2, 2), (2,)]),
    "zero_conv_add_group": (
        group,
        [(2, 3, 2, 2), (2, 2, 1, 3), (4, 3, 1, 1), (2, 2, 1, 1), (4,), (2, 2, 1, 3), (2,)],
    ),
}


def leaves(shapes, frozen=()):
    return [randn(*shape).requires_grad_(i not in frozen) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("call", CALLS)
def test_ops(call):
    function, shapes = CALLS[call]
    assert gradgradcheck(function, leaves(shapes))


@pytest.mark.parametrize(
    ("call", "frozen"),
    [
        ("attention", (0,)),
        ("attention", (1, 2)),
        ("group_norm_silu", (0, 3)),
        ("group_norm_silu", (1, 2)),
        ("zero_conv_add", (1, 2, 4)),
        ("zero_conv_add", (0,)),
        ("zero_conv_add_group", (0, 3, 6)),
    ],
)
def test_some_tensors_take_no_gradient(call, frozen):
    function, shapes = CALLS[call]
    assert gradgradcheck(function, leaves(shapes, frozen))


def test_third_derivative():
    def gradient(x):
        return torch.autograd.grad(cnkernels.geglu(x).square().sum(), x, create_graph=True)[0]

    x = randn(2, 4).requires_grad_()
    assert gradgradcheck(gradient, x)


def test_one_argument_is_computed_from_another():
    """The derivative with respect to it holds no path through the other."""

    def function(x, w):
        return cnkernels.attention(x, x * w, (x * w).sin())

    assert gradgradcheck(function, leaves([(1, 3, 1, 2), (1, 3, 1, 2)]))


def test_the_gradients_are_those_without_create_graph():
    function, shapes = CALLS["attention"]
    tensors = [t.detach().float().requires_grad_() for t in leaves(shapes)]
    results = [
        torch.autograd.grad(function(*tensors).square().sum(), tensors, create_graph=create) for create in (False, True)
    ]
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("call", CALLS)
def test_float32(call):
    function, shapes = CALLS[call]

    def penalty(tensors):
        outputs = function(*tensors)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        first = torch.autograd.grad(sum(o.square().sum() for o in outputs), tensors, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), tensors)

    wide = leaves(shapes)
    narrow = [t.detach().float().requires_grad_() for t in wide]
    for ours, truth in zip(penalty(narrow), penalty(wide), strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=0, atol=1e-4 * truth.abs().max().item())


# --- layers that compute their input again

PROMISES = {
    "silu": (lambda x: recompute.silu(x), [X]),
    "group norm": (
        lambda x, addend: recompute.group_norm_silu(torch.nn.GroupNorm(3, 6).double(), x, addend),
        [X, (2, 6)],
    ),
    "geglu": (lambda x: recompute.geglu(x), [(2, 3, 12)]),
    "layer norm": (lambda x: recompute.layer_norm(torch.nn.LayerNorm(6).double(), x), [(2, 3, 6)]),
}


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("promise", PROMISES)
def test_chains(promise, trained):
    make, shapes = PROMISES[promise]
    image = len(shapes[0]) == 4
    product = recompute.ConvProduct(1, 1) if image else recompute.LINEAR
    weight, bias = randn(2, 6, 3, 3) if image else randn(2, 6), randn(2)

    def function(weight, bias, *inputs):
        return recompute.chain(make(*inputs), product, weight, bias)

    given = [weight.requires_grad_(trained), bias.requires_grad_(trained), *leaves(shapes)]
    assert gradcheck(function, given)
    assert gradgradcheck(function, given)


def test_a_frozen_convolution():
    weight, bias = randn(2, 6, 3, 3), randn(2).requires_grad_()
    assert gradgradcheck(lambda x, bias: recompute.conv2d(x, weight, bias, 2, 1).square(), [*leaves([X]), bias])
