"""A Triton kernel with everything but its tensors, made by a rule: to be launched at little cost, or compiled ahead."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter

import torch
from torch import Tensor

from cnkernels.aot_case import AotCase, case_of

_KNOWN_LAUNCHERS = ("3.6", "3.7")  # versions of Triton whose CompiledKernel.run takes what `_without_hooks` gives


@dataclass(frozen=True)
class Launch:
    """One kernel with its grid, its sizes and constants; its operands come with each call.

    The operands are the kernel's first parameters, those that `sizes` leaves out: tensors, None and floats.
    """

    kernel: object
    grid: tuple[int, ...]
    sizes: Mapping[str, object]  # the kernel's other parameters, by name
    num_warps: int
    num_stages: int = 3
    maxnreg: int | None = None  # registers a thread may have

    @cached_property
    def operands(self) -> list[str]:
        """Names of the parameters that a call gives."""
        names = [name for name in self.kernel.arg_names if name not in self.sizes]
        if names != self.kernel.arg_names[: len(names)]:
            raise TypeError(f"{self.kernel.__name__}: its operands, {names}, must be its first parameters")
        return names

    def __call__(self, *operands: Tensor | float | None) -> object:
        """Launches on the current device, and returns what Triton compiled: None in its interpreter."""
        arguments = dict(zip(self.operands, operands, strict=True)) | self.sizes
        cap = {} if self.maxnreg is None else {"maxnreg": self.maxnreg}
        return self.kernel[self.grid](**arguments, num_warps=self.num_warps, num_stages=self.num_stages, **cap)

    def bind(self, device: torch.device, names: Sequence[str]) -> "BoundLaunch":
        """Called with a tuple of the operands by these names, of which it takes its own."""
        return BoundLaunch(self, device, names)

    def case(self, name: str, operands: Mapping[str, object], uses_matrix_units: bool = False) -> AotCase:
        """This launch for `cnkernels.aot`. A tensor, or its torch.dtype, stands for a tensor."""
        given = {key: operands[key] for key in self.operands}
        types = {key: value.dtype if isinstance(value, Tensor) else value for key, value in given.items()}
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": self.maxnreg}
        return case_of(name, self.kernel, types | self.sizes, **options, uses_matrix_units=uses_matrix_units)


class BoundLaunch:
    """A launch whose kernel is compiled at the first call and looked up at none of the others.

    Triton binds arguments anew at every call: of each it finds out whether it is aligned, one, or absent, which costs
    more than the launch. Here the caller promises that all this is the same at every call (`cnkernels.plans`).
    """

    __slots__ = ("_device", "_launch", "_pick", "_rest", "_run")

    def __init__(self, launch: Launch, device: torch.device, names: Sequence[str]):
        self._launch, self._run = launch, None
        self._device = device.index if device.type == "cuda" else None
        self._pick = itemgetter(*(names.index(name) for name in launch.operands))  # each kernel has several
        self._rest = tuple(launch.sizes[name] for name in launch.kernel.arg_names[len(launch.operands) :])

    def __call__(self, operands: tuple[Tensor | float | None, ...]) -> None:
        device = self._device
        if device is None or device == torch.cuda.current_device():
            self._on_current_device(operands)
        else:  # Triton launches on the current device, whatever the tensors'
            with torch.cuda.device(device):
                self._on_current_device(operands)

    def _on_current_device(self, operands: tuple) -> None:
        if self._run is None:
            self._run = _launcher_of(self._launch(*self._pick(operands)), self._launch.grid)
        else:
            self._run(*self._pick(operands), *self._rest)


def _launcher_of(compiled: object, grid: tuple[int, ...]) -> Callable | None:
    """What launches a compiled kernel given all its arguments, constants too; None where Triton has no such thing."""
    if not hasattr(type(compiled), "__getitem__"):  # None in the interpreter
        return None
    grid = (*grid, 1, 1)[:3]
    launcher = compiled[grid]
    if not any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(launcher).parameters.values()):
        return None
    return _without_hooks(compiled, grid, launcher) if _triton_version() in _KNOWN_LAUNCHERS else launcher


def _without_hooks(compiled: object, grid: tuple[int, int, int], launcher: Callable) -> Callable:
    """`launcher` as Triton has it, but for what it prepares at every call for hooks that nobody has set."""
    from triton import knobs
    from triton.runtime.driver import driver

    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    device, stream_of, (x, y, z) = driver.active.get_current_device(), driver.active.get_current_stream, grid

    def launch(*arguments: object) -> None:
        if (
            runtime.launch_enter_hook is enter
            and runtime.launch_exit_hook is leave
            and not (enter.calls or leave.calls)
        ):
            run(x, y, z, stream_of(device), function, metadata, None, None, None, *arguments)
        else:
            launcher(*arguments)

    return launch


def _triton_version() -> str:
    from triton import __version__

    return ".".join(__version__.split(".")[:2])
