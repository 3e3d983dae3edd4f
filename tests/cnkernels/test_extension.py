"""How the extension is built and found: no torch in the build, architectures, the first error, a reason when absent."""

import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import cnkernels
from cnkernels import dispatch, extension
from tests.cnkernels import host_build

ROOT = host_build.ROOT


# For the folder of PYTHONPATH: /usr/local/cuda is looked into whatever the environment says.
WITHOUT_NVCC = """
import shutil
which = shutil.which
shutil.which = lambda name, *rest, **options: None if name == "nvcc" else which(name, *rest, **options)
"""


@pytest.fixture
def without_nvcc(tmp_path) -> str:
    """A folder for PYTHONPATH, with which no process finds nvcc."""
    folder = tmp_path / "without_nvcc"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(WITHOUT_NVCC)
    return str(folder)


def setup_py(without_nvcc, *arguments: str) -> subprocess.CompletedProcess:
    """Runs setup.py where neither torch nor nvcc is to be had, nor what Windows has not."""
    code = (
        f"import runpy, sys; sys.modules['torch'] = sys.modules['fcntl'] = None; "
        f"sys.argv = {['setup.py', *arguments]!r}; "
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    environment = {"PATH": "/nowhere", "HOME": without_nvcc, "PYTHONPATH": without_nvcc}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_setup_imports_no_torch_and_needs_no_nvcc(without_nvcc):
    done = setup_py(without_nvcc, "--name")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("cnkernels")


def test_in_place_build_without_nvcc_says_so(without_nvcc):
    done = setup_py(without_nvcc, "build_ext", "--inplace")
    assert done.returncode != 0
    assert "nvcc was not found" in done.stderr


def test_pip_installs_pure_python_without_nvcc(tmp_path, without_nvcc):
    """And the report says so once. A build with nvcc takes minutes: tests/cnkernels/installs.py."""
    source, target = tmp_path / "source", tmp_path / "installed"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("cnkernels", "controlnet", "csrc"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    alone = {"PATH": "/nowhere", "HOME": str(tmp_path), "PYTHONPATH": f"{target}{os.pathsep}{without_nvcc}"}
    pip = ["pip", "install", "-q", "--no-index", "--no-build-isolation", "--no-deps", "--target", target, source]
    for command in (pip, ["cnkernels.env"]):
        done = subprocess.run([sys.executable, "-m", *command], cwd=tmp_path, env=alone, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    (line,) = re.findall("^extension .*", done.stdout, re.MULTILINE)
    assert "the CUDA extension is not built" in line
    assert (target / "cnkernels" / "env.py").exists() and not [*target.rglob("*.so")]


def test_a_package_without_the_extension_gives_the_reason(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(extension.importlib, "import_module", missing)
    extension._load.cache_clear()
    try:
        assert "not built" in extension.why_absent()
        assert "not built" in extension.status()
    finally:
        extension._load.cache_clear()


@pytest.fixture
def unusable(monkeypatch):
    """An extension without code for the GPU, as its driver says; the devices that were asked for."""
    asked = []

    def why_unusable(place):
        asked.append(place.device)
        return "probe: no kernel image is available for execution on the device"

    module = SimpleNamespace(why_unusable=why_unusable, Place=SimpleNamespace, architectures="90a", __file__="_C.so")
    monkeypatch.setattr(extension, "_load", lambda: (module, ""))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 6))
    extension._why_unusable.cache_clear()
    yield asked
    extension._why_unusable.cache_clear()


def test_code_that_does_not_run_here_is_a_reason_and_no_exception(unusable, monkeypatch):
    """`auto` goes on without it, the report says why, and the driver is asked once."""
    gpu = torch.device("cuda", 0)
    reason = dispatch.why_not("attention", "cuda", gpu, torch.float16, 40)
    assert reason == (
        "the CUDA extension, built for 90a, does not run on GPU 0, of compute capability 8.6 (probe: no kernel image "
        "is available for execution on the device); CNKERNELS_ARCHS=86 when it is built makes it"
    )
    assert reason in extension.status()
    with cnkernels.backend("auto"):
        assert dispatch.select("attention", gpu, torch.float16, 40) != "cuda"
    with cnkernels.backend("cuda"), pytest.raises(ValueError, match="does not run on GPU 0"):
        dispatch.select("attention", gpu, torch.float16, 40)
    assert extension.why_absent() == reason
    assert unusable == [0]


def test_architectures_come_from_the_request():
    build = host_build.csrc_build()
    assert build.architectures("90a;80") == ["80", "90a"]
    assert build.architectures("80,86") == ["80", "86"]
    flags = build.architecture_flags(["80", "90a"])
    assert flags == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90,code=compute_90",
    ]


@pytest.mark.parametrize("wrong", ["sm_80", "75", "9", "80;x"])
def test_a_wrong_architecture_is_named(wrong):
    with pytest.raises(ValueError, match="CNKERNELS_ARCHS"):
        host_build.csrc_build().architectures(wrong)


def fake_nvcc(root, script: str = "exit 0") -> str:
    path = root / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("where", ["CUDA_HOME", "CUDA_PATH", "PATH"])
def test_nvcc_is_found_wherever_it_is(monkeypatch, tmp_path, where):
    """And a CUDA_HOME without it hides no other, but is named."""
    build, path = host_build.csrc_build(), fake_nvcc(tmp_path / "a toolkit")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "gone"))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv(where, str(tmp_path / "a toolkit" / ("bin" if where == "PATH" else "")))
    assert os.path.samefile(build.nvcc(), path)
    if where == "CUDA_HOME":
        assert build.advice() is None
    else:
        assert f"CUDA_HOME={tmp_path / 'gone'} has no bin/nvcc; {build.nvcc()} is used" in build.advice()


