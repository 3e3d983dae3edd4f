"""Mutation tests: each check passes with the kernel as it is, and fails with the kernel broken as described below."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch

import cnkernels
from tests.cnkernels import (
    harness,
    test_attention,
    test_attention_triton,
    test_geglu,
    test_group_norm_silu,
    test_group_norm_silu_triton,
    test_zero_conv_add,
)
from tests.cnkernels.guards import guarded_empty
from tests.cnkernels.mutants import StaleMutation, is_caught, mutated

interpreter = pytest.mark.skipif(
    harness.DEVICE.type != "cpu", reason="a broken kernel may leave its buffers, which on a GPU ends the process"
)

HALF, SINGLE = torch.float16, torch.float32


@dataclass(frozen=True)
class Check:
    """One of the op's own tests, with its arguments; run with sentinels around what the launchers allocate."""

    test: Callable
    arguments: dict = field(hash=False)

    def __call__(self) -> None:
        with guarded_empty():
            takes_backend = "backend" in inspect.signature(self.test).parameters  # the others test Triton alone
            self.test(**self.arguments, **({"backend": "triton"} if takes_backend else {}))

    def __str__(self):
        values = (getattr(value, "__name__", str(value)) for value in self.arguments.values())
        return f"{self.test.__name__}-" + "-".join(values)  # without addresses: parallel workers compare test names


def zero_conv_add(*shape, layout="channels_last", dtype=SINGLE):
    return Check(test_zero_conv_add.test_equals_pytorch, {"shape": shape, "layout": layout, "dtype": dtype})


def geglu(*shape, dtype=SINGLE):
    return Check(test_geglu.test_equals_pytorch, {"shape": shape, "dtype": dtype})


def group_norm_silu(*shape, groups, layout="contiguous", dtype=SINGLE):
    arguments = {"shape": shape, "groups": groups, "layout": layout, "dtype": dtype}
    return Check(test_group_norm_silu.test_equals_pytorch, arguments)


def cut_group_norm_silu(name):
    """The shape of that name, large enough that a group is cut over programs."""
    shape, groups, dtype, layout, kernels = next(
        cut.values for cut in test_group_norm_silu_triton.CUTS if cut.id == name
    )
    arguments = {"shape": shape, "groups": groups, "dtype": dtype, "layout": layout, "expected": kernels}
    return Check(test_group_norm_silu_triton.test_every_cut_equals_pytorch_and_stays_inside, arguments)


RAGGED_CONV = zero_conv_add(3, 37, 41, 5, 3)
SPLIT_CONV = zero_conv_add(2, 8, 12, 17, 19, layout="contiguous")
SCALED_CONV = Check(test_zero_conv_add.test_scale_on_the_device, {"kind": "per-sample", "layout": "channels_last"})
RAGGED_GEGLU = geglu(3, 5, 2 * 37)
STRIDED_GEGLU = Check(test_geglu.test_every_layout_and_upstream_layout, {"layout": "wider", "dtype": HALF})
RAGGED_NORM = group_norm_silu(2, 6, 5, 13, groups=3)
NHWC_NORM = group_norm_silu(2, 6, 5, 13, groups=3, layout="channels_last")
FAR_NORM = Check(test_group_norm_silu.test_mean_far_from_zero, {"layout": "contiguous"})
CUT_NORM = cut_group_norm_silu("rows-cut")
EPS_NORM = Check(test_group_norm_silu.test_eps_counts, {"layout": "contiguous"})
_TEXT = {"batch": 2, "heads": 1, "queries": 65, "keys": 77, "dim": 40}
SHORT_ATTENTION = Check(test_attention.test_equals_pytorch, {**_TEXT, "dtype": SINGLE})
HALF_ATTENTION = Check(test_attention.test_equals_pytorch, {**_TEXT, "dtype": HALF})  # all keys in one pass
LONG_ATTENTION = Check(test_attention_triton.test_keys_that_stream, {"keys": 257, "dtype": SINGLE})
PACKED_ATTENTION = Check(test_attention.test_inputs_are_read_where_they_are, {"arrange": test_attention.packed})
SPLIT_ATTENTION = Check(  # few keys: the queries are shared out
    test_attention.test_equals_pytorch, {"batch": 1, "heads": 1, "queries": 300, "keys": 7, "dim": 16, "dtype": HALF}
)


