"""Launches of Triton kernels with everything but their tensors: to run at little cost, or to compile ahead of time."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import itemgetter

import torch
from torch import Tensor

from cnkernels.aot_case import AotCase, case_of
from cnkernels.configurations import rule

_KNOWN_VERSIONS = ("3.6", "3.7")  # of Triton, whose CompiledKernel.run takes what `_without_hooks` passes

Bound = Callable[[tuple[Tensor | float | None, ...]], None]  # runs kernels, given their operands


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

    @property
    def constants(self) -> tuple[object, ...]:
        """Values of the parameters that `sizes` gives, in the kernel's order."""
        return tuple(self.sizes[name] for name in self.kernel.arg_names[len(self.operands) :])

    def __call__(self, *operands: Tensor | float | None) -> object:
        """Launches on the current device, and returns what Triton compiled: None in its interpreter."""
        arguments = dict(zip(self.operands, operands, strict=True)) | self.sizes
        cap = {} if self.maxnreg is None else {"maxnreg": self.maxnreg}
        return self.kernel[self.grid](**arguments, num_warps=self.num_warps, num_stages=self.num_stages, **cap)

    def bind(self, device: torch.device, names: Sequence[str]) -> "Bound":
        """`bind` of this launch alone."""
        return bind([self], device, names)

    def case(self, name: str, operands: Mapping[str, object], uses_matrix_units: bool = False) -> AotCase:
        """This launch for `cnkernels.aot`. A tensor, or its torch.dtype, stands for a tensor."""
        given = {key: operands[key] for key in self.operands}
        types = {key: value.dtype if isinstance(value, Tensor) else value for key, value in given.items()}
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": self.maxnreg}
        return case_of(name, self.kernel, types | self.sizes, **options, uses_matrix_units=uses_matrix_units)


@dataclass(frozen=True)
class Warps:
    """Of a kernel of which nothing else can be configured."""

    num_warps: int


def with_measured_warps(launches: Sequence[Launch]) -> list[Launch]:
    """The launches with as many warps as were measured to be fastest for each kernel (`cnkernels.configurations`)."""

    def chosen(launch: Launch) -> int:
        others = [Warps(warps) for warps in (launch.num_warps // 2, 2 * launch.num_warps) if 2 <= warps <= 16]
        return rule(launch.kernel.__name__, lambda _: others)(lambda: Warps(launch.num_warps))().num_warps

    return [replace(launch, num_warps=chosen(launch)) for launch in launches]


def bind(launches: Sequence[Launch], device: torch.device, names: Sequence[str]) -> Bound:
    """A function that runs the launches in order, given the operands of all of them.

    Triton binds arguments anew at every call: it finds out whether each is aligned, one, or absent, which costs more
    than the launch. Here the kernels are compiled at the first call and looked up at none of the others. In return the
    caller must pass operands that are alike in all this at every call, as `cnkernels.plans` ensures.

    Args:
        launches: for the same device, and run on its current stream.
        names: of the operands that a call gives, as a tuple in this order; each kernel takes those that it names.
    """
    picks = [itemgetter(*(names.index(name) for name in launch.operands)) for launch in launches]  # two or more
    index = device.index if device.type == "cuda" else None
    run: Bound | None = None  # once all are compiled

    def on_current_device(operands: tuple) -> None:
        nonlocal run
        if run is not None:
            run(operands)
            return
        pairs = list(zip(launches, picks, strict=True))
        compiled = [launch(*pick(operands)) for launch, pick in pairs]
        run = _runner(list(launches), compiled, picks)

    if index is None:
        return on_current_device
    current_device = torch.cuda.current_device

    def on_device(operands: tuple) -> None:
        if current_device() == index:
            on_current_device(operands)
        else:  # Triton launches on the current device, whatever the tensors'
            with torch.cuda.device(index):
                on_current_device(operands)

    return on_device


def _runner(launches: list[Launch], compiled: list[object], picks: list[Callable]) -> Bound:
    """A function that runs compiled kernels.

    The interpreter has nothing compiled, and a Triton that we do not know may take other arguments: there `Launch`
    binds them at every call.
    """
    grids = [(*launch.grid, 1, 1)[:3] for launch in launches]
    launchers = [_launcher_of(kernel, grid) for kernel, grid in zip(compiled, grids, strict=True)]
    if None in launchers:
        pairs = list(zip(launches, picks, strict=True))

        def bind_anew(operands: tuple) -> None:
            for launch, pick in pairs:
                launch(*pick(operands))

        return bind_anew
    constants = [launch.constants for launch in launches]
    triples = list(zip(launchers, picks, constants, strict=True))

    def through_triton(operands: tuple) -> None:
        for launcher, pick, rest in triples:
            launcher(*pick(operands), *rest)

    known = _triton_version() in _KNOWN_VERSIONS
    return _without_hooks(compiled, grids, picks, constants, through_triton) if known else through_triton


def _launcher_of(compiled: object, grid: tuple[int, int, int]) -> Callable | None:
    """Triton's function that launches a compiled kernel given all its arguments; None where there is no such thing."""
    if not hasattr(type(compiled), "__getitem__"):  # None in the interpreter
        return None
    launcher = compiled[grid]
    takes_any = any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(launcher).parameters.values())
    return launcher if takes_any else None


def _without_hooks(
    compiled: list[object], grids: list[tuple], picks: list[Callable], constants: list[tuple], through_triton: Bound
) -> Bound:
    """`through_triton` without what Triton prepares at every launch for hooks that nobody has set."""
    from triton import knobs
    from triton.runtime.driver import driver

    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    device, stream_of = driver.active.get_current_device(), driver.active.get_current_stream
    kernels = [
        (kernel.run, *grid, kernel.function, kernel.packed_metadata, pick, rest)
        for kernel, grid, pick, rest in zip(compiled, grids, picks, constants, strict=True)
    ]

    def launch_all(operands: tuple) -> None:
        if (
            enter.calls
            or leave.calls
            or runtime.launch_enter_hook is not enter
            or runtime.launch_exit_hook is not leave
        ):
            through_triton(operands)
            return
        stream = stream_of(device)
        for run, x, y, z, function, metadata, pick, rest in kernels:
            run(x, y, z, stream, function, metadata, None, None, None, *pick(operands), *rest)

    return launch_all


def _triton_version() -> str:
    from triton import __version__

    return ".".join(__version__.split(".")[:2])
