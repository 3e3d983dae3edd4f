import json

import torch

from benchmarks import tune
from cnkernels import tuning


def row(backend, direction, median, size=1000, **extra):
    case = {"kind": "op", "op": "geglu", "shape": f"B{size}", "dtype": "float16", "layout": "rows", "head_dim": None}
    return {**case, "direction": direction, "provider": backend, "size": size, "median": median, **extra}


def test_the_backend_with_the_least_time_for_both_directions_is_chosen():
    rows = [row("triton", "forward", 1.0), row("triton", "backward", 5.0)]
    rows += [row("cuda", "forward", 2.0), row("cuda", "backward", 3.0), row("eager", "forward", 0.1)]
    assert tune.choices(rows) == {"geglu": [{"dtype": "float16", "head_dim": None, "size": 1000, "backend": "cuda"}]}


def test_what_one_backend_lacks_does_not_count():
    rows = [row("triton", "forward", 1.0), row("triton", "backward", 5.0), row("cuda", "forward", 2.0)]
    assert tune.choices(rows)["geglu"][0]["backend"] == "triton"
    assert tune.choices(rows[:2]) == {}


def test_the_nearest_size_of_the_same_dtype_and_head_dimension(tmp_path):
    entries = [
        {"dtype": "float16", "head_dim": 40, "size": 1000, "backend": "cuda"},
        {"dtype": "float16", "head_dim": 40, "size": 100_000, "backend": "triton"},
        {"dtype": "bfloat16", "head_dim": 40, "size": 1000, "backend": "reference"},
    ]
    (tmp_path / tuning.file_name("GPU X")).write_text(json.dumps({"machine": {}, "choices": {"attention": entries}}))
    found = tuning.table("GPU X", tmp_path)["attention"]
    assert tuning.nearest(found, torch.float16, 2000, 40) == "cuda"
    assert tuning.nearest(found, torch.float16, 50_000, 40) == "triton"
    assert tuning.nearest(found, torch.float16, 2000, 80) is None
    assert tuning.nearest(found, torch.float32, 2000, 40) is None
    assert tuning.table("GPU Y", tmp_path) == {}
