"""Plans: made once per kind of call, never used for another, bounded in number, thread-safe, bit-equal to the op."""

import threading

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import BaseTorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import cnkernels
from cnkernels import dispatch, plans
from cnkernels.attention import registration as attention_registration
from cnkernels.geglu import registration as geglu_registration
from cnkernels.group_norm_silu import registration as norm_registration
from cnkernels.zero_conv_add import group
from cnkernels.zero_conv_add import registration as conv_registration
from tests.cnkernels.harness import DEVICE

FLOAT = torch.float32


def new(*shape: int, dtype: torch.dtype = FLOAT) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def misaligned(t: Tensor) -> Tensor:
    """The same values one element off a 16-byte boundary."""
    buffer = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
    return buffer[1:].view(t.shape).copy_(t)


def every_other(t: Tensor) -> Tensor:
    """The same values with other strides."""
    buffer = t.new_empty((*t.shape[:-1], 2 * t.shape[-1]))
    return buffer[..., ::2].copy_(t)


ARGUMENTS = {
    "attention": lambda: {"q": new(2, 6, 2, 8), "k": new(2, 5, 2, 8), "v": new(2, 5, 2, 8), "scale": 0.25},
    "group_norm_silu": lambda: {
        "x": new(2, 8, 4, 4),
        "groups": 4,
        "weight": new(8),
        "bias": new(8),
        "eps": 1e-5,
        "activation": "silu",
        "addend": new(2, 8),
    },
    "zero_conv_add": lambda: {
        "x": new(2, 8, 4, 4),
        "weight": new(6, 8, 1, 1),
        "bias": new(6),
        "residual": new(2, 6, 4, 4),
        "scale": new(2),
    },
    "geglu": lambda: {"projected": new(2, 5, 16)},
}
KEPT = {  # the plans of an op's forward pass
    "attention": attention_registration._FORWARD,
    "group_norm_silu": norm_registration._FORWARD,
    "zero_conv_add": conv_registration._FORWARD,
    "geglu": geglu_registration._FORWARD,
}
CHANGES = {  # of every tensor
    "dtype": lambda t: t.to(torch.bfloat16),
    "strides": every_other,
    "alignment": misaligned,
    "storage": torch.clone,  # the one change that makes no other plan
}
MIXED = {("group_norm_silu", "x"), ("zero_conv_add", "scale"), ("geglu", "projected")}  # may have a dtype of its own
OPTIONS = {
    "attention": {"scale": [-0.25]},
    "group_norm_silu": {
        "groups": [2],
        "eps": [1e-3],
        "activation": [None],
        "addend": [None],
        "weight": [None],
        "bias": [None],
    },
    "zero_conv_add": {"bias": [None], "residual": [None], "scale": [torch.tensor(0.5, device=DEVICE), 0.5]},
    "geglu": {},
}


def call(op: str, arguments: dict) -> Tensor:
    return getattr(cnkernels, op)(**arguments)


def registered(op: str, arguments: dict) -> Tensor:
    """The same call as a compiler makes it."""
    with BaseTorchFunctionMode():
        assert not plans.straight()
        return call(op, arguments)


def every_change():
    for op, make in ARGUMENTS.items():
        for argument, value in make().items():
            if isinstance(value, Tensor):
                for change in CHANGES:
                    yield pytest.param(op, argument, change, id=f"{op}-{argument}-{change}")
        for argument, values in OPTIONS[op].items():
            for i in range(len(values)):
                yield pytest.param(op, argument, i, id=f"{op}-{argument}-{i}")


@pytest.mark.parametrize("op, argument, change", list(every_change()))
def test_each_property_alone_makes_another_plan_or_an_error(op, argument, change):
    """And the result of the call that it changes is that of a process that has planned nothing."""
    arguments = ARGUMENTS[op]()
    call(op, arguments)
    before = set(KEPT[op]._made)
    value = arguments[argument]
    value = CHANGES[change](value) if isinstance(change, str) else OPTIONS[op][argument][change]
    changed = arguments | {argument: value}
    if change == "dtype" and (op, argument) not in MIXED:
        for _ in range(3):
            with pytest.raises(ValueError, match="dtype"):
                call(op, changed)
        assert set(KEPT[op]._made) == before
        return
    result = call(op, changed)
    made = set(KEPT[op]._made) - before
    assert bool(made) == (change != "storage")
    plans.forget()
    assert torch.equal(result, call(op, changed))
    assert torch.equal(result, registered(op, changed))


@pytest.mark.parametrize("op", ARGUMENTS)
def test_a_change_of_shape_or_backend_makes_another_plan(op):
    arguments = ARGUMENTS[op]()
    call(op, arguments)
    count = len(KEPT[op])
    call(op, {key: torch.cat([t, t]) if _has_batch(op, key) else t for key, t in arguments.items()})
    assert len(KEPT[op]) == count + 1
    with cnkernels.backend("reference"):
        call(op, arguments)
        call(op, arguments)
    assert len(KEPT[op]) == count + 2


def _has_batch(op: str, argument: str) -> bool:
    return (op, argument) in {
        *(("attention", name) for name in "qkv"),
        *(("group_norm_silu", name) for name in ("x", "addend")),
        *(("zero_conv_add", name) for name in ("x", "residual", "scale")),
        ("geglu", "projected"),
    }


