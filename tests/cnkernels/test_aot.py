"""Every op's kernels compile for every generation of GPU: matrix units, shared memory, no spills, lean inner loops.

Compiled in a process of its own, because under TRITON_INTERPRET=1, as the other op tests run, kernels are Python. Where
machine code is read, the first case of each kernel; elsewhere one in `EVERY` of each kernel's cases, others for each
architecture: all of them take minutes, and are what `python -m cnkernels.aot` compiles.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod

import pytest

from cnkernels.aot import ARCHITECTURES
from cnkernels.dispatch import OPS
from tests.cnkernels.aot_report import READ

EVERY = 24


def run(*arguments, interpret=False):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    return subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, env=environment)


@cache
def compiled(op: str) -> list[dict]:
    """What `aot_report` says of the op: compiled once for all tests."""
    done = run("tests.cnkernels.aot_report", op, str(EVERY))
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("op", OPS)
def test_no_default_configuration_has_a_fault(op):
    rows = compiled(op)
    assert {row["arch"] for row in rows} == set(ARCHITECTURES)
    faulty = {f"sm_{row['arch']} {row['case']}": row["faults"] for row in rows if row["faults"]}
    assert not faulty


@dataclass(frozen=True)
class Bound:
    """The most instructions that a unit of work may take in a kernel's inner loop: in all, and of some pipes.

    `units` gives a thread's or a warp's work in one turn, from the kernel's constants, before it is divided by the
    warps. A kernel without a loop is counted whole.
    """

    op: str
    units: Callable[[Mapping[str, int]], float]
    most: float
    pipes: Mapping[str, float]


def excess(row: Mapping, bound: Bound) -> list[str]:
    """What of the row's instructions is over the bound, in words."""
    units = bound.units(row["constants"]) / row["warps"]
    taken = {pipe: count / units for pipe, count in row["pipes"].items()}
    found = [(sum(taken.values()), bound.most, "instructions")]
    found += [(taken.get(pipe, 0), most, f"of pipe {pipe}") for pipe, most in bound.pipes.items()]
    return [f"{count:.2f} {what} a unit, the bound is {most}" for count, most, what in found if count > most]


def elements(*names: str) -> Callable[[Mapping[str, int]], float]:
    """Elements of a thread in a tile with these sides."""
    return lambda constants: prod(constants[name] for name in names) / 32


def group_norm(columns: str, most: float, mufu: float, memory: float, tiles: Sequence[str] = ()) -> Bound:
    pipes = {"mufu": mufu, "memory": memory}
    return Bound("group_norm_silu", elements("BLOCK_R", columns, *tiles), most, pipes)


def attention(most: float, tensor: float, mufu: float, memory: float, *sides: str) -> Bound:
    """Of 16 queries by 64 keys for a warp; of 16 queries by all keys where no side in keys is given."""

    def fragments(constants: Mapping[str, int]) -> float:
        return constants["BLOCK_M"] / 16 * prod(constants[side] / 64 for side in sides)

    return Bound("attention", fragments, most, {"tensor": tensor, "mufu": mufu, "memory": memory})


def product(most: float, tensor: float, memory: float, *sides: str) -> Bound:
    """Of 16 x 8 x 16 multiply-adds for a warp: an HMMA."""
    pipes = {"tensor": tensor, "memory": memory}
    return Bound("zero_conv_add", lambda constants: prod(constants[side] for side in sides) / 2048, most, pipes)