def rounded(value: str, to: int) -> str:
    """The float32 expression with `to` of its 24 digits, by Veltkamp's splitting."""
    factor = f"{value} * {2 ** (24 - to) + 1}.0"
    return f"({factor} - ({factor} - {value}))"


def narrow(value: str) -> str:
    return f"{value}.to(tl.bfloat16).to(tl.float32)"


def exp2_by_polynomial(exponent: str, *coefficients: float) -> str:
    """p = exp2 of the expression: that of its integer part times a polynomial in the rest, Horner's way."""
    polynomial = " + f * (".join(map(repr, coefficients)) + ")" * (len(coefficients) - 1)
    return f"e = {exponent}\n    f = e - tl.floor(e)\n    p = tl.exp2(tl.floor(e)) * ({polynomial})"


MUTATIONS = {  # op, what is broken: the kernel or device function, its text, the text instead, the check that must fail
    "zero_conv_add: no mask over the depth": (
        "product",
        "in_depth = k < depth - start",
        "in_depth = k < BLOCK_K",
        RAGGED_CONV,
    ),
    "zero_conv_add: last tile of the depth skipped": (
        "product",
        "for start in range(0, depth, BLOCK_K):",
        "for start in range(0, depth - BLOCK_K, BLOCK_K):",
        RAGGED_CONV,
    ),
    "zero_conv_add: strides of the weight swapped": (
        "product",
        "k[:, None] * stride_wk + column.to(tl.int64)[None, :] * stride_wn",
        "k[:, None] * stride_wn + column.to(tl.int64)[None, :] * stride_wk",
        RAGGED_CONV,
    ),
    "zero_conv_add: scale forgotten": ("_zero_conv_add_kernel", "acc *= scale", "acc *= 1.0", RAGGED_CONV),
    "zero_conv_add: bias forgotten": (
        "_zero_conv_add_kernel",
        "acc += tl.load(bias_ptr + column, mask=in_column, other=0.0).to(tl.float32)[None, :]",
        "acc += 0.0",
        RAGGED_CONV,
    ),
    "zero_conv_add: every sample scaled as the first": (
        "_zero_conv_add_kernel",
        "scale_ptr + sample * stride_scale",
        "scale_ptr + sample * 0",
        SCALED_CONV,
    ),
    "zero_conv_add: columns past the last one written": (
        "_zero_conv_add_kernel",
        "tl.store(out_ptr + offset, acc, mask=mask)",
        "tl.store(out_ptr + offset, acc, mask=in_row[:, None])",
        RAGGED_CONV,
    ),
    "zero_conv_add: tiles of channels share their part of the scale's gradient": (
        "_zero_conv_add_dscale_kernel",
        "(pid % tiles).to(tl.int64) * rows + row",
        "row",
        SCALED_CONV,
    ),
    "zero_conv_add: last step of the weight's gradient skipped": (
        "_zero_conv_add_dweight_kernel",
        "samples * sample_steps)",
        "samples * sample_steps - 1)",
        SPLIT_CONV,
    ),
    "zero_conv_add: no mask over a sample's pixels": (
        "_zero_conv_add_dweight_kernel",
        "is_pixel = pixel < hw",
        "is_pixel = pixel < sample_steps * BLOCK_P",
        SPLIT_CONV,
    ),
    "zero_conv_add: last splits not added": (
        "_sum_splits_kernel",
        "for start in range(0, splits, BLOCK_S):",
        "for start in range(0, splits - BLOCK_S, BLOCK_S):",
        zero_conv_add(2, 8, 12, 17, 19),
    ),
    "zero_conv_add: gradients of the weight and bias not scaled": (
        "_zero_conv_add_dweight_kernel",
        "factor = scale if scale_ptr is None else tl.load(scale_ptr)",
        "factor = 1.0",
        RAGGED_CONV,
    ),
    "geglu: columns past the last one written": (
        "_geglu_fwd_kernel",
        "value * (gate * cdf), mask=mask)",
        "value * (gate * cdf), mask=row < rows)",
        RAGGED_GEGLU,
    ),
    "geglu: last row skipped": ("tile", "(row < rows)[:, None]", "(row < rows - 1)[:, None]", RAGGED_GEGLU),
    "geglu: tanh approximation": (
        "_geglu_fwd_kernel",
        "tl.erf(gate * SQRT_HALF)",
        "2.0 * tl.sigmoid(1.5957691216 * (gate + 0.044715 * gate * gate * gate)) - 1.0",
        RAGGED_GEGLU,
    ),
    "geglu: derivative without the density": ("_geglu_bwd_kernel", "(cdf + gate * density)", "cdf", RAGGED_GEGLU),
    "geglu: value and gate exchanged": (
        "_geglu_fwd_kernel",
        "gate = tl.load(projected + columns, mask=mask, other=0.0).to(tl.float32)",
        "gate, value = value, tl.load(projected + columns, mask=mask, other=0.0).to(tl.float32)",
        RAGGED_GEGLU,
    ),
    "geglu: stride of the rows ignored": ("_geglu_fwd_kernel", "row * stride_row", "row * 2 * columns", STRIDED_GEGLU),
    "group_norm_silu: eps ignored": (
        "inverse_deviation",
        "eps = tl.cast(eps, tl.float32)",
        "eps = eps * 0.0",
        EPS_NORM,
    ),
    "group_norm_silu: variance about zero": (
        "_group_norm_silu_rows_fused_fwd_kernel",
        "rough = (tl.sum(sums) + tl.sum(sums_of_addend)) / count",
        "rough = 0.0",
        FAR_NORM,
    ),
    "group_norm_silu: values outside the mask counted": (
        "_group_norm_silu_rows_fused_fwd_kernel",
        "tl.where(places[tile][1], tiles[tile].to(tl.float32) - shift[:, None], 0.0)",
        "tiles[tile].to(tl.float32) - shift[:, None]",
        RAGGED_NORM,
    ),
    "group_norm_silu: positions past the last one written": (
        "_group_norm_silu_rows_fused_fwd_kernel",
        "y.to(y_ptr.dtype.element_ty), mask=mask)",
        "y.to(y_ptr.dtype.element_ty))",
        RAGGED_NORM,
    ),
    "group_norm_silu: last tile of a run skipped": (
        "_group_norm_silu_rows_apply_kernel",
        "for tile in range(run_tiles):",
        "for tile in range(run_tiles - 1):",
        CUT_NORM,
    ),
    "group_norm_silu: chunks merged as if they had one mean": (
        "merge_moments",
        "m2 + count * rest * rest",
        "m2",
        CUT_NORM,
    ),
    "group_norm_silu: strides of channels_last swapped": (
        "_group_norm_silu_spans_fused_fwd_kernel",
        "position[:, None] * channels + channel[None, :]",
        "position[:, None] + channel[None, :] * spatial",
        NHWC_NORM,
    ),
    "group_norm_silu: a channel in its neighbour's group": (
        "members",
        "(channel[None, :] >= start)",
        "(channel[None, :] > start)",
        NHWC_NORM,
    ),
    "group_norm_silu: one of the two means of dx for the other": (
        "_group_norm_silu_rows_fused_bwd_kernel",
        "normed_tiles[tile] * mean_dn",
        "normed_tiles[tile] * mean_d",
        RAGGED_NORM,
    ),
    "group_norm_silu: positions outside a short row summed for the addend": (
        "_group_norm_silu_rows_fused_bwd_kernel",
        "normed if WHOLE_ROWS else tl.where(mask, normed, 0.0)",
        "normed",
        RAGGED_NORM,
    ),
    "group_norm_silu: last sample's gradient of the weight skipped": (
        "_group_norm_silu_parameter_gradients_kernel",
        "_sum_parts(base + stride_channel_sum, batch, parts,",
        "_sum_parts(base + stride_channel_sum, batch - 1, parts,",
        RAGGED_NORM,
    ),
    "group_norm_silu: gradient of the addend without a mean": (
        "_group_norm_silu_parameter_gradients_kernel",
        "- spatial * mean_d",
        "",
        RAGGED_NORM,
    ),
    "attention: absent keys attended to": (
        "_attention_fwd_single_kernel",
        "p = tl.where((columns < keys)[None, :], p, 0.0) if i == RAGGED else p",
        "p = p",
        HALF_ATTENTION,
    ),
    "attention: absent keys of the last tile attended to": (
        "_step",
        "p = tl.where(present, p, 0.0) if MASK else p",
        "p = p",
        LONG_ATTENTION,
    ),
    "attention: last tile of keys skipped": (
        "_attention_fwd_kernel",
        "if full < keys:",
        "if full < 0:",
        LONG_ATTENTION,
    ),
    "attention: sums not rescaled": (
        "_rescaled",
        "return scale_tiles(acc, factor[:, None]), row_sum * factor",
        "return acc, row_sum",
        LONG_ATTENTION,
    ),
    "attention: exp of scores in units of log2": (
        "_attention_fwd_single_kernel",
        "tl.exp2(scores[i] * scale - _finite(row_max)[:, None])",
        "tl.exp(scores[i] * scale - _finite(row_max)[:, None])",
        HALF_ATTENTION,
    ),
    "attention: strides of batch and head swapped": (
        "_attention_fwd_kernel",
        "batch * stride_kb + head * stride_kh",
        "batch * stride_kh + head * stride_kb",
        PACKED_ATTENTION,
    ),
    "attention: queries past the last one written": (
        "store_tiles",
        "mask = (columns < HEAD_DIM)[None, :] & (rows < length)[:, None]",
        "mask = (columns < HEAD_DIM)[None, :]",
        SHORT_ATTENTION,
    ),
    "attention: columns past the head dimension written": (
        "store_tiles",
        "mask = (columns < HEAD_DIM)[None, :] & (rows < length)[:, None]",
        "mask = (rows < length)[:, None]",
        SHORT_ATTENTION,
    ),
    "attention: log-sum-exp in units of log2": (
        "_finish",
        "tl.log2(row_sum)) * _LN2",
        "tl.log2(row_sum))",
        Check(test_attention.test_log_sum_exp, {}),
    ),
    "attention: dq without delta": (
        "_query_step",
        "(product_nt(dout, v) - delta[:, None])",
        "product_nt(dout, v)",
        SHORT_ATTENTION,
    ),
    "attention: dk not scaled": (
        "_attention_bwd_key_kernel",
        "dk = scale_tiles(dk, scale)",
        "dk = dk",
        SHORT_ATTENTION,
    ),
    "attention: last tile of queries skipped": (
        "_attention_bwd_key_kernel",
        "if full < last:",
        "if full < 0:",
        SHORT_ATTENTION,
    ),
    "attention: last part of the queries not added": (
        "_attention_bwd_sum_kernel",
        "for part in range(parts):",
        "for part in range(parts - 1):",
        SPLIT_ATTENTION,
    ),
} | {  # what is right but for its rounding: about three times the error of eager, or the mistakes that bring it
    "attention: a product rounded to bfloat16": (
        "_attention_fwd_single_kernel",
        "block = product_nt(q, k)",
        f"block = {narrow('product_nt(q, k)')}",
        HALF_ATTENTION,
    ),
    "attention: exp of degree 2": (
        "_step",
        "p = tl.exp2(scores * scale - _finite(row_max)[:, None])",
        exp2_by_polynomial("scores * scale - _finite(row_max)[:, None]", 1.00164934, 0.65840990, 0.33634300),
        LONG_ATTENTION,
    ),
    "attention: exp of degree 4": (
        "_step",
        "p = tl.exp2(scores * scale - _finite(row_max)[:, None])",
        exp2_by_polynomial(
            "scores * scale - _finite(row_max)[:, None]", 1.00000252, 0.69300662, 0.24142749, 0.05203743, 0.01352060
        ),
        LONG_ATTENTION,
    ),
    "attention: probabilities of 18 bits": (
        "_step",
        "add_product(acc, p, v)",
        f"add_product(acc, {rounded('p', 18)}, v)",
        SHORT_ATTENTION,
    ),
    "attention: gradients of the scores of 18 bits": (
        "_query_step",
        "add_product(dq, ds, k)",
        f"add_product(dq, {rounded('ds', 18)}, k)",
        SHORT_ATTENTION,
    ),
    "attention: a sum kept in half precision": (
        "add_product",
        'tl.dot(a, b[i], accumulator[i], input_precision="ieee")',
        'tl.dot(a, b[i], accumulator[i], input_precision="ieee").to(tl.float16).to(tl.float32)',
        LONG_ATTENTION,
    ),
    "attention: parts of the queries added in bfloat16": (
        "_attention_bwd_sum_kernel",
        "total += tl.load(parts_ptr",
        f"total = {narrow('total')} + tl.load(parts_ptr",
        SPLIT_ATTENTION,
    ),
    "zero_conv_add: a product rounded to bfloat16": (
        "_zero_conv_add_kernel",
        "acc *= scale",
        f"acc = {narrow('acc')} * scale",
        zero_conv_add(3, 37, 41, 5, 3, dtype=HALF),
    ),
    "zero_conv_add: a product of 19 bits": (
        "_zero_conv_add_kernel",
        "acc *= scale",
        f"acc = {rounded('acc', 19)} * scale",
        RAGGED_CONV,
    ),
    "zero_conv_add: a sum kept in half precision": (
        "product",
        'acc = tl.dot(x, weight, acc, input_precision="ieee")',
        'acc = tl.dot(x, weight, acc, input_precision="ieee").to(tl.float16).to(tl.float32)',
        RAGGED_CONV,
    ),
    "zero_conv_add: splits rounded to bfloat16 before they are added": (
        "_sum_splits_kernel",
        "tl.sum(acc, axis=0)",
        f"tl.sum({narrow('acc')}, axis=0)",
        zero_conv_add(2, 8, 12, 17, 19, dtype=HALF),
    ),
    "geglu: a product rounded to bfloat16": (
        "_geglu_fwd_kernel",
        "value * (gate * cdf)",
        "(value * (gate * cdf)).to(tl.bfloat16)",
        geglu(2, 77, 2 * 40, dtype=HALF),
    ),
    "geglu: a derivative rounded to bfloat16": (
        "_geglu_bwd_kernel",
        "(cdf + gate * density)",
        narrow("(cdf + gate * density)"),
        geglu(2, 77, 2 * 40, dtype=HALF),
    ),
    "group_norm_silu: squares summed in half precision": (
        "_group_norm_silu_rows_fused_fwd_kernel",
        "squares = tl.fma(deviation, deviation, squares)",
        "squares = tl.fma(deviation, deviation, squares).to(tl.float16).to(tl.float32)",
        RAGGED_NORM,
    ),
    "group_norm_silu: deviations of 19 bits": (
        "_group_norm_silu_rows_fused_fwd_kernel",
        "tl.fma(deviations[tile], scale[:, None], bias[:, None])",
        f"tl.fma({rounded('deviations[tile]', 19)}, scale[:, None], bias[:, None])",
        RAGGED_NORM,
    ),
    "group_norm_silu: gradients of 19 bits": (
        "_group_norm_silu_rows_fused_bwd_kernel",
        "rstd * (d_tiles[tile] - mean_d",
        f"rstd * ({rounded('d_tiles[tile]', 19)} - mean_d",
        RAGGED_NORM,
    ),
}


