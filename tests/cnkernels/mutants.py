"""Breaks a Triton kernel on purpose, in place: modules and plans that hold it launch the broken one."""

import importlib
import inspect
import textwrap
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import cnkernels


class StaleMutation(Exception):
    """The kernel no longer has the text that a mutation replaces, or has it more than once."""


def kernel_named(op: str, name: str) -> object:
    """The kernel or device function `name` in one of the op's Triton modules, as Triton's interpreter holds it."""
    folder = Path(cnkernels.__file__).parent / op
    modules = [importlib.import_module(f"cnkernels.{op}.{path.stem}") for path in sorted(folder.glob("triton_*.py"))]
    found = [vars(module)[name] for module in modules if name in vars(module)]
    if not found or not hasattr(found[0], "fn"):
        raise StaleMutation(f"{op} has no Triton kernel {name}")
    if any(other is not found[0] for other in found):
        raise StaleMutation(f"{op} has more than one Triton kernel {name}")
    return found[0]


@contextmanager
def mutated(op: str, name: str, old: str, new: str, folder: Path) -> Iterator[None]:
    """Inside the block, the kernel `name` of `op` has `new` where it had `old`.

    Args:
        folder: gets the broken kernel's source, which the interpreter reads.

    Raises:
        StaleMutation: there is no such kernel, or `old` does not stand in it exactly once.
    """
    kernel = kernel_named(op, name)
    source = textwrap.dedent(inspect.getsource(kernel.fn))
    if source.count(old) != 1:
        raise StaleMutation(f"{name} of {op} has {old!r} {source.count(old)} times, not once: update this mutation")
    path = folder / f"{name}.py"
    path.write_text(source.replace(old, new))
    namespace: dict = {}
    exec(compile(path.read_text(), str(path), "exec"), kernel.fn.__globals__, namespace)
    own = dict(vars(kernel))
    vars(kernel).update(vars(namespace[name]))
    try:
        yield
    finally:
        vars(kernel).update(own)


def is_caught(check: Callable[[], None]) -> bool:
    """Whether `check` fails by an assertion of the tests, not by an error of the kernel, which would prove nothing."""
    try:
        check()
    except AssertionError as error:
        package = Path(cnkernels.__file__).parent
        if any(Path(frame.filename).is_relative_to(package) for frame in traceback.extract_tb(error.__traceback__)):
            raise
        return True
    return False
