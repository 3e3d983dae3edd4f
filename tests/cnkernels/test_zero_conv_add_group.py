"""zero_conv_add_group is zero_conv_add for each of its layers, to the bit, with their gradients."""

import pytest
import torch
import torch._dynamo.testing

import cnkernels
from cnkernels import dispatch
from cnkernels.zero_conv_add import group
from tests.cnkernels import harness
from tests.cnkernels.guards import guarded_empty
from tests.cnkernels.harness import DEVICE, DTYPES, randn

BACKENDS = harness.backends("zero_conv_add")
SHAPES = [(24, 16, 5, 7), (24, 16, 5, 7), (37, 41, 4, 3), (8, 8, 1, 1), (8, 12, 6, 2)]  # Cin, Cout, H, W
LAYOUTS = {"contiguous": harness.as_is, "channels_last": harness.channels_last, "strided": harness.strided}


def arguments(dtype=torch.float32, arrange=harness.as_is, n=2):
    """Layers of every kind: without bias, without residual, with each form of scale, one in another layout."""
    xs = [arrange(randn(n, cin, h, w).to(dtype)) for cin, _, h, w in SHAPES]
    xs[-1] = harness.channels_last(xs[-1]) if xs[-1].is_contiguous() else xs[-1].contiguous()
    weights = [randn(cout, cin, 1, 1, scale=cin**-0.5).to(dtype) for cin, cout, *_ in SHAPES]
    biases = [randn(cout).to(dtype) for _, cout, *_ in SHAPES]
    residuals = [arrange(randn(n, cout, h, w).to(dtype)) for _, cout, h, w in SHAPES]
    biases[2] = residuals[0] = residuals[3] = None
    return [xs, weights, biases, residuals, [0.7, randn(), randn(n), randn(n, 1, 1, 1).to(dtype), 1]]


def tensors(columns):
    return [t for column in columns for t in column if isinstance(t, torch.Tensor)]


def one_by_one(xs, weights, biases, residuals, scales):
    return [cnkernels.zero_conv_add(*layer) for layer in zip(xs, weights, biases, residuals, scales, strict=True)]


def together(*columns):
    return cnkernels.zero_conv_add_group(*columns)


def results(function, columns, upstream, wanted=None):
    """The outputs and the gradients of the `wanted` tensors, by default of all."""
    wanted = tensors(columns) if wanted is None else wanted
    for tensor in wanted:
        tensor.requires_grad_()
    outs = function(*columns)
    gradients = torch.autograd.grad(outs, wanted, upstream)
    for tensor in wanted:
        tensor.requires_grad_(False)
    return [*outs, *gradients]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_single_op_to_the_bit(layout, dtype, backend):
    columns = arguments(dtype, LAYOUTS[layout])
    upstream = [torch.randn(2, cout, h, w, device=DEVICE).to(dtype) for _, cout, h, w in SHAPES]
    with cnkernels.backend(backend):
        expected, actual = (results(function, columns, upstream) for function in (one_by_one, together))
    assert len(actual) == len(SHAPES) + len(tensors(columns))
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs) and ours.stride() == theirs.stride() and ours.dtype == theirs.dtype


@pytest.mark.parametrize("backend", BACKENDS)
def test_writes_nothing_outside_its_outputs(backend):
    columns = arguments(torch.float16)
    upstream = [torch.randn(2, cout, h, w, device=DEVICE).half() for _, cout, h, w in SHAPES]
    with cnkernels.backend(backend), guarded_empty():
        results(together, columns, upstream)


