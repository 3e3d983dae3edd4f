"""The choice of a backend: by device, capability, measurements, and on request."""

import functools
import re
import subprocess
import sys

import pytest
import torch

import cnkernels
from cnkernels import dispatch, tuning

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def ampere(monkeypatch):
    """Dispatch as on a machine with one GPU of compute capability 8.0, never measured, and the extension built."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU X")
    monkeypatch.setattr(dispatch.extension, "why_absent", lambda device: None)


@pytest.mark.parametrize("op", dispatch.OPS)
def test_a_cpu_gets_pytorch_s_kernels(op):
    with cnkernels.backend("auto"):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            assert dispatch.select(op, CPU, dtype, size=100) == "aten"
        assert dispatch.select(op, CPU, torch.float64) == "reference"


def test_another_device_gets_pytorch_s_kernels():
    with cnkernels.backend("auto"):
        assert dispatch.select("geglu", torch.device("mps"), torch.float16, size=100) == "aten"


def test_a_gpu_gets_the_first_backend_that_can(ampere):
    with cnkernels.backend("auto"):
        assert dispatch.select("attention", GPU, torch.float16, head_dim=40) == "triton"
        assert dispatch.select("attention", GPU, torch.float64, head_dim=40) == "reference"
        assert dispatch.select("attention", GPU, torch.float16, head_dim=512) == "aten"


def test_a_measured_table_is_followed_where_its_backend_can_serve(ampere, monkeypatch):
    entries = [
        {"dtype": "float16", "head_dim": d, "direction": "forward", "size": 1000, "backend": "cuda"} for d in (40, 48)
    ]
    monkeypatch.setattr(tuning, "table", lambda gpu: {"attention": entries})
    with cnkernels.backend("auto"):
        assert dispatch.select("attention", GPU, torch.float16, head_dim=40, size=900) == "cuda"
        assert dispatch.select("attention", GPU, torch.float16, head_dim=48, size=900) == "triton"  # cuda has no 48
        assert dispatch.select("attention", GPU, torch.bfloat16, head_dim=40, size=900) == "triton"


def test_the_exits_of_a_controlnet_go_to_the_backend_that_launches_them_at_once(ampere, monkeypatch):
    with cnkernels.backend("auto"):
        select = functools.partial(dispatch.select, "zero_conv_add", GPU, size=1000)
        assert select(torch.float16) == "triton"
        assert select(torch.float16, first="cuda") == "cuda"
        assert select(torch.float32, first="cuda") == "aten"
        monkeypatch.setattr(dispatch.extension, "why_absent", lambda device: "not built")
        assert select(torch.float16, first="cuda") == "triton"
    with cnkernels.backend("triton"):
        assert select(torch.float16, first="cuda") == "triton"


def test_an_old_gpu_gets_pytorch_s_kernels(ampere, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    with cnkernels.backend("auto"):
        assert dispatch.select("geglu", GPU, torch.float16) == "aten"


def test_a_forced_backend_that_cannot_serve_says_why():
    with cnkernels.backend("triton"), pytest.raises(ValueError, match="'triton' is forced, but .*float64"):
        cnkernels.geglu(torch.zeros(2, 4, dtype=torch.float64))
    with cnkernels.backend("cuda"), pytest.raises(ValueError, match="geglu has no cuda backend"):
        cnkernels.geglu(torch.zeros(2, 4))


def test_the_choice_is_given_back_after_an_error():
    before = dispatch.current()
    with pytest.raises(RuntimeError), cnkernels.backend("reference"):
        raise RuntimeError
    assert dispatch.current() == before


def test_an_unknown_backend_is_named():
    with pytest.raises(ValueError, match="`name` must be one of .*, got 'cutlass'"), cnkernels.backend("cutlass"):
        pass


def test_the_environment_report_names_every_op_and_why():
    done = subprocess.run([sys.executable, "-m", "cnkernels.env"], capture_output=True, text=True, check=True)
    for op in dispatch.OPS:
        assert op in done.stdout
        reasons = re.findall("^not .*", done.stdout, re.MULTILINE)
    assert len(reasons) == len(set(reasons)) > 0
    assert "not aten" not in done.stdout  # it serves every dtype that the report asks for, on any device
    assert "torch" in done.stdout and "extension" in done.stdout and "CNKERNELS_BACKEND=" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("op", dispatch.OPS)
def test_float32_products_go_to_pytorch(ampere, op):
    """Attention and zero_conv_add multiply float32 on FFMA, where PyTorch has matrix units and SGEMM."""
    with cnkernels.backend("auto"):
        chosen = dispatch.select(op, GPU, torch.float32, head_dim=40 if op == "attention" else None)
        assert (chosen == "aten") == (op in ("attention", "zero_conv_add"))
        assert dispatch.select(op, GPU, torch.float16, head_dim=40 if op == "attention" else None) != "aten"