@interpreter
@pytest.mark.parametrize("name", MUTATIONS)
def test_mutant_is_caught(name, tmp_path):
    op = name.partition(":")[0]
    *mutation, check = MUTATIONS[name]
    with mutated(op, *mutation, tmp_path):
        assert is_caught(check), f"{check} passes with the broken kernel"


@interpreter
@pytest.mark.parametrize("check", dict.fromkeys(mutation[-1] for mutation in MUTATIONS.values()), ids=str)
def test_kernel_passes(check):
    check()


@interpreter
def test_a_kernel_is_whole_again(tmp_path):
    name = "geglu: value and gate exchanged"
    *mutation, check = MUTATIONS[name]
    with mutated("geglu", *mutation, tmp_path):
        assert is_caught(check)
    assert not is_caught(check)


@interpreter
@pytest.mark.parametrize(
    "kernel, text, message",
    [
        ("_geglu_fwd_kernel", "value = value + gate", "has 'value = value \\+ gate' 0 times, not once"),
        ("_geglu_fwd_kernel", "gate", r"has 'gate' \d+ times, not once"),
        ("_geglu_kernel_of_old", "gate", "geglu has no Triton kernel _geglu_kernel_of_old"),
    ],
    ids=["text that is gone", "text in several places", "kernel that is gone"],
)
def test_a_stale_mutation_fails(kernel, text, message, tmp_path):
    with pytest.raises(StaleMutation, match=message), mutated("geglu", kernel, text, "", tmp_path):
        pass


def test_an_error_of_the_kernel_catches_nothing():
    def check():
        with cnkernels.backend("no such backend"):
            pass

    with pytest.raises(ValueError, match="no such backend"):
        is_caught(check)
