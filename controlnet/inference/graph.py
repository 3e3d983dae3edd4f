"""A model's inference step as CUDA graphs: captured in seconds, replayed without Python between the kernels."""

import operator
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

_MOST = 8  # graphs of one model, for sizes and kinds of arguments; the one longest unused goes first


class Recorder(Protocol):
    """What captures: `CudaRecorder`, or a test's."""

    def serves(self, device: torch.device) -> bool: ...

    def capture(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """What runs function's operations again in the same memory, and what function returned: it is written there."""


class CudaRecorder:
    """torch.cuda.CUDAGraph; all graphs of one recorder share a memory pool, and so are not to run at the same time."""

    def __init__(self) -> None:
        self._pool: Any = None

    def serves(self, device: torch.device) -> bool:
        return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()

    def capture(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            outputs = function()
        return graph.replay, outputs


class StepGraph:
    """`function` of tensors, as one CUDA graph for each kind of arguments: sizes, dtypes, which are given.

    A call copies the tensors whose values changed into the graph's memory, replays it, and returns copies of what it
    wrote. A Python number among `numbers` and `scales` is copied, too, so another value needs no other graph. What
    the function gives to `Static.keep` (the prompt's keys and values) is computed when its inputs change, outside of
    the graph. Where the model was changed (modules, attributes, hooks, parameters moved), its graphs are
    dropped. Where no graph can serve, the call is an eager one, said once.

    Args:
        function: called with keyword arguments; its operations must not depend on the values of tensors.
        model: what it computes with. In-place writes to its parameters are seen by the graph.
        numbers: names of arguments that may be Python numbers.
        scales: of those of which 0 has a graph of its own, without the work that it spares.
        recorder: shared by the graphs of models that run one after the other.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        model: nn.Module,
        numbers: Sequence[str] = (),
        scales: Sequence[str] = (),
        recorder: Recorder | None = None,
    ):
        self._function, self._model, self._numbers, self._scales = function, model, numbers, scales
        self._recorder = CudaRecorder() if recorder is None else recorder
        self._graphs: OrderedDict[Any, _Graph] = OrderedDict()
        self._state: _State | None = None
        self._lock = threading.Lock()
        self._told: set[str] = set()

    def __call__(self, **arguments: Any) -> Any:
        reason = self._unserved(arguments)
        if reason is not None:
            if reason and reason not in self._told:
                self._told.add(reason)
                warnings.warn(f"{type(self._model).__name__}: {reason}; such calls run without a graph", stacklevel=2)
            return self._function(**arguments)
        with self._lock, torch.no_grad():
            if self._state is None or not self._state.unchanged():
                self.reset()
                self._state = _State(self._model)
            leaves, spec = pytree.tree_flatten(self._tensors(arguments))
            key = (spec, *map(_kind, leaves), _mode())
            if key not in self._graphs:
                while len(self._graphs) >= _MOST:
                    self._graphs.popitem(last=False)
                self._graphs[key] = _Graph(self._function, leaves, spec, self._device(), self._recorder)
                self._state = _State(self._model)  # diffusers scales LoRAs and back, which makes other numbers
            self._graphs.move_to_end(key)
            return self._graphs[key](leaves)

    def reset(self) -> None:
        """Frees all graphs."""
        self._graphs.clear()
        self._state = None

    def _device(self) -> torch.device:
        return next(self._model.parameters()).device

    def _unserved(self, arguments: dict[str, Any]) -> str | None:
        """Why no graph can serve: empty for reasons that need no words."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
            return ""
        if not self._recorder.serves(self._device()):
            return f"on {self._device().type} there are no CUDA graphs, or one is being captured"
        for leaf in pytree.tree_leaves(arguments):
            if not isinstance(leaf, (Tensor, int, float, str, type(None))):
                return f"an argument holds a {type(leaf).__name__}"
        return None

    def _tensors(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments, the numbers that may change as tensors."""
        result = dict(arguments)
        for name in (*self._numbers, *self._scales):
            value = result.get(name)
            if isinstance(value, (int, float)) and (value != 0 or name in self._numbers):
                dtype = torch.int64 if isinstance(value, int) and name in self._numbers else torch.float64
                result[name] = torch.tensor(value, dtype=dtype)
        return result


class Static:
    """Results of a graph's inputs and of weights, in memory that the graph reads: computed again where those change."""

    forgotten = 0  # raised where weights were written without a count; what was kept before is computed again
    _active = threading.local()

    def __init__(self, inputs: Iterable[Tensor]):
        self._inputs = {t.untyped_storage()._cdata for t in inputs}
        self._entries: dict[Any, _Entry] = {}

    @staticmethod
    def active() -> "Static | None":
        """Of the graph that is being made in this thread."""
        return getattr(Static._active, "static", None)

    def __enter__(self) -> None:
        Static._active.static = self

    def __exit__(self, *_: Any) -> None:
        Static._active.static = None

    def keep(self, owner: Any, tensors: Sequence[Tensor], compute: Callable[[], Any]) -> Any:
        """compute(), kept for this owner if its first tensor is an input or a parameter; else a part of the graph."""
        source = tensors[0]
        if not isinstance(source, nn.Parameter) and source.untyped_storage()._cdata not in self._inputs:
            Static._active.static = None  # what is computed within the graph is as within any
            try:
                return compute()
            finally:
                Static._active.static = self
        if owner not in self._entries:
            self._entries[owner] = _Entry(tensors, compute, compute(), Static._stamps(tensors))
        return self._entries[owner].result

    def refresh(self) -> None:
        for owner, entry in self._entries.items():
            stamps = Static._stamps(entry.tensors)
            if None in stamps or stamps != entry.stamps:
                news = pytree.tree_leaves(entry.compute())
                for old, new in zip(pytree.tree_leaves(entry.result), news, strict=True):
                    old.copy_(new)
                self._entries[owner] = entry._replace(stamps=stamps)

    @staticmethod
    def _stamps(tensors: Sequence[Tensor]) -> list[Any]:
        return [Static.forgotten, *map(stamp, tensors)]


class _Entry(NamedTuple):
    tensors: Sequence[Tensor]
    compute: Callable[[], Any]
    result: Any
    stamps: list[Any]


def stamp(tensor: Tensor) -> tuple[Any, ...] | None:
    """What is equal for the same view of the same memory, not written to in between; None where that is not counted."""
    if tensor.is_inference():
        return None
    place = (tensor.untyped_storage()._cdata, tensor.data_ptr(), tensor._version)
    return *place, tensor.dtype, tensor.shape, tensor.stride()


class _Graph:
    """One captured call."""

    def __init__(
        self, function: Callable[..., Any], leaves: list[Any], spec: Any, device: torch.device, recorder: Recorder
    ):
        self._inputs = {i: _static(leaf, device) for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
        self._stamps: dict[int, Any] = {}
        self._held: list[Tensor] = []
        arguments = pytree.tree_unflatten([self._inputs.get(i, leaf) for i, leaf in enumerate(leaves)], spec)
        self._kept = Static(self._inputs.values())
        self._copy_in(leaves)
        with self._kept:
            _warm_up(lambda: function(**arguments), device)
            self._replay, outputs = recorder.capture(lambda: function(**arguments))
        self._outputs, self._spec = pytree.tree_flatten(outputs)

    def __call__(self, leaves: list[Any]) -> Any:
        self._copy_in(leaves)
        self._kept.refresh()
        self._replay()
        return pytree.tree_unflatten([t.clone() if isinstance(t, Tensor) else t for t in self._outputs], self._spec)

    def _copy_in(self, leaves: list[Any]) -> None:
        """Copies what changed."""
        for i, static in self._inputs.items():
            now = stamp(leaves[i])
            if now is None or now != self._stamps.get(i):
                static.copy_(leaves[i])
                self._stamps[i] = now
        self._held = [leaves[i] for i in self._inputs]  # no other tensor takes the place of these


def _warm_up(function: Callable[[], Any], device: torch.device) -> None:
    """Compiles kernels and initialises libraries, on a stream beside."""
    if device.type != "cuda":
        function()
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream(device).wait_stream(stream)


def _static(leaf: Tensor, device: torch.device) -> Tensor:
    dtype = torch.float32 if leaf.dtype == torch.float64 and leaf.dim() == 0 and device.type == "cuda" else leaf.dtype
    return torch.empty_like(leaf, device=device, dtype=dtype)


def _kind(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device
    return type(leaf), leaf


def _mode() -> Any:
    """What of PyTorch's state decides which operations run."""
    autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
    return autocast, torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None


class _State:
    """What all modules hold, and where their tensors are. Cheap to compare: it is done at every step."""

    def __init__(self, model: nn.Module):
        own = [vars(module) for module in model.modules()]
        self._tables = [*own, *(value for table in own for value in table.values() if isinstance(value, dict))]
        self._values = self._now()
        self._tensors = [value for value in self._values if isinstance(value, Tensor)]
        self._places = self._addresses()

    def unchanged(self) -> bool:
        now = self._now()
        same = len(now) == len(self._values) and all(map(operator.is_, now, self._values))
        return same and self._addresses() == self._places

    def _now(self) -> list[Any]:
        return list(chain.from_iterable(map(dict.values, self._tables)))

    def _addresses(self) -> list[int]:
        return [tensor.data_ptr() for tensor in self._tensors]
