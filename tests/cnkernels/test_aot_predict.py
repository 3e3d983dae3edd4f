"""The arithmetic of predictions against examples worked by hand, and one prediction from compiled code."""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch

from benchmarks import ops, predicted, report
from cnkernels import aot_gpus, aot_model, aot_predict, aot_sass, aot_work
from cnkernels.aot_gpus import GPUS

pytest.importorskip("triton")


@pytest.mark.parametrize(
    ("gpu", "registers", "shared", "warps", "expected"),
    [
        ("H100", 128, 0, 8, 2),  # 4096 registers a warp, 16 warps
        ("H100", 130, 0, 8, 1),  # 136 x 32 = 4352 a warp: 15 warps, which are 12 as each quarter has as many
        ("A100", 32, 163 * 1024, 4, 1),
        ("A100", 32, 81 * 1024, 4, 2),  # 82 KiB with what CUDA takes: two are 164, all that there is
        ("A100", 32, 81 * 1024 + 1, 4, 1),  # given by 128 bytes
        ("RTX 4090", 32, 0, 16, 3),  # 1536 threads
        ("A100", 32, 0, 16, 4),  # 2048
        ("RTX 4090", 16, 0, 1, 24),  # as many blocks as it holds
    ],
)
def test_occupancy(gpu, registers, shared, warps, expected):
    assert aot_gpus.blocks_per_multiprocessor(GPUS[gpu], registers, shared, warps) == expected


@pytest.mark.parametrize(
    ("name", "teraflops"), [("A100", 312), ("H100", 989.4), ("RTX 4090", 165.2), ("RTX 5090", 209.5)]
)
def test_rates_and_clocks_make_the_data_sheet_s_flops(name, teraflops):
    gpu = GPUS[name]
    assert gpu.multiprocessors * gpu.clock * gpu.tensor_flops / 1e3 == pytest.approx(teraflops, rel=0.005)


IR = """
module {
  tt.func public @kernel(%x_ptr: !tt.ptr<f16> {tt.divisibility = 16 : i32} loc("x"(#loc)), %rows: i32 loc("r"(#loc))) {
    %c0_i32 = arith.constant 0 : i32 loc(#loc1)
    %c4_i32 = arith.constant 4 : i32 loc(#loc1)
    %row = tt.get_program_id x : i32 loc(#loc2)
    %column = tt.get_program_id y : i32 loc(#loc2)
    %done = arith.muli %row, %c4_i32 : i32 loc(#loc3)
    %left = arith.subi %rows, %done : i32 loc(#loc3)
    %last = arith.minsi %left, %c4_i32 : i32 loc(#loc3)
    %0 = arith.cmpi eq, %column, %c0_i32 : i32 loc(#loc4)
    scf.if %0 {
      %sum:2 = scf.for %i = %c0_i32 to %last step %c1_i32 iter_args(%a = %cst) -> (tensor<4xf32>)  : i32 {
        %total = scf.for %j = %c0_i32 to %rows step %c4_i32 iter_args(%b = %cst) -> (f32)  : i32 {
        } loc(#loc5)
      } loc(#loc5)
    } else {
      scf.for %i = %c0_i32 to %c4_i32 step %c4_i32  : i32 {
      } loc(#loc5)
    } loc(#loc5)
    tt.return loc(#loc6)
  }
}
"""


def test_turns_of_loops():
    """Ten rows in programs of 4, 4 and 2, of which the first of two columns walks the rows, and each row all rows."""
    text = IR.replace("%c4_i32 = ", "%c1_i32 = arith.constant 1 : i32 loc(#loc1)\n    %c4_i32 = ", 1)
    assert aot_work.loop_turns(text, {"rows": 10}, (3, 2)) == [4 + 4 + 2, 10 * 3, 3]


def test_a_loop_that_depends_on_what_is_read_is_refused():
    with pytest.raises(ValueError, match="depends on what the kernel reads: %sum"):
        aot_work.loop_turns(IR, {"rows": 10}, (3, 2))  # %c1_i32 is not defined


def code(*opcodes):
    """Instructions 16 bytes apart; "BRA 0x20" branches to that address."""
    return [
        aot_sass.Instruction(16 * i, opcode.split()[0], int(opcode.split()[1], 16) if " " in opcode else None)
        for i, opcode in enumerate(opcodes)
    ]


def counts(found):
    return [found[instruction] for instruction in sorted(found)]


def test_what_is_executed():
    nested = code("S2R", "FADD", "FMUL", "BRA 0x20", "BRA 0x10", "EXIT")
    assert counts(aot_work.executed(nested, [5, 20], blocks=2)) == [2, 5, 20, 20, 5, 2]


def test_an_unrolled_loop():
    """14 turns: 3 of the loop that loads four times, and 2 of the one for the rest."""
    unrolled = code("LDG", "LDG", "LDG", "LDG", "BRA 0x0", "LDG", "BRA 0x50")
    assert counts(aot_work.executed(unrolled, [14], blocks=1)) == [3, 3, 3, 3, 3, 2, 2]


def test_one_loop_unrolled_beside_one_that_is_not():
    both = code("LDG", "LDG", "BRA 0x0", "LDG", "BRA 0x30", "LDG", "BRA 0x50")
    assert counts(aot_work.executed(both, [7, 3], blocks=1)) == [3, 3, 3, 1, 1, 3, 3]


def test_other_loops_than_those_of_the_ir_are_refused():
    with pytest.raises(ValueError, match="1 loops in the machine code, 3 in the IR"):
        aot_work.executed(code("FADD", "BRA 0x0"), [1, 1, 1], blocks=1)


