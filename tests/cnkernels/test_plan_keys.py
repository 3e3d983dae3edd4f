"""A plan is never used for a tensor that it was not made for: devices, backward passes, and the group of exits.

`test_plans.py` walks over the arguments of one forward call.
"""

import threading

import pytest
import torch
from torch import Tensor
from torch.overrides import BaseTorchFunctionMode

import cnkernels
from cnkernels import plans
from cnkernels.attention import registration as attention_registration
from cnkernels.geglu import registration as geglu_registration
from cnkernels.group_norm_silu import registration as norm_registration
from cnkernels.zero_conv_add import group
from cnkernels.zero_conv_add import registration as conv_registration
from tests.cnkernels.test_plans import ARGUMENTS, CHANGES, ERRORS, KEPT, MIXED, call, new

KEPT_BACKWARD = {
    "attention": attention_registration._BACKWARD,
    "group_norm_silu": norm_registration._BACKWARD,
    "zero_conv_add": conv_registration._BACKWARD,
    "geglu": geglu_registration._BACKWARD,
}
UNREAD = {("zero_conv_add", "residual")}  # by a backward pass: its gradient is the upstream gradient itself
TENSORS = [(op, name) for op, make in ARGUMENTS.items() for name, value in make().items() if isinstance(value, Tensor)]


def gradients(op: str, arguments: dict, leaves: list[str], upstream: Tensor) -> list[Tensor]:
    """Of the arguments `leaves`, with respect to a call's output."""
    made = {name: arguments[name].detach().requires_grad_() for name in leaves}
    return list(torch.autograd.grad(call(op, arguments | made), list(made.values()), upstream))


def tensors_of(arguments: dict) -> list[str]:
    return [name for name, value in arguments.items() if isinstance(value, Tensor)]


def check_gradients(op: str, arguments: dict, leaves: list[str], upstream: Tensor, makes_plan: bool) -> None:
    """Those that the plans at hand give are those of no plans, and of the registered op, to the bit."""
    before = set(KEPT_BACKWARD[op]._made)
    found = gradients(op, arguments, leaves, upstream)
    assert bool(set(KEPT_BACKWARD[op]._made) - before) == makes_plan
    plans.forget()
    assert all(map(torch.equal, found, gradients(op, arguments, leaves, upstream)))
    with BaseTorchFunctionMode():
        assert all(map(torch.equal, found, gradients(op, arguments, leaves, upstream)))


@pytest.mark.parametrize("change", [name for name in CHANGES if name != "dtype"])
@pytest.mark.parametrize("op", ARGUMENTS)
def test_an_upstream_gradient_of_another_kind_makes_another_plan(op, change):
    arguments = ARGUMENTS[op]()
    leaves = tensors_of(arguments)
    upstream = torch.randn_like(call(op, arguments))
    gradients(op, arguments, leaves, upstream)
    check_gradients(op, arguments, leaves, CHANGES[change](upstream), makes_plan=change != "storage")


@pytest.mark.parametrize("change", [name for name in CHANGES if name != "dtype"])
@pytest.mark.parametrize("op, argument", TENSORS)
def test_the_backward_of_another_argument_makes_another_plan(op, argument, change):
    arguments = ARGUMENTS[op]()
    leaves = tensors_of(arguments)
    upstream = torch.randn_like(call(op, arguments))
    gradients(op, arguments, leaves, upstream)
    changed = arguments | {argument: CHANGES[change](arguments[argument])}
    same = change == "storage" or (op, argument) in UNREAD
    check_gradients(op, changed, leaves, upstream, makes_plan=not same)


@pytest.mark.parametrize("op, argument", TENSORS)
def test_other_requested_gradients_make_another_plan(op, argument):
    arguments = ARGUMENTS[op]()
    leaves = tensors_of(arguments)
    upstream = torch.randn_like(call(op, arguments))
    if len(leaves) > 1:
        gradients(op, arguments, [name for name in leaves if name != argument], upstream)
    check_gradients(op, arguments, [argument], upstream, makes_plan=(op, argument) not in UNREAD)


