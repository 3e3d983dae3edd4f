"""How the extension is built and found: no torch in the build, architectures, the first error, a reason when absent."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from cnkernels import extension
from tests.cnkernels import host_build

ROOT = host_build.ROOT


def setup_py(tmp_path, *arguments: str) -> subprocess.CompletedProcess:
    """Runs setup.py where neither torch nor nvcc is to be had."""
    code = (
        f"import runpy, sys; sys.modules['torch'] = None; sys.argv = {['setup.py', *arguments]!r}; "
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    environment = {"PATH": "/nowhere", "HOME": str(tmp_path)}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_setup_imports_no_torch_and_needs_no_nvcc(tmp_path):
    done = setup_py(tmp_path, "--name")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("cnkernels")


def test_in_place_build_without_nvcc_says_so(tmp_path):
    done = setup_py(tmp_path, "build_ext", "--inplace")
    assert done.returncode != 0
    assert "nvcc was not found" in done.stderr


def test_pip_installs_pure_python_without_nvcc(tmp_path):
    """And the report says so once. A build with nvcc takes minutes: tests/cnkernels/installs.py."""
    source, target = tmp_path / "source", tmp_path / "installed"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("cnkernels", "controlnet", "csrc"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    alone = {"PATH": "/nowhere", "HOME": str(tmp_path), "PYTHONPATH": str(target)}
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="launches on null pointers, which a GPU would execute")
def test_the_built_extension_needs_neither_torch_nor_a_driver():
    """One build serves every torch: it loads where torch is blocked, and a refused launch names the op."""
    module = pytest.importorskip("cnkernels._C")
    code = (
        "import importlib.util, sys; sys.modules['torch'] = None; "
        f"spec = importlib.util.spec_from_file_location('_C', {module.__file__!r}); "
        "library = importlib.util.module_from_spec(spec); spec.loader.exec_module(library); "
        "call = library.Attention(batch=1, heads=1, q_length=1, k_length=1, head_dim=40); "
        "library.attention_fwd(library.Place(), call)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert re.search(r"RuntimeError: attention_fwd: .*(driver|device)", done.stderr), done.stderr
