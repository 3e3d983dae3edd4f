"""A Triton kernel with its arguments: made by a launcher to be run, or to be compiled ahead of time."""

from typing import NamedTuple

import torch
from torch import Tensor

from cnkernels.aot_case import AotCase, case_of


class Launch(NamedTuple):
    kernel: object
    grid: tuple[int, ...]
    arguments: tuple  # in the kernel's order, without those in `config`; the first is a tensor
    config: dict  # the kernel's constants, num_warps and num_stages

    def __call__(self) -> None:
        with torch.cuda.device_of(self.arguments[0]):  # Triton launches on the current device, whatever the tensors'
            self.kernel[self.grid](*self.arguments, **self.config)

    def case(self, name: str, uses_matrix_units: bool = False) -> AotCase:
        """This launch for `cnkernels.aot`; tensors may be on the meta device."""
        values = [a.dtype if isinstance(a, Tensor) else a for a in self.arguments]
        arguments = dict(zip(self.kernel.arg_names, values, strict=False))
        constants = dict(self.config)
        options = {key: constants.pop(key) for key in ("num_warps", "num_stages")}
        return case_of(name, self.kernel, arguments | constants, **options, uses_matrix_units=uses_matrix_units)