@pytest.mark.parametrize("op", ARGUMENTS)
def test_saved_tensors_that_hooks_replace_meet_no_plan_of_others(op):
    """Hooks may give backward tensors that lie elsewhere than those of the forward pass, such as odd views."""
    arguments = ARGUMENTS[op]()
    leaves = tensors_of(arguments)
    upstream = torch.randn_like(call(op, arguments))
    expected = gradients(op, arguments, leaves, upstream)
    before = set(KEPT_BACKWARD[op]._made)
    with torch.autograd.graph.saved_tensors_hooks(CHANGES["alignment"], lambda t: t):
        found = gradients(op, arguments, leaves, upstream)
    assert set(KEPT_BACKWARD[op]._made) - before
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("op", ["attention", "group_norm_silu"])
def test_results_of_the_forward_pass_that_lie_elsewhere_meet_no_plan_of_others(op):
    """The output, statistics and log-sum-exp that backward reads are aligned as they come, unless a hook moves them."""
    arguments = ARGUMENTS[op]()
    leaves = tensors_of(arguments)
    upstream = torch.randn_like(call(op, arguments))
    expected = gradients(op, arguments, leaves, upstream)
    before = set(KEPT_BACKWARD[op]._made)
    inputs = {arguments[name].data_ptr() for name in leaves}

    def move(t: Tensor) -> Tensor:
        return t if t.data_ptr() in inputs else CHANGES["alignment"](t)

    with torch.autograd.graph.saved_tensors_hooks(move, lambda t: t):
        found = gradients(op, arguments, leaves, upstream)
    assert set(KEPT_BACKWARD[op]._made) - before
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("op", ARGUMENTS)
def test_another_dtype_of_all_arguments_makes_another_plan(op):
    arguments = ARGUMENTS[op]()
    call(op, arguments)
    before = set(KEPT[op]._made)
    cast = {name: t.to(torch.bfloat16) if isinstance(t, Tensor) else t for name, t in arguments.items()}
    assert call(op, cast).dtype == torch.bfloat16
    assert len(set(KEPT[op]._made) - before) == 1


@pytest.mark.parametrize("op, argument", TENSORS)
def test_a_tensor_on_another_device_makes_another_plan_or_an_error(op, argument):
    arguments = ARGUMENTS[op]()
    call(op, arguments)
    before = set(KEPT[op]._made)
    elsewhere = {name: t.to("meta") if isinstance(t, Tensor) else t for name, t in arguments.items()}
    if len(tensors_of(arguments)) > 1:
        for _ in range(2):
            with pytest.raises(ValueError, match="device"):
                call(op, arguments | {argument: elsewhere[argument]})
        assert set(KEPT[op]._made) == before
    assert call(op, elsewhere).is_meta
    assert len(set(KEPT[op]._made) - before) == 1


LAYER = ("xs", "weights", "biases", "residuals", "scales")


def exits() -> dict[str, list[Tensor]]:
    layers = [ARGUMENTS["zero_conv_add"]() for _ in range(3)]
    names = ("x", "weight", "bias", "residual", "scale")
    return {column: [layer[name] for layer in layers] for column, name in zip(LAYER, names, strict=True)}


def group_gradients(columns: dict[str, list[Tensor]]) -> list[Tensor]:
    """Of every tensor of every layer."""
    made = {name: [t.detach().requires_grad_() for t in column] for name, column in columns.items()}
    outs = cnkernels.zero_conv_add_group(**made)
    upstream = [torch.full_like(out, 0.5) for out in outs]
    return list(torch.autograd.grad(outs, [t for column in made.values() for t in column], upstream))


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("column", LAYER)
def test_a_tensor_of_one_exit_of_another_kind_makes_another_plan_of_the_group_or_an_error(column, change):
    columns = exits()
    cnkernels.zero_conv_add_group(**columns)
    group_gradients(columns)
    kept = {name: set(cache._made) for name, cache in (("forward", group._FORWARD), ("backward", group._BACKWARD))}
    changed = columns | {column: [*columns[column][:2], CHANGES[change](columns[column][2])]}
    if change == "dtype" and column != "scales":
        for _ in range(3):
            with pytest.raises(ValueError, match="zero_conv_add_group, layer 2.*dtype"):
                cnkernels.zero_conv_add_group(**changed)
        assert set(group._FORWARD._made) == kept["forward"]
        return
    outs, found = cnkernels.zero_conv_add_group(**changed), group_gradients(changed)
    assert bool(set(group._FORWARD._made) - kept["forward"]) == (change != "storage")
    unread = change == "storage" or column == "residuals"
    assert bool(set(group._BACKWARD._made) - kept["backward"]) == (not unread)
    plans.forget()
    assert all(map(torch.equal, outs, cnkernels.zero_conv_add_group(**changed)))
    assert all(map(torch.equal, found, group_gradients(changed)))
    with BaseTorchFunctionMode():
        assert all(map(torch.equal, outs, cnkernels.zero_conv_add_group(**changed)))
        assert all(map(torch.equal, found, group_gradients(changed)))


@pytest.mark.parametrize("column", ["biases", "residuals"])
def test_an_exit_without_an_argument_makes_another_plan_of_the_group(column):
    columns = exits()
    cnkernels.zero_conv_add_group(**columns)
    outs = cnkernels.zero_conv_add_group(**columns | {column: [*columns[column][:2], None]})
    assert len(group._FORWARD) == 2
    plans.forget()
    assert all(
        map(torch.equal, outs, cnkernels.zero_conv_add_group(**columns | {column: [*columns[column][:2], None]}))
    )


