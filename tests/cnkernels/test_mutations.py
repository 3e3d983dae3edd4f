"""The ops' tests can fail: each kernel broken on purpose below is caught by a check that the kernel itself passes."""

import importlib
import inspect
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

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
NORM, NORM_FORWARD = "group_norm_silu/triton_common", "group_norm_silu/triton_forward"
NORM_BACKWARD = "group_norm_silu/triton_backward"
ATTENTION, ATTENTION_TILES = "attention/triton_forward", "attention/triton_common"
ATTENTION_BACKWARD, ATTENTION_LAUNCH = "attention/triton_backward", "attention/triton_kernels"
PRODUCT, PRODUCT_ADD = "zero_conv_add/triton_common", "zero_conv_add/triton_forward"
DWEIGHT = "zero_conv_add/triton_backward"
GEGLU_TILE, GEGLU, GEGLU_BACKWARD = "geglu/triton_common", "geglu/triton_forward", "geglu/triton_backward"

MUTATIONS = {  # what is broken: file, its text, the text instead, the check that must fail
    "zero_conv_add: no mask over the depth": (
        PRODUCT,
        "in_depth = k < depth - start",
        "in_depth = k < BLOCK_K",
        RAGGED_CONV,
    ),
    "zero_conv_add: last tile of the depth skipped": (
        PRODUCT,
        "for start in range(0, depth, BLOCK_K):",
        "for start in range(0, depth - BLOCK_K, BLOCK_K):",
        RAGGED_CONV,
    ),
    "zero_conv_add: strides of the weight swapped": (
        PRODUCT,
        "k[:, None] * stride_wk + column.to(tl.int64)[None, :] * stride_wn",
        "k[:, None] * stride_wn + column.to(tl.int64)[None, :] * stride_wk",
        RAGGED_CONV,
    ),
    "zero_conv_add: scale forgotten": (PRODUCT_ADD, "acc *= scale", "acc *= 1.0", RAGGED_CONV),
    "zero_conv_add: bias forgotten": (
        PRODUCT_ADD,
        "acc += tl.load(bias_ptr + column, mask=in_column, other=0.0).to(tl.float32)[None, :]",
        "acc += 0.0",
        RAGGED_CONV,
    ),
    "zero_conv_add: every sample scaled as the first": (
        PRODUCT_ADD,
        "scale_ptr + sample * stride_scale",
        "scale_ptr + sample * 0",
        SCALED_CONV,
    ),
    "zero_conv_add: columns past the last one written": (
        PRODUCT_ADD,
        "tl.store(out_ptr + offset, acc, mask=mask)",
        "tl.store(out_ptr + offset, acc, mask=in_row[:, None])",
        RAGGED_CONV,
    ),
    "zero_conv_add: tiles of channels share their part of the scale's gradient": (
        DWEIGHT,
        "(pid % tiles).to(tl.int64) * rows + row",
        "row",
        SCALED_CONV,
    ),
    "zero_conv_add: last step of the weight's gradient skipped": (
        DWEIGHT,
        "samples * sample_steps)",
        "samples * sample_steps - 1)",
        SPLIT_CONV,
    ),
    "zero_conv_add: no mask over a sample's pixels": (
        DWEIGHT,
        "is_pixel = pixel < hw",
        "is_pixel = pixel < sample_steps * BLOCK_P",
        SPLIT_CONV,
    ),
    "zero_conv_add: last splits not added": (
        DWEIGHT,
        "for start in range(0, splits, BLOCK_S):",
        "for start in range(0, splits - BLOCK_S, BLOCK_S):",
        zero_conv_add(2, 8, 12, 17, 19),
    ),
    "zero_conv_add: gradients of the weight and bias not scaled": (
        DWEIGHT,
        "factor = scale if scale_ptr is None else tl.load(scale_ptr)",
        "factor = 1.0",
        RAGGED_CONV,
    ),
    "geglu: columns past the last one written": (
        GEGLU,
        "value * (gate * cdf), mask=mask)",
        "value * (gate * cdf), mask=row < rows)",
        RAGGED_GEGLU,
    ),
    "geglu: last row skipped": (GEGLU_TILE, "(row < rows)[:, None]", "(row < rows - 1)[:, None]", RAGGED_GEGLU),
    "geglu: tanh approximation": (
        GEGLU,
        "tl.erf(gate * SQRT_HALF)",
        "2.0 * tl.sigmoid(1.5957691216 * (gate + 0.044715 * gate * gate * gate)) - 1.0",
        RAGGED_GEGLU,
    ),
    "geglu: derivative without the density": (GEGLU_BACKWARD, "(cdf + gate * density)", "cdf", RAGGED_GEGLU),
    "geglu: value and gate exchanged": (
        GEGLU,
        "gate = tl.load(projected + columns, mask=mask, other=0.0).to(tl.float32)",
        "gate, value = value, tl.load(projected + columns, mask=mask, other=0.0).to(tl.float32)",
        RAGGED_GEGLU,
    ),
    "geglu: stride of the rows ignored": (GEGLU, "row * stride_row", "row * 2 * columns", STRIDED_GEGLU),
    "group_norm_silu: eps ignored": (NORM, "eps = tl.cast(eps, tl.float32)", "eps = eps * 0.0", EPS_NORM),
    "group_norm_silu: variance about zero": (NORM_FORWARD, "rough = tl.sum(sums) / count", "rough = 0.0", FAR_NORM),
    "group_norm_silu: values outside the mask counted": (
        NORM_FORWARD,
        "deviation = tl.where(mask, tiles[tile] - rough, 0.0)",
        "deviation = tiles[tile] - rough",
        RAGGED_NORM,
    ),
    "group_norm_silu: positions past the last one written": (
        NORM_FORWARD,
        "y.to(y_ptr.dtype.element_ty), mask=mask)",
        "y.to(y_ptr.dtype.element_ty))",
        RAGGED_NORM,
    ),
    "group_norm_silu: last rows of a chunk skipped": (
        NORM_FORWARD,
        "for row in range(first, end, BLOCK_R):",
        "for row in range(first, end - BLOCK_R, BLOCK_R):",
        CUT_NORM,
    ),
    "group_norm_silu: chunks merged as if they had one mean": (
        NORM,
        "m2 + count * rest * rest",
        "m2",
        CUT_NORM,
    ),
    "group_norm_silu: strides of channels_last swapped": (
        NORM_FORWARD,
        "position[:, None] * channels + channel[None, :]",
        "position[:, None] + channel[None, :] * spatial",
        NHWC_NORM,
    ),
    "group_norm_silu: a channel in its neighbour's group": (
        NORM,
        "group = channel // group_channels - first_group",
        "group = (channel + 1) // group_channels - first_group",
        NHWC_NORM,
    ),
    "group_norm_silu: one of the two means of dx for the other": (
        NORM_BACKWARD,
        "normed_tiles[tile] * mean_dn",
        "normed_tiles[tile] * mean_d",
        RAGGED_NORM,
    ),
    "group_norm_silu: last sample's gradient of the weight skipped": (
        NORM_BACKWARD,
        "for sample in range(0, batch):",
        "for sample in range(0, batch - 1):",
        RAGGED_NORM,
    ),
    "group_norm_silu: gradient of the addend without a mean": (
        NORM_BACKWARD,
        "- spatial * mean_d",
        "",
        RAGGED_NORM,
    ),
    "attention: absent keys attended to": (
        ATTENTION,
        "p = tl.where((columns < keys)[None, :], p, 0.0) if i == RAGGED else p",
        "p = p",
        HALF_ATTENTION,
    ),
    "attention: absent keys of the last tile attended to": (
        ATTENTION,
        "p = tl.where(present, p, 0.0) if MASK else p",
        "p = p",
        LONG_ATTENTION,
    ),
    "attention: last tile of keys skipped": (ATTENTION, "if full < keys:", "if full < 0:", LONG_ATTENTION),
    "attention: sums not rescaled": (
        ATTENTION,
        "return scale_tiles(acc, factor[:, None]), row_sum * factor",
        "return acc, row_sum",
        LONG_ATTENTION,
    ),
    "attention: exp of scores in units of log2": (
        ATTENTION_LAUNCH,
        "scale * math.log2(math.e),",
        "scale,",
        SHORT_ATTENTION,
    ),
    "attention: strides of batch and head swapped": (
        ATTENTION,
        "batch * stride_kb + head * stride_kh",
        "batch * stride_kh + head * stride_kb",
        PACKED_ATTENTION,
    ),
    "attention: queries past the last one written": (
        ATTENTION_TILES,
        "mask = (columns < HEAD_DIM)[None, :] & (rows < length)[:, None]",
        "mask = (columns < HEAD_DIM)[None, :]",
        SHORT_ATTENTION,
    ),
    "attention: columns past the head dimension written": (
        ATTENTION_TILES,
        "mask = (columns < HEAD_DIM)[None, :] & (rows < length)[:, None]",
        "mask = (rows < length)[:, None]",
        SHORT_ATTENTION,
    ),
    "attention: log-sum-exp in units of log2": (
        ATTENTION,
        "tl.log2(row_sum)) * _LN2",
        "tl.log2(row_sum))",
        Check(test_attention.test_log_sum_exp, {}),
    ),
    "attention: dq without delta": (
        ATTENTION_BACKWARD,
        "(product_nt(dout, v) - delta[:, None])",
        "product_nt(dout, v)",
        SHORT_ATTENTION,
    ),
    "attention: dk not scaled": (ATTENTION_BACKWARD, "dk = scale_tiles(dk, scale)", "dk = dk", SHORT_ATTENTION),
    "attention: last tile of queries skipped": (
        ATTENTION_BACKWARD,
        "if full < last:",
        "if full < 0:",
        SHORT_ATTENTION,
    ),
    "attention: last part of the queries not added": (
        ATTENTION_BACKWARD,
        "for part in range(parts):",
        "for part in range(parts - 1):",
        SPLIT_ATTENTION,
    ),
}