@pytest.mark.parametrize("backend", BACKENDS)
def test_outs_are_channels_of_one_buffer(backend):
    """Three layers of one size write side by side into a decoder's input; the rest keeps its sentinel."""
    xs = [harness.channels_last(randn(2, 12, 3, 5).float()) for _ in range(3)]
    weights, residuals = [randn(8, 12, 1, 1).float() for _ in xs], [randn(2, 8, 3, 5).float(), None, None]
    scales = [0.5, randn(2).float(), randn().float()]
    buffer = harness.channels_last(torch.full((2, 40, 3, 5), 42.0, device=DEVICE))
    outs = [buffer[:, first : first + 8] for first in (24, 0, 8)]
    with cnkernels.backend(backend):
        returned = cnkernels.zero_conv_add_group(xs, weights, None, residuals, scales, outs)
        expected = one_by_one(xs, weights, [None] * 3, residuals, scales)
    for out, given, want in zip(returned, outs, expected, strict=True):
        assert out is given and torch.equal(out, want)
    assert (buffer[:, 16:24] == 42).all() and (buffer[:, 32:] == 42).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_gradients_asked_for(backend, monkeypatch):
    asked = []
    kernels = group.backward
    monkeypatch.setattr(group, "backward", lambda rows: asked.append([w for *_, n in rows for w in n]) or kernels(rows))
    columns = arguments()
    xs, weights, biases, residuals, scales = columns
    wanted = [weights[0], xs[1], biases[3], scales[2], residuals[4]]
    upstream = [torch.randn(2, cout, h, w, device=DEVICE) for _, cout, h, w in SHAPES]
    with cnkernels.backend(backend):
        expected = results(one_by_one, columns, upstream, wanted)
        actual = results(together, columns, upstream, wanted)
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs)
    assert actual[-1].data_ptr() == upstream[4].data_ptr()  # the upstream gradient itself
    x, weight, bias, scale = ([i == argument for i in range(4)] for argument in range(4))
    assert asked == [weight + x + scale + bias]  # and nothing of the last layer


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_output_without_a_gradient_costs_nothing(backend, monkeypatch):
    asked = []
    kernels = group.backward
    monkeypatch.setattr(group, "backward", lambda rows: asked.append(len(rows)) or kernels(rows))
    xs, weights, *rest = arguments()
    for weight in weights:
        weight.requires_grad_()
    with cnkernels.backend(backend):
        outs = together(xs, weights, *rest)
        gradients = torch.autograd.grad(outs[1].square().sum() + outs[3].sum(), weights, allow_unused=True)
    assert asked == [2]
    assert [g is not None for g in gradients] == [False, True, False, True, False]


def test_saves_only_the_inputs_that_a_gradient_reads():
    saved = []
    columns = arguments()
    xs, weights, _, _, scales = columns
    for tensor in (xs[0], weights[1], scales[2], xs[3]):
        tensor.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        together(*columns)
    assert [x.data_ptr() in saved for x in xs] == [False, True, True, False, False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tensor_of_several_layers_gets_the_sum(backend):
    x, weight, scale = randn(2, 8, 3, 5).float(), randn(8, 8, 1, 1).float(), randn().float()
    columns = [[x, x], [weight, weight], [None, None], [None, x], [scale, scale]]
    upstream = [torch.randn_like(x) for _ in range(2)]
    with cnkernels.backend(backend):
        wanted = [x, weight, scale]
        for ours, theirs in zip(
            results(together, columns, upstream, wanted), results(one_by_one, columns, upstream, wanted), strict=True
        ):
            torch.testing.assert_close(ours, theirs)  # autograd adds three terms in another order


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layer_may_be_empty(backend):
    xs = [randn(n, 8, 4, 4).float().requires_grad_() for n in (0, 2)]
    weights = [randn(6, 8, 1, 1).float().requires_grad_() for _ in xs]
    with cnkernels.backend(backend):
        outs = cnkernels.zero_conv_add_group(xs, weights)
        gradients = torch.autograd.grad([out.sum() for out in outs], [*xs, *weights])
        alone = torch.autograd.grad(cnkernels.zero_conv_add(xs[1], weights[1]).sum(), (xs[1], weights[1]))
    assert outs[0].shape == (0, 6, 4, 4) and gradients[0].shape == xs[0].shape
    assert torch.equal(gradients[2], torch.zeros_like(weights[0]))
    assert torch.equal(gradients[1], alone[0]) and torch.equal(gradients[3], alone[1])


def test_the_largest_layer_chooses_the_backend(monkeypatch):
    asked = []
    choose = dispatch.implementation
    monkeypatch.setattr(
        dispatch, "implementation", lambda op, x, **options: asked.append((op, x.shape)) or choose(op, x, **options)
    )
    columns = arguments()
    together(*columns)
    assert asked == [("zero_conv_add", columns[0][0].shape)]


def test_gradcheck():
    xs = [randn(2, 3, 2, 2), randn(2, 2, 1, 3)]
    weights = [randn(4, 3, 1, 1), randn(2, 2, 1, 1)]
    bias, residual, scale = randn(4), randn(2, 2, 1, 3), randn(2)

    def function(*leaves):
        a, b, v, w, bias, residual, scale = leaves
        return tuple(cnkernels.zero_conv_add_group([a, b], [v, w], [bias, None], [None, residual], [scale, 0.5]))

    leaves = [t.requires_grad_() for t in (*xs, *weights, bias, residual, scale)]
    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    xs = [randn(2, 8, 3, 5).float().requires_grad_(), harness.channels_last(randn(2, 8, 4, 2).float()).requires_grad_()]
    weights = [randn(4, 8, 1, 1).float().requires_grad_(), randn(6, 8, 1, 1).float()]
    biases, residuals = [randn(6).float().requires_grad_()], [randn(2, 4, 3, 5).float().requires_grad_()]
    scales = [randn(2).float().requires_grad_()]
    given = [True, True, True, True, False, True, True, False, True, False]
    call = (xs, weights, biases, residuals, scales, given, [1.0, 0.5])
    with cnkernels.backend(backend):
        torch.library.opcheck(torch.ops.cnkernels.zero_conv_add_group.default, call)
        frozen = [[t.detach() for t in column] for column in call[:5]]
        outs = [torch.zeros(2, 9, 3, 5, device=DEVICE)[:, :4], torch.zeros(2, 6, 4, 2, device=DEVICE)]
        torch.library.opcheck(torch.ops.cnkernels.zero_conv_add_group_out.default, (*frozen, *call[5:], outs))


def test_compiles_once_for_every_size_and_scale():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    weights = [torch.randn(12, 8, 1, 1, device=DEVICE), torch.randn(8, 8, 1, 1, device=DEVICE, requires_grad=True)]

    def function(xs, residual, scales):
        return cnkernels.zero_conv_add_group(xs, weights, None, [residual, None], scales)

    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for n, height, width, number in ((2, 8, 6, 1.0), (3, 10, 14, 0.5), (5, 6, 16, 0.25), (4, 12, 10, 0.75)):
        xs = [torch.randn(n, 8, height, width, device=DEVICE, requires_grad=True) for _ in range(2)]
        residual = torch.randn(n, 12, height, width, device=DEVICE)
        scales = [number, torch.tensor(number, device=DEVICE, requires_grad=True)]
        wanted = [*xs, weights[1], scales[1]]
        outs, expected = compiled(xs, residual, scales), function(xs, residual, scales)
        for ours, theirs in zip(outs, expected, strict=True):
            torch.testing.assert_close(ours, theirs)
        gradients = (torch.autograd.grad([out.square().sum() for out in y], wanted) for y in (outs, expected))
        for ours, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs)
    assert counter.frame_count <= 2