# Of fp16. What an element cannot do without, and a tenth for addresses, masks and the loop: to unpack it (1), SiLU
# (ex2 and rsqrt, and 6 to scale, add and multiply), and 1/8 of an access of 16 bytes, or of three.
BOUNDS = {
    # Subtract, select, add, square.
    "_group_norm_silu_rows_stats_kernel": group_norm("BLOCK_W", 7.5, 0.1, 0.2),
    "_group_norm_silu_spans_stats_kernel": group_norm("BLOCK_C", 9.5, 0.1, 0.2),
    # Subtract, scale, SiLU, half a pack.
    "_group_norm_silu_rows_apply_kernel": group_norm("BLOCK_W", 16.5, 2.1, 0.3),
    "_group_norm_silu_spans_apply_kernel": group_norm("BLOCK_C", 17, 2.1, 0.3),
    # Unpack two, normalise, SiLU and its derivative, three sums, and no reduction over threads inside the loop.
    "_group_norm_silu_rows_sums_kernel": group_norm("BLOCK_W", 24, 2.1, 0.3),
    "_group_norm_silu_spans_sums_kernel": group_norm("BLOCK_C", 24, 2.1, 0.3),
    # The same, and dx for the sums.
    "_group_norm_silu_rows_dx_kernel": group_norm("BLOCK_W", 26, 2.1, 0.45),
    "_group_norm_silu_spans_dx_kernel": group_norm("BLOCK_C", 27, 2.1, 0.45),
    # Whole kernels: statistics and apply, sums and dx, and what is done once: reductions over the program, parameters.
    "_group_norm_silu_rows_fused_fwd_kernel": group_norm("BLOCK_W", 39, 2.5, 2.5, ["TILES"]),
    "_group_norm_silu_rows_fused_bwd_kernel": group_norm("BLOCK_W", 51, 2.3, 4.5, ["TILES"]),
    "_group_norm_silu_spans_fused_fwd_kernel": group_norm("BLOCK_C", 54, 2.6, 9),
    "_group_norm_silu_spans_fused_bwd_kernel": group_norm("BLOCK_C", 55, 2.4, 7.5),
    # A few programs, whose loads wait for L2: a partial sum takes an address by a division, and an addition.
    "_group_norm_silu_parameter_gradients_kernel": Bound(
        "group_norm_silu", elements("BLOCK_C", "BLOCK_P"), 33, {"mufu": 0.5, "memory": 1.1}
    ),
    # At 40 columns of a head, padded to 48: 24 HMMA for each product of 64 keys (2 forward; 3 for dq), one ex2 for two
    # scores and a thread, 64 FFMA to scale, 32 additions, as many maxima, conversions in pairs.
    "_attention_fwd_kernel": attention(350, 48, 34, 48, "BLOCK_N"),
    "_attention_bwd_query_kernel": attention(330, 72, 32, 58, "BLOCK_N"),
    # Tiles of 32 keys: each warp's 16 keys meet all queries twice, for dk and for dv.
    "_attention_bwd_key_kernel": attention(870, 192, 64, 180, "BLOCK_N"),
    # The whole kernel, of 80 keys in one pass: with the loads of queries and keys and the division at the end.
    "_attention_fwd_single_kernel": attention(980, 60, 50, 115),
    # An HMMA takes half a load of fragments, and its share of copies and addresses.
    "_zero_conv_add_kernel": product(2.9, 1, 0.65, "BLOCK_M", "BLOCK_N", "BLOCK_K"),
    "_zero_conv_add_dscale_kernel": product(2.9, 1, 0.65, "BLOCK_M", "BLOCK_N", "BLOCK_K"),
    # Smaller tiles, both transposed; a fifth HMMA in four sums dout for the bias.
    "_zero_conv_add_dweight_kernel": product(7.4, 1.25, 1.15, "BLOCK_O", "BLOCK_C", "BLOCK_P"),
    # A load, an addition and an address.
    "_attention_bwd_sum_kernel": Bound("attention", elements("BLOCK"), 11.5, {"memory": 1.2}),
    "_sum_splits_kernel": Bound("zero_conv_add", elements("BLOCK_S", "BLOCK"), 4.6, {"memory": 0.35}),
    # erf is two polynomials of six terms and a selection between them; the derivative has an exponential on top.
    "_geglu_fwd_kernel": Bound("geglu", elements("BLOCK_ROWS", "BLOCK_COLUMNS"), 45, {"mufu": 1.3, "memory": 0.8}),
    "_geglu_bwd_kernel": Bound("geglu", elements("BLOCK_ROWS", "BLOCK_COLUMNS"), 60, {"mufu": 2.3, "memory": 1.1}),
}


@pytest.mark.parametrize("kernel", BOUNDS)
def test_an_inner_loop_is_lean(kernel):
    bound = BOUNDS[kernel]
    rows = [row for row in compiled(bound.op) if row["kernel"] == kernel and row["arch"] in READ]
    assert {row["arch"] for row in rows} == set(READ)
    over = {f"sm_{row['arch']} {row['case']}": excess(row, bound) for row in rows if excess(row, bound)}
    assert not over


def test_every_kernel_has_a_bound():
    kernels = {row["kernel"]: op for op in OPS for row in compiled(op)}
    assert kernels == {kernel: bound.op for kernel, bound in BOUNDS.items()}


def test_the_bounds_see_an_excess():
    """Three instructions more for an element, as the division in a sigmoid takes; one access for every element."""
    bound = BOUNDS["_geglu_fwd_kernel"]
    row = next(row for row in compiled("geglu") if row["kernel"] == "_geglu_fwd_kernel" and row["arch"] == 90)
    assert not excess(row, bound)
    elements = bound.units(row["constants"]) / row["warps"]
    slower = row | {"pipes": row["pipes"] | {"alu": row["pipes"]["alu"] + 3 * elements}}
    assert [re.sub(r"[\d.]+ ", "", what, count=1) for what in excess(slower, bound)] == [
        f"instructions a unit, the bound is {bound.most}"
    ]
    narrow = row | {"pipes": row["pipes"] | {"memory": 2 * elements}}
    assert any("of pipe memory" in what for what in excess(narrow, bound))


def test_each_fault_is_found():
    done = run("tests.cnkernels.aot_kernels")
    assert done.returncode == 0, done.stderr
    rows = [line.split("|") for line in done.stdout.splitlines()]
    sound = [row for row in rows if row[0] == "sound"]
    assert [row[1:] for row in sound] == [[str(arch), target.matrix_unit, ""] for arch, target in ARCHITECTURES.items()]
    faults = {name: fault for name, _, _, fault in rows if name != "sound"}
    assert re.fullmatch(r"\d+ spill instructions", faults["spills"])
    assert faults["shared"] == "393216 bytes of shared memory, the limit is 232448"
    assert faults["unit"] == "no HGMMA"
    assert re.fullmatch(r"\d+ float64 instructions", faults["double"])


def test_the_interpreter_is_refused():
    done = run("cnkernels.aot", interpret=True)
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stderr
