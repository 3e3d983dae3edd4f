"""A kernel as one call launches it: what an op tells `cnkernels.aot` to compile."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class AotCase:
    """One kernel as one call launches it.

    `signature` maps each argument that is not a constant to "*fp16" (a pointer), "i32", "i64" or "fp32". ":16" after it
    says that it is a multiple of 16, as Triton finds out at a launch; a pointer always is.
    """

    name: str
    kernel: object
    signature: Mapping[str, str]
    constexprs: Mapping[str, object]
    num_warps: int
    num_stages: int
    uses_matrix_units: bool
    maxnreg: int | None = None
    archs: tuple[int, ...] | None = None  # those that it is launched so on; None is every one

    @cached_property
    def key(self):
        """Cases with one key are one binary."""
        constants = tuple(sorted((name, repr(value)) for name, value in self.constexprs.items()))
        options = self.num_warps, self.num_stages, self.maxnreg
        return self.kernel.__name__, tuple(self.signature.items()), constants, options, self.archs


_POINTERS = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16"}


def case_of(name, kernel, arguments, *, num_warps, num_stages=3, uses_matrix_units=False, maxnreg=None) -> AotCase:
    """The case of a launch with these `arguments`: a torch.dtype stands for a tensor, None and numbers for themselves.

    Numbers are typed as a launch types them: unless the kernel does not specialise them, 1 is a constant and a multiple
    of 16 is marked.
    """
    signature, constants = {}, {}
    for parameter in kernel.params:
        value = arguments[parameter.name]
        specialised = type(value) is int and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialised and value == 1):
            constants[parameter.name] = value
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        elif isinstance(value, int):
            width = "i32" if value < 2**31 else "i64"
            signature[parameter.name] = width + (":16" if specialised and value % 16 == 0 else "")
        else:
            signature[parameter.name] = _POINTERS[str(value).removeprefix("torch.")]
    return AotCase(name, kernel, signature, constants, num_warps, num_stages, uses_matrix_units, maxnreg)