@pytest.fixture
def run_mutated(tmp_path, monkeypatch):
    """Runs a check with a copy of an op's Triton modules in place of the op's own, one text of one file replaced."""

    def run(file: str, old: str, new: str, check: Callable) -> None:
        op, name = file.split("/")
        source = Path(cnkernels.__file__).parent / op
        package = f"mutant_{tmp_path.name}_{next(_serial)}"
        folder = tmp_path / package
        folder.mkdir()
        for path in source.glob("triton_*.py"):
            text = path.read_text()
            if path.stem == name:
                assert old in text, f"{file}.py no longer has {old!r}: update this mutation"
                text = text.replace(old, new)
            (folder / path.name).write_text(text.replace(f"cnkernels.{op}.triton_", f"{package}.triton_"))
        monkeypatch.syspath_prepend(tmp_path)
        importlib.import_module(f"cnkernels.{op}.triton_kernels")
        monkeypatch.setitem(
            sys.modules, f"cnkernels.{op}.triton_kernels", importlib.import_module(f"{package}.triton_kernels")
        )
        check()

    return run


_serial = itertools.count()


@interpreter
@pytest.mark.parametrize("mutation", MUTATIONS.values(), ids=MUTATIONS)
def test_mutant_is_caught(mutation, run_mutated):
    with pytest.raises(AssertionError):
        run_mutated(*mutation)


@interpreter
@pytest.mark.parametrize("check", dict.fromkeys(mutation[-1] for mutation in MUTATIONS.values()), ids=str)
def test_kernel_passes(check):
    check()
