"""Builds cnkernels._C where nvcc is found; elsewhere the package is pure Python. The rest is in pyproject.toml."""

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def _csrc_build():
    spec = importlib.util.spec_from_file_location("csrc_build", ROOT / "csrc" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildCuda(build_ext):
    """Hands the whole of csrc/ to nvcc through ninja."""

    def build_extension(self, extension: Extension) -> None:
        csrc = _csrc_build()
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        archs = csrc.architectures(os.environ.get("CNKERNELS_ARCHS"))
        csrc.build_extension(target, Path(self.build_temp).resolve() / "cuda", archs)


def _extensions() -> list[Extension]:
    if os.environ.get("CNKERNELS_BUILD") == "0":
        return []
    in_place = "build_ext" in sys.argv
    if os.name == "nt":  # csrc/build.py drives nvcc with a compiler of Unix
        if in_place:
            sys.exit("build_ext: the CUDA kernels are not built on Windows; use WSL")
        return []
    csrc = _csrc_build()
    advice = csrc.advice()
    if advice and not {"egg_info", "dist_info", "--name", "--version", "sdist"} & set(sys.argv):
        print(f"cnkernels: {advice}", file=sys.stderr)
    if csrc.nvcc():
        return [Extension("cnkernels._C", sources=[])]
    if in_place:
        sys.exit("build_ext: nvcc was not found in CUDA_HOME, in CUDA_PATH, on PATH, or in /usr/local/cuda")
    return []


setup(ext_modules=_extensions(), cmdclass={"build_ext": BuildCuda})