def test_autocast():
    xs, weights, biases, residuals, scales = arguments()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        outs, expected = (
            together(xs, weights, biases, residuals, scales),
            one_by_one(xs, weights, biases, residuals, scales),
        )
    for ours, theirs in zip(outs, expected, strict=True):
        assert ours.dtype == torch.bfloat16 and torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weights": [torch.zeros(6, 8, 1, 1)]}, "`weights` must be of 2 entries, as `xs` is, got 1"),
        ({"scales": [1.0, 1.0, 1.0]}, "`scales` must be of 2 entries"),
        ({"xs": []}, "`xs` must be of at least one layer"),
        ({"biases": [None, torch.zeros(8)]}, r"layer 1: `bias` must be of shape \[6\], got shape \[8\]"),
        ({"scales": [1.0, torch.zeros(3)]}, "layer 1: `scale` must be a float or of shape"),
        (
            {"xs": [torch.zeros(2, 8, 4, 4), torch.zeros(2, 8, 4, 4).half()]}
            | {"weights": [torch.zeros(6, 8, 1, 1), torch.zeros(6, 8, 1, 1).half()]},
            "layer 1: `x` must be of the first layer's dtype, torch.float32, got torch.float16",
        ),
        ({"outs": [torch.zeros(2, 6, 4, 4), torch.zeros(2, 6, 4, 5)]}, r"layer 1: `out` must be of shape"),
        ({"outs": [torch.zeros(2, 6, 4, 4)] * 2}, r"`outs\[1\]` must be apart from all other tensors"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_one_clear_error(change, message):
    columns = {"xs": [torch.zeros(2, 8, 4, 4)] * 2, "weights": [torch.zeros(6, 8, 1, 1)] * 2} | change
    with pytest.raises(ValueError, match="zero_conv_add_group(, |: )" + message):
        cnkernels.zero_conv_add_group(**columns)


def test_an_out_over_the_input_of_another_layer_is_refused():
    whole = harness.channels_last(torch.zeros(2, 24, 4, 4))
    weights = [torch.zeros(8, 8, 1, 1)] * 2
    xs, elsewhere = [whole[:, :8], torch.zeros(2, 8, 4, 4)], torch.zeros(2, 8, 4, 4)
    cnkernels.zero_conv_add_group(xs, weights, outs=[elsewhere, whole[:, 8:16]])
    with pytest.raises(ValueError, match=r"`outs\[1\]` must be apart"):
        cnkernels.zero_conv_add_group(xs, weights, outs=[elsewhere, whole[:, 7:15]])
    with pytest.raises(ValueError, match="`outs` must be None where a gradient is recorded"):
        cnkernels.zero_conv_add_group(xs, [weights[0].requires_grad_()] * 2, outs=[elsewhere, whole[:, 8:16]])
