"""Launch configurations: a rule computes one from the sizes of a call, and a measured one takes its place.

A rule is a function that returns a frozen dataclass of tile sizes and compiler options; `rule` gives it a name and the
candidates that `cnkernels.tune` measures beside its own answer. What is measured, a *configuration*, maps names of
rules to the fields of what they return, and is kept in the user's file (`cnkernels.cache`). It is read while a plan is
made (`of_plan`), and only for calls of the very size that was measured.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cnkernels import findings

Configuration = Mapping[str, Mapping[str, Any]]  # name of a rule -> fields of its result
Candidates = Callable[..., Sequence[Any]]


@dataclass
class _State:
    """Process-wide, as the choice of a backend is: a backward pass makes its plans on autograd's threads."""

    trial: Configuration | None = None
    asked: dict[str, list[dict[str, Any]]] | None = None


state = _State()
_planning: ContextVar[Configuration] = ContextVar("planning", default={})  # noqa: B039  (never changed in place)


def rule(name: str, candidates: Candidates) -> Callable[[Callable], Callable]:
    """Makes a rule configurable under this name.

    Args:
        name: unique, such as "attention forward".
        candidates: called with what the rule returned, then the rule's arguments; returns other objects of that kind.
    """

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def configured(*arguments: Any, **keywords: Any) -> Any:
            own = function(*arguments, **keywords)
            if state.asked is not None:
                others = dict.fromkeys((own, *candidates(own, *arguments, **keywords)))
                state.asked.setdefault(name, [dataclasses.asdict(other) for other in others])
            return _replaced(own, _planning.get().get(name))

        return configured

    return decorate


def _replaced(own: Any, fields: Mapping[str, Any] | None) -> Any:
    """The rule's answer with those fields; as it is where another version of the rule had other fields."""
    known = {f.name for f in dataclasses.fields(own)}
    return own if fields is None or set(fields) != known else type(own)(**fields)


@contextmanager
def trying(configuration: Configuration | None) -> Iterator[None]:
    """Inside the block this configuration replaces measured ones; what it leaves out goes by rule. None is no trial.

    Plans of a trial have keys of their own, by `dispatch.current`.
    """
    before, state.trial = state.trial, configuration
    try:
        yield
    finally:
        state.trial = before


@contextmanager
def asked() -> Iterator[dict[str, list[dict[str, Any]]]]:
    """Collects, of each rule that a plan made inside the block asks, the fields of its answer and of the candidates."""
    before, state.asked = state.asked, {}
    try:
        yield state.asked
    finally:
        state.asked = before


@contextmanager
def _following(configuration: Configuration) -> Iterator[None]:
    token = _planning.set(configuration)
    try:
        yield
    finally:
        _planning.reset(token)


def of_plan(module: str, function: str, arguments: tuple) -> AbstractContextManager:
    """A context in which rules answer as was measured for a call: entered while its plan is made.

    Args:
        module: of the kernels, such as "cnkernels.attention.triton_kernels".
        function: such as "attention_fwd", whose first argument is the op's first; that of "attention_bwd" comes second.
        arguments: of the function.
    """
    if state.trial is not None:
        return _following(state.trial)
    op, _, suffix = function.rpartition("_")
    backend = module.rpartition(".")[2].removesuffix("_kernels")
    direction = {"fwd": "forward", "bwd": "backward"}[suffix]
    x, *others = arguments[suffix == "bwd" :]
    if not isinstance(x, Tensor) or x.is_meta:
        return nullcontext()
    size = findings.size_of(op, x, *others[:1])
    head_dim = x.shape[-1] if op == "attention" else None
    entry = findings.measured(op, x.device, x.dtype, size, head_dim, direction)
    if entry is None or entry["size"] != size:
        return nullcontext()
    return _following(entry.get("configurations", {}).get(backend, {}))