@pytest.mark.parametrize(
    ("opcode", "gpu", "expected"),
    [
        ("HMMA.16816.F32", "A100", 2),  # 16 x 8 x 16 multiply-adds, 1024 a clock
        ("HMMA.16816.F32.BF16", "RTX 4090", 8),
        ("HGMMA.64x64x16.F32", "H100", 8),  # 65536 multiply-adds for four warps, 2048 a clock
        ("WARPGROUP.ARRIVE", "H100", 0),
        ("FFMA", "A100", 0.5),
        ("FFMA", "H100", 0.25),
        ("LOP3.LUT", "H100", 0.5),
        ("MUFU.EX2", "H100", 2),
        ("LDG.E.128.CONSTANT", "H100", 4),
        ("LDG.E.U16", "H100", 1),
        ("LDSM.16.MT88.4", "A100", 4),
        ("LDSM.16.M88.2", "A100", 2),
        ("BAR.SYNC", "A100", 0),
    ],
)
def test_clocks_of_an_instruction(opcode, gpu, expected):
    assert aot_predict.clocks(aot_sass.Instruction(0, opcode, None), GPUS[gpu]) == expected


# Attention twice a transformer block, geglu once; group norms; zero convolutions; of U-Net and ControlNet.
MADE = {"sd15": (16 + 7, 61 + 27, 13), "sdxl": (70 + 34, 46 + 21, 10)}


@pytest.fixture(scope="module")
def steps():
    return {name: aot_model.calls_of_model(name, 2, torch.float16, training=False) for name in MADE}


def test_a_step_makes_the_calls_of_its_model(steps):
    for name, (blocks, norms, exits) in MADE.items():
        made = Counter()
        for call, times in steps[name].items():
            made[call.name] += times
        assert made == {"attention": 2 * blocks, "geglu": blocks, "group_norm_silu": norms, "zero_conv_add": exits}


def test_the_benchmarks_time_shapes_of_the_models(steps):
    shapes = {(call.op, call.shape, call.layout) for calls in steps.values() for call in calls}
    for case in ops.cases(list(ops.OPS), [2], [torch.float16], small=False):
        if case.layout != "contiguous":  # of images the models' are channels_last
            assert (case.op, case.shape, case.layout) in shapes, case.label


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    path = tmp_path_factory.mktemp("prediction") / "prediction.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = [sys.executable, "-m", "tests.cnkernels.predictions", str(path)]
    done = subprocess.run(program, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    *table, last = done.stdout.splitlines()
    return table, json.loads(last), predicted.load(path)


def test_a_prediction(found):
    """Attention of 320 queries and keys, 2 heads of 40 columns, of which the matrix units see 48."""
    table, _, (prediction,) = found
    assert table[0].startswith("Predicted, not measured")
    (launch,) = [row for row in prediction["launches"] if row["op"] == "attention" and row["direction"] == "forward"]
    assert launch["shape"] == "B1 H2 320x320 D40"
    executed = 320 + 64  # keys, and the last tile's code, which is there for keys that are no whole tile
    assert launch["blocks"] == 2 * 320 // 64
    assert launch["instructions"]["tensor"] == 2 * (2 * 2 * 320 * executed * 48) / (2 * 16 * 8 * 16)
    assert launch["dram_bytes"] == 4 * (2 * 320 * 80) + 4 * (2 * 320)  # q, k, v, out and the sums of the rows
    assert launch["microseconds"]["DRAM"] == pytest.approx(launch["dram_bytes"] / 2039e9 * 1e6)
    held = aot_gpus.blocks_per_multiprocessor(GPUS["A100"], launch["registers"], launch["shared"], launch["warps"])
    assert launch["resident"] == held and launch["waves"] == launch["blocks"] / (held * 108)


def test_a_group_of_layers_is_counted_layer_by_layer(found):
    _, made, (prediction,) = found
    assert sorted(made["calls"]) == [
        ["attention", 1],
        ["attention_backward", 1],
        ["group_norm_silu", 1],
        ["group_norm_silu_backward", 1],
        ["zero_conv_add", 2],
        ["zero_conv_add_backward", 2],
    ]
    launched = [name.strip("_").removesuffix("_kernel") for rows in made["launched"].values() for name, _ in rows]
    assert sorted(launched) == sorted(row["kernel"] for row in prediction["launches"])


def test_what_sdxl_launches_beside_sd15_is_compiled_ahead(found):
    _, made, _ = found
    named = {name.partition(" ")[0] for name in made["of_sdxl"]}
    assert "zero_conv_add_dweight" in named and "group_norm_silu_parameter_gradients" in named


def test_measured_over_predicted(found):
    """A measured row that takes twice what is predicted; rows of others, and of other cases, have no ratio."""
    _, _, predictions = found
    case = {"kind": "op", "op": "attention", "shape": "B1 H2 320x320 D40", "dtype": "float16", "layout": "BSHD"}
    case |= {"direction": "forward", "provider": "triton"}
    (time,) = predicted.seconds(predictions[0])[tuple(case[key] for key in predicted.CASE)].values()
    rows = [
        {**case, "median": 2 * time},
        {**case, "provider": "eager", "median": 1.0},
        {**case, "shape": "other", "median": 1.0},
    ]
    result = {"machine": {"device": "NVIDIA A100-SXM4-80GB"}, "rows": rows, "tests": {}}
    (row,) = predicted.ratios(predictions, result)
    assert row["ratio"] == pytest.approx(2)
    assert "| 2.00 |" in report.against_prediction(predictions, result)
    with pytest.raises(ValueError, match="predicted for A100, measured on Tesla T4"):
        predicted.ratios(predictions, {**result, "machine": {"device": "Tesla T4"}})