@pytest.mark.parametrize("op", ARGUMENTS)
def test_requires_grad_and_autocast_change_no_result(op):
    """Neither is in a key: gradients are recorded around a plan, and autocast's casts come before it."""
    arguments = ARGUMENTS[op]()
    plain = call(op, arguments)
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            leaf = value.detach().clone().requires_grad_()
            recorded = call(op, arguments | {name: leaf})
            assert recorded.requires_grad and torch.equal(recorded, plain)
            with torch.no_grad():
                assert not call(op, arguments | {name: leaf}).requires_grad
    with torch.autocast(DEVICE.type, torch.bfloat16):
        cast = call(op, arguments)
    assert cast.dtype == (torch.bfloat16 if op in ("attention", "zero_conv_add") else FLOAT)
    assert torch.equal(call(op, arguments), plain)


ERRORS = {
    "attention": ("k", lambda t: t[:, :, :1]),
    "group_norm_silu": ("weight", lambda t: t[:4]),
    "zero_conv_add": ("residual", lambda t: t[:, :4]),
    "geglu": ("projected", lambda t: t[..., :15]),
}


@pytest.mark.parametrize("op", ARGUMENTS)
def test_an_error_comes_on_the_first_call_and_on_the_thousandth(op):
    arguments = ARGUMENTS[op]()
    argument, spoil = ERRORS[op]
    spoiled = arguments | {argument: spoil(arguments[argument])}
    texts = []
    for i in range(1000):
        call(op, arguments)
        if i in (0, 1, 999):
            with pytest.raises(ValueError, match=rf"{op}: `{argument}` must be") as error:
                call(op, spoiled)
            texts.append(str(error.value))
    assert len(set(texts)) == 1 and len(KEPT[op]) == 1


@pytest.mark.parametrize("op", ARGUMENTS)
def test_an_argument_of_another_type_meets_no_plan(op):
    """2.0 equals 2 and True equals 1, and would find the plan of either."""
    arguments = ARGUMENTS[op]()
    call(op, arguments)
    wrong = {"groups": 4.0} if op == "group_norm_silu" else {next(iter(arguments)): None}
    for _ in range(2):
        with pytest.raises((RuntimeError, TypeError, AttributeError)):
            call(op, arguments | wrong)


def test_plans_are_bounded_and_the_oldest_goes_first(monkeypatch):
    monkeypatch.setattr(plans, "LIMIT", 5)
    for tokens in range(1, 9):
        cnkernels.geglu(new(tokens, 8))
    sizes = [key[0][0][0] for key in geglu_registration._FORWARD._made]
    assert sizes == [4, 5, 6, 7, 8]
    torch.testing.assert_close(cnkernels.geglu(torch.zeros(1, 8)), torch.zeros(1, 4))


def test_threads_that_plan_and_forget_at_once_get_right_results(monkeypatch):
    monkeypatch.setattr(plans, "LIMIT", 3)
    inputs = [new(n, 6) for n in range(1, 9)]
    expected = [cnkernels.geglu(t) for t in inputs]
    wrong = []

    def work(seed: int) -> None:
        for i in range(200):
            index = (seed * 5 + i * 3) % len(inputs)
            if not torch.equal(cnkernels.geglu(inputs[index]), expected[index]):
                wrong.append(index)
            if i % 50 == seed:
                plans.forget()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(geglu_registration._FORWARD) <= 3


def test_a_measured_choice_is_followed_once_plans_are_forgotten(monkeypatch):
    asked = []
    select = dispatch.select
    monkeypatch.setattr(dispatch, "select", lambda *a: asked.append(a[0]) or select(*a))
    x = new(3, 8)
    cnkernels.geglu(x)
    cnkernels.geglu(x)
    assert asked == ["geglu"]
    plans.forget()
    cnkernels.geglu(x)
    assert asked == ["geglu"] * 2


@pytest.mark.parametrize("trainable", [False, True])
def test_the_exits_of_a_controlnet_are_one_plan(trainable):
    xs, weights = [new(2, 8, 4, 4) for _ in range(3)], [new(6, 8, 1, 1).requires_grad_(trainable) for _ in range(3)]
    for _ in range(2):
        outs = cnkernels.zero_conv_add_group(xs, weights, scales=[0.5, 1.0, 2.0])
        assert len(group._FORWARD) == 1 and len(conv_registration._FORWARD) == 0
        if trainable:
            torch.autograd.backward([out.sum() for out in outs])
    assert len(group._BACKWARD) == trainable
    for out, x, weight, scale in zip(outs, xs, weights, (0.5, 1.0, 2.0), strict=True):
        assert torch.equal(out, cnkernels.zero_conv_add(x, weight, scale=scale))


class Subclass(Tensor):
    pass


SEEN = {  # what must see the registered op
    "dispatch mode": lambda: FlopCounterMode(display=False),
    "default device": lambda: torch.device("cpu"),
    "profiler": lambda: torch.profiler.profile(),
    "forward-mode differentiation": lambda: forward_ad.dual_level(),
}


@pytest.mark.parametrize("what", SEEN)
def test_what_looks_on_sees_the_registered_op(what):
    assert plans.straight(new(2))
    with SEEN[what]():
        assert not plans.straight(new(2))
    assert plans.straight(new(2))


def test_a_tensor_that_is_no_plain_array_goes_through_the_dispatcher():
    assert not plans.straight(new(2), new(2).as_subclass(Subclass))
    assert not plans.straight(torch._neg_view(new(2)))
    assert not plans.straight(torch._efficientzerotensor(2))
    x = new(2, 8)
    torch.testing.assert_close(cnkernels.geglu(torch._neg_view(x)), cnkernels.geglu(-x))


def test_a_backward_pass_that_is_itself_recorded_goes_through_the_dispatcher():
    x = new(2, 8).requires_grad_()
    (gradient,) = torch.autograd.grad(cnkernels.geglu(x).square().sum(), x, create_graph=True)
    assert gradient.grad_fn is not None