@pytest.mark.parametrize("change", [name for name in CHANGES if name != "dtype"])
def test_an_output_of_another_kind_makes_another_plan(change):
    columns = exits()
    outs = [torch.empty_like(t) for t in columns["residuals"]]
    expected = cnkernels.zero_conv_add_group(**columns)
    for given in (outs, [*outs[:2], CHANGES[change](outs[2])]):
        cnkernels.zero_conv_add_group(**columns, outs=given)
        assert all(map(torch.equal, given, expected))
    assert len(group._FORWARD_OUT) == 1 + (change != "storage")


def test_errors_of_the_group_come_on_the_first_call_and_on_the_thousandth():
    columns = exits()
    argument, spoil = ERRORS["zero_conv_add"]
    spoiled = columns | {"residuals": [*columns["residuals"][:2], spoil(columns["residuals"][2])]}
    texts = []
    for i in range(1000):
        cnkernels.zero_conv_add_group(**columns)
        if i in (0, 1, 999):
            with pytest.raises(ValueError, match=f"zero_conv_add_group, layer 2: `{argument}` must be") as error:
                cnkernels.zero_conv_add_group(**spoiled)
            texts.append(str(error.value))
    assert len(set(texts)) == 1 and len(group._FORWARD) == 1


WRONG = {  # (op, argument): a value that is refused
    ("attention", "q"): lambda t: t[0],
    ("attention", "k"): lambda t: t[..., :4],
    ("attention", "v"): lambda t: t[:, :3],
    ("group_norm_silu", "x"): lambda t: t.flatten(1),
    ("group_norm_silu", "groups"): lambda n: 3,
    ("group_norm_silu", "weight"): lambda t: t[:4],
    ("group_norm_silu", "bias"): lambda t: t.to(torch.float64),
    ("group_norm_silu", "eps"): lambda eps: -1.0,
    ("group_norm_silu", "activation"): lambda name: "relu",
    ("group_norm_silu", "addend"): lambda t: t[:1],
    ("zero_conv_add", "x"): lambda t: t[0],
    ("zero_conv_add", "weight"): lambda t: t[:, :4],
    ("zero_conv_add", "bias"): lambda t: t[:3],
    ("zero_conv_add", "residual"): lambda t: t[:, :4],
    ("zero_conv_add", "scale"): lambda t: torch.ones(7, device=t.device),
    ("geglu", "projected"): lambda t: t[..., :15],
}


@pytest.mark.parametrize("recorded", [False, True], ids=["plain", "recorded"])
@pytest.mark.parametrize("op, argument", WRONG)
def test_every_wrong_argument_is_named_after_plans_were_made_too(op, argument, recorded):
    arguments = ARGUMENTS[op]()
    wrong = arguments | {argument: WRONG[op, argument](arguments[argument])}
    if recorded:
        wrong = {name: t.detach().requires_grad_() if isinstance(t, Tensor) else t for name, t in wrong.items()}
    texts = []
    for _ in range(3):
        with pytest.raises(ValueError, match=rf"^{op}: `\w+` must be") as error:
            call(op, wrong)
        texts.append(str(error.value))
        call(op, arguments)
    assert len(set(texts)) == 1 and len(KEPT[op]) == 1


def test_two_threads_with_gradients_and_other_backends_get_right_results():
    x = new(4, 16)
    expected = {}
    for name in ("reference", "aten"):
        with cnkernels.backend(name):
            expected[name] = gradients("geglu", {"projected": x}, ["projected"], torch.ones(4, 8, device=x.device))
    wrong = []

    def work() -> None:
        for _ in range(100):
            found = gradients("geglu", {"projected": x}, ["projected"], torch.ones(4, 8, device=x.device))
            if not any(torch.equal(found[0], e[0]) for e in expected.values()):
                wrong.append(found)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for name in ("reference", "aten") * 50:  # the choice is of the process
        with cnkernels.backend(name):
            cnkernels.geglu(x)
    for thread in threads:
        thread.join()
    assert not wrong


def test_mixed_dtypes_are_in_the_key():
    assert ("group_norm_silu", "x") in MIXED
    arguments = ARGUMENTS["group_norm_silu"]()
    half = arguments | {"x": arguments["x"].to(torch.bfloat16), "weight": arguments["weight"].to(torch.bfloat16)}
    call("group_norm_silu", half)
    call("group_norm_silu", half | {"weight": arguments["weight"]})
    assert len(KEPT["group_norm_silu"]) == 2
