"""The ops' tests can fail: each kernel broken on purpose below is caught by a check that the kernel itself passes."""

import importlib
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

import cnkernels
from tests.cnkernels import harness, test_attention, test_geglu, test_group_norm_silu, test_zero_conv_add
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
            self.test(**self.arguments, backend="triton")

    def __str__(self):
        return f"{self.test.__name__}-" + "-".join(map(str, self.arguments.values()))


def zero_conv_add(*shape, layout="channels_last", dtype=SINGLE):
    return Check(test_zero_conv_add.test_equals_pytorch, {"shape": shape, "layout": layout, "dtype": dtype})


def geglu(*shape, dtype=SINGLE):
    return Check(test_geglu.test_equals_pytorch, {"shape": shape, "dtype": dtype})


def group_norm_silu(*shape, groups, layout="contiguous", dtype=SINGLE):
    arguments = {"shape": shape, "groups": groups, "layout": layout, "dtype": dtype}
    return Check(test_group_norm_silu.test_equals_pytorch, arguments)


def attention(batch, heads, queries, keys, dim, dtype=SINGLE):
    arguments = {"batch": batch, "heads": heads, "queries": queries, "keys": keys, "dim": dim, "dtype": dtype}
    return Check(test_attention.test_equals_pytorch, arguments)


RAGGED_CONV = zero_conv_add(3, 37, 41, 5, 3)
SPLIT_CONV = zero_conv_add(2, 8, 12, 17, 19, layout="contiguous")
SCALED_CONV = Check(test_zero_conv_add.test_scale_on_the_device, {"kind": "per-sample", "layout": "channels_last"})
RAGGED_GEGLU = geglu(3, 5, 2 * 37)
STRIDED_GEGLU = Check(test_geglu.test_every_layout_and_upstream_layout, {"layout": "wider", "dtype": HALF})
PRODUCT, DWEIGHT, GEGLU = "zero_conv_add/triton_product", "zero_conv_add/triton_dweight", "geglu/triton_kernels"

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
    "zero_conv_add: scale forgotten": (PRODUCT, "acc *= scale", "acc *= 1.0", RAGGED_CONV),
    "zero_conv_add: bias forgotten": (
        PRODUCT,
        "acc += tl.load(bias_ptr + column, mask=in_column, other=0.0).to(tl.float32)[None, :]",
        "acc += 0.0",
        RAGGED_CONV,
    ),
    "zero_conv_add: every sample scaled as the first": (
        PRODUCT,
        "scale_ptr + sample * stride_scale",
        "scale_ptr + sample * 0",
        SCALED_CONV,
    ),
    "zero_conv_add: columns past the last one written": (
        PRODUCT,
        "tl.store(out_ptr + offset, acc, mask=mask)",
        "tl.store(out_ptr + offset, acc, mask=in_row[:, None])",
        RAGGED_CONV,
    ),
    "zero_conv_add: tiles of channels share their part of the scale's gradient": (
        PRODUCT,
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
    "geglu: last row skipped": (GEGLU, "(row < rows)[:, None]", "(row < rows - 1)[:, None]", RAGGED_GEGLU),
    "geglu: tanh approximation": (
        GEGLU,
        "tl.erf(gate * _SQRT_HALF)",
        "2.0 * tl.sigmoid(1.5957691216 * (gate + 0.044715 * gate * gate * gate)) - 1.0",
        RAGGED_GEGLU,
    ),
    "geglu: derivative without the density": (GEGLU, "(cdf + gate * density)", "cdf", RAGGED_GEGLU),
    "geglu: value and gate exchanged": (
        GEGLU,
        "gate = tl.load(projected + columns, mask=mask, other=0.0).to(tl.float32)",
        "gate, value = value, tl.load(projected + columns, mask=mask, other=0.0).to(tl.float32)",
        RAGGED_GEGLU,
    ),
    "geglu: stride of the rows ignored": (GEGLU, "row * stride_row", "row * 2 * columns", STRIDED_GEGLU),
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
