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
    if _csrc_build().nvcc():
        return [Extension("cnkernels._C", sources=[])]
    if "build_ext" in sys.argv:
        sys.exit("build_ext: nvcc was not found on PATH or in CUDA_HOME")
    return []


setup(ext_modules=_extensions(), cmdclass={"build_ext": BuildCuda})
