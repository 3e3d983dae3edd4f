"""Tables, plots and comparisons of small made-up benchmark results."""

import copy

import pytest

from benchmarks import report, rows

MACHINE = {
    "device": "GPU X",
    "torch": "2.13",
    "triton": "3.7",
    "commit": "0123456789abcdef",
    "date": "2026-01-02T03:04:05",
}


def row(provider, median=None, **extra):
    case = {"kind": "op", "op": "geglu", "shape": "B2", "dtype": "float16", "layout": "rows", "direction": "forward"}
    timed = {} if median is None else {"median": median, "p20": median * 0.98, "p80": median * 1.02}
    return {**case, "provider": provider, **timed, "fraction_of_floor": 0.5, **extra}


def result(*rows):
    return {"machine": MACHINE, "tests": {}, "rows": list(rows), "ceilings_before": {"copy_bytes_per_s": 3e12}}


def test_faster_and_slower_are_both_said():
    table = report.op_table([row("triton", 10e-6), row("eager", 30e-6), row("torch.compile", 20e-6)])
    assert "10 us (triton) | 50% | 20 us (torch.compile) | 2.00x |" in table
    table = report.op_table([row("triton", 40e-6), row("eager", 30e-6)])
    assert "0.75x (slower)" in table


def test_a_refused_backend_is_named_with_its_reason():
    table = report.op_table([row("triton", reason="refused: 1 of its tests fail"), row("eager", 30e-6)])
    assert "triton: refused: 1 of its tests fail" in table


def test_compare_tells_a_change_from_noise():
    old = result(row("triton", 10e-6), row("eager", 30e-6))
    new = copy.deepcopy(old)
    new["rows"][0] |= {"median": 8e-6, "p20": 7.9e-6, "p80": 8.1e-6}
    new["rows"][1] |= {"median": 30.3e-6, "p20": 29.5e-6, "p80": 31e-6}
    lines = report.compare(old, new).splitlines()
    assert "0.800" in lines[2] and lines[2].endswith("| faster |")
    assert lines[3].endswith("| same |")


def test_readme_section_is_replaced_and_the_rest_kept(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.OPEN}\nold\n{report.CLOSE}\nafter\n")
    report.write_readme(readme, "new")
    assert readme.read_text() == f"before\n{report.OPEN}\nnew\n{report.CLOSE}\nafter\n"
    readme.write_text("no marks")
    with pytest.raises(ValueError, match="expected the marks"):
        report.write_readme(readme, "new")
    assert readme.read_text() == "no marks"


def test_a_file_that_is_no_result_is_refused(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match="not a benchmark result"):
        rows.load(tmp_path / "x.json")


def test_every_figure_has_both_variants(tmp_path):
    plots = pytest.importorskip("benchmarks.plots", reason="matplotlib is an extra (bench)")
    rows = [
        row("triton", 10e-6, floor_flops=1e6, floor_bytes=1e3),
        row("eager", 30e-6, floor_flops=1e6, floor_bytes=1e3),
    ]
    job = {"kind": "job", "job": "denoise step", "shape": "denoise step B1", "provider": "ours", "dtype": "float16"}
    rows.append({**job, "layout": "channels_last", "median": 5e-3, "p20": 5e-3, "p80": 6e-3})
    whole = result(*rows)
    whole["ceilings_before"]["matmul_flops_per_s_float16"] = 7e14
    written = {path.name for path in plots.draw(whole, tmp_path)}
    assert written == {f"{f}-{v}.png" for f in ("speedup", "roofline", "jobs") for v in ("light", "dark")}