def test_an_install_without_kernels_says_so(monkeypatch, tmp_path):
    build = host_build.csrc_build()
    monkeypatch.setattr(build, "nvcc", lambda: None)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    assert build.advice().splitlines() == [
        f"CUDA_HOME={tmp_path} has no bin/nvcc; no other was found",
        "without nvcc cnkernels is installed without its CUDA kernels: Triton's and PyTorch's serve",
    ]


def test_a_failed_build_says_why_and_how_to_install_without_it(monkeypatch, tmp_path):
    script = "echo 'nvcc fatal   : Unsupported gpu architecture compute_80' >&2; exit 1"
    fake_nvcc(tmp_path / "toolkit", script)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    monkeypatch.setenv("MAX_JOBS", "1")
    with pytest.raises(RuntimeError) as failure:
        host_build.csrc_build().build_extension(tmp_path / "_C.so", tmp_path / "work", ["80"])
    last = str(failure.value).rsplit("the first error is\n", 1)[1]
    assert last.startswith("nvcc fatal   : Unsupported gpu architecture compute_80")
    assert "CNKERNELS_BUILD=0" in last and "CNKERNELS_ARCHS" in last


@pytest.mark.skipif(host_build.COMPILER is None, reason="needs a C++ compiler")
def test_a_build_in_a_folder_with_a_space(tmp_path):
    """Sources, headers and module: every path of a command."""
    build = host_build.csrc_build()
    source = tmp_path / "my kernels: $new" / "right.cu"
    source.parent.mkdir()
    (source.parent / "answer.h").write_text("constexpr int kAnswer = 42;\n")
    source.write_text('#include "answer.h"\nextern "C" int answer() { return kAnswer; }\n')
    module = build.build_host(tmp_path / "built here", [source], "right")
    assert module.exists() and " " in str(module)


def test_the_first_compiler_error_is_printed_last():
    output = [
        "[1/2] nvcc a.cu",
        "a.cu(3): warning: unused",
        "a.cu(7): error: expected a ;",
        "  here",
        "b.cu(1): error: x",
    ]
    assert host_build.csrc_build().first_error("\n".join(output)).startswith("a.cu(7): error: expected a ;\n  here")


@pytest.mark.skipif(host_build.COMPILER is None, reason="needs a C++ compiler")
def test_a_build_that_fails_ends_with_the_first_error(tmp_path):
    source = tmp_path / "wrong.cu"
    source.write_text("int f() { return missing_name; }\n")
    with pytest.raises(RuntimeError) as failure:
        host_build.csrc_build().build_host(tmp_path, [source], "wrong")
    last = str(failure.value).rsplit("the first error is\n", 1)[1]
    assert "missing_name" in last.splitlines()[0]


def test_no_pytorch_header_in_csrc():
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in (".cu", ".cuh", ".h", ".cpp"):
            text = path.read_text()
            assert "torch/" not in text and "ATen/" not in text and "c10/" not in text, path


def test_inline_ptx_lives_only_in_the_device_wrappers():
    for path in (ROOT / "csrc").rglob("*.*"):
        if path.suffix in (".cu", ".cuh", ".h", ".cpp") and path.parent.name != "device":
            assert "asm" not in path.read_text().replace("asm_", ""), f"inline assembly in {path}"


def test_importing_cnkernels_compiles_nothing():
    code = "import cnkernels.extension as e; assert e.why_host_absent(); print(e.status())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PATH": "/nowhere"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_without_a_compiler_all_but_the_cuda_tests_run():
    """The build for the CPU is waited for by those tests alone: collecting the others needs no compiler."""
    tests = ["test_cuda_zero_conv_add.py::test_more_layers_than_one_launch_holds", "test_geglu.py::test_large_gates"]
    command = [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider"]
    command += [str(ROOT / "tests" / "cnkernels" / test) for test in tests]
    alone = {**os.environ, "PATH": "/nowhere", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert re.search(r"SKIPPED \[1\] .*: needs a C\+\+ compiler", done.stdout)
    assert done.stdout.startswith("s...")  # geglu has three backends


@pytest.mark.skipif(torch.cuda.is_available(), reason="launches on null pointers, which a GPU would execute")
def test_the_built_extension_needs_neither_torch_nor_a_driver():
    """One build serves every torch: it loads where torch is blocked, and a refused launch names the op."""
    module = pytest.importorskip("cnkernels._C")
    code = (
        "import importlib.util, sys; sys.modules['torch'] = None; "
        f"spec = importlib.util.spec_from_file_location('_C', {module.__file__!r}); "
        "library = importlib.util.module_from_spec(spec); spec.loader.exec_module(library); "
        "call = library.Attention(batch=1, heads=1, q_length=1, k_length=1, head_dim=40); "
        "library.attention_fwd(call, 0, *[0] * 6, 1.0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert re.search(r"RuntimeError: attention_fwd: .*(driver|device)", done.stderr), done.stderr
