"""A model's inference step as CUDA graphs: captured in seconds, replayed without Python between the kernels."""

import contextlib
import operator
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, compress
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

_MOST = 8  # graphs of one model, for sizes and kinds of arguments; the one longest unused goes first


class Recorder(Protocol):
    """Captures graphs: `CudaRecorder`, or a stand-in of the tests. StepGraph keeps an attribute of its own on it."""

    def serves(self, device: torch.device) -> bool:
        """Whether a graph can be captured on the device now."""

    def capture(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Returns a function that runs the recorded operations again in the same memory, and function's result."""


class CudaRecorder:
    """Captures with torch.cuda.CUDAGraph. Its graphs share one memory pool, so they must not run at the same time."""

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
    """Runs `function` as CUDA graphs, one for each kind of arguments: sizes, dtypes, and which are given.

    A call copies the tensors whose values changed into the graph's memory, replays the graph and returns copies of its
    outputs. Python numbers among `numbers` and `scales` and the scales of LoRA layers are copied, too, so that another
    value needs no other graph. Arguments that are outputs of another graph of the same recorder (the residuals of a
    ControlNet) are read where that graph wrote them.

    Results that the function passes to `Static.keep` (keys and values of the prompt) are computed outside of the graph,
    when their inputs change. A change of the model (modules, attributes, hooks, moved parameters) drops its graphs; a
    write into a parameter does not. Where no graph can serve, the call is an eager one, after one warning.

    Args:
        function: called with keyword arguments; its operations must not depend on the values of tensors.
        model: the module that it computes with.
        numbers: names of arguments that may be Python numbers.
        scales: the same, for numbers of which 0 has a graph of its own, which may leave out work.
        lora_scale: (name of a dictionary among the arguments, key in it) of the factor of all LoRA layers.
        recorder: shared by the graphs of models that run one after the other.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        model: nn.Module,
        numbers: Sequence[str] = (),
        scales: Sequence[str] = (),
        lora_scale: tuple[str, str] | None = None,
        recorder: Recorder | None = None,
    ):
        self._function, self._model, self._numbers, self._scales = function, model, numbers, scales
        self._lora_scale = lora_scale
        self._recorder = CudaRecorder() if recorder is None else recorder
        self._pool: _Pool = vars(self._recorder).setdefault("_step_graphs", _Pool())
        self._graphs: OrderedDict[Any, _Graph] = OrderedDict()
        self._state: _State | None = None
        self._told: set[str] = set()

    def __call__(self, **arguments: Any) -> Any:
        reason = self._unserved(arguments)
        if reason is not None:
            if reason and reason not in self._told:
                self._told.add(reason)
                warnings.warn(f"{type(self._model).__name__}: {reason}; such calls run without a graph", stacklevel=2)
            return self._function(**arguments)
        # What is made in inference mode could not be written to outside of it.
        with self._pool.lock, torch.inference_mode(False), torch.no_grad():
            scalings = self._check_state().scalings
            arguments, factor = self._without_lora_scale(arguments) if scalings else (arguments, 1.0)
            leaves, spec = pytree.tree_flatten((self._numbered(arguments), scalings.times(factor)))
            key = (spec, *map(_kind, leaves), _mode())
            if key not in self._graphs or self._graphs[key].orphaned():
                while len(self._graphs) >= _MOST:
                    self._graphs.popitem(last=False)
                self._graphs[key] = _Graph(self._with_scalings, leaves, spec, self._device(), self._recorder)
            self._graphs.move_to_end(key)
            return self._graphs[key](leaves)

    def reset(self) -> None:
        """Frees all graphs."""
        self._graphs.clear()
        self._state = None

    def _check_state(self) -> "_State":
        """The state of the model. Drops the graphs if it changed."""
        if self._state is None or not self._state.unchanged():
            now = _State(self._model)
            if self._state is None or not now.equals(self._state):
                self.reset()
            self._state = now
        return self._state

    def _with_scalings(self, arguments: dict[str, Any], scalings: Tensor | None) -> Any:
        with self._state.scalings.replaced(scalings):
            return self._function(**arguments)

    def _device(self) -> torch.device:
        return next(self._model.parameters()).device

    def _unserved(self, arguments: dict[str, Any]) -> str | None:
        """The reason why no graph can serve, None if one can; empty for a reason that needs no warning."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
            return ""
        if not self._recorder.serves(self._device()):
            return f"on {self._device().type} there are no CUDA graphs, or one is being captured"
        for leaf in pytree.tree_leaves(arguments):
            if not isinstance(leaf, (Tensor, int, float, str, type(None))):
                return f"an argument holds a {type(leaf).__name__}"
        return None

    def _without_lora_scale(self, arguments: dict[str, Any]) -> tuple[dict[str, Any], float]:
        """The arguments without the factor of the LoRA layers, and the factor."""
        name, key = self._lora_scale or ("", "")
        given = arguments.get(name) or {}
        factor = given.get(key, 1.0)
        if not isinstance(factor, (int, float)):
            return arguments, 1.0
        rest = {other: value for other, value in given.items() if other != key}
        return {n: v for n, v in arguments.items() if n != name} | ({name: rest} if rest else {}), factor

    def _numbered(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments, those numbers that may change as `_Number`."""
        result = dict(arguments)
        for name in (*self._numbers, *self._scales):
            value = result.get(name)
            if isinstance(value, (int, float)) and (value != 0 or name in self._numbers):
                whole = isinstance(value, int) and name in self._numbers
                result[name] = _Number(value, torch.int64 if whole else torch.float64)
        return result


class _Number:
    """A Python number that a graph reads from memory, as a tensor [] of this dtype."""

    def __init__(self, value: float, dtype: torch.dtype):
        self.value, self.dtype = value, dtype


class _Pool:
    """What the graphs of one recorder share.

    Attributes:
        lock: held by a call from its first copy to its last.
        intact: a weak reference to the graph whose outputs still are what it wrote. A replay of another graph may
            overwrite them, since the recorder's graphs share memory, unless that one has them as its inputs.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.intact: Callable[[], _Graph | None] = _nothing


def _nothing() -> None:
    return None


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
    """One captured call. Its inputs are memory of its own, or outputs of the graph that ran before: its source."""

    def __init__(
        self, function: Callable[..., Any], leaves: list[Any], spec: Any, device: torch.device, recorder: Recorder
    ):
        self._pool: _Pool = vars(recorder)["_step_graphs"]
        self._in_place = {
            i: t for i, leaf in enumerate(leaves) if (t := _output_in_place(self._pool, leaf)) is not None
        }
        self._source = self._pool.intact if self._in_place else _nothing
        self._inputs = self._in_place | {
            i: _static(leaf, device)
            for i, leaf in enumerate(leaves)
            if isinstance(leaf, (Tensor, _Number)) and i not in self._in_place
        }
        self._stamps: dict[int, Any] = {}
        self._held: list[Any] = []
        self._handed_out: dict[Any, Tensor] = {}  # the stamp of an output's copy -> the output
        self._copies: list[StorageWeakRef] = []  # keep the identities of the copies' storages
        arguments = pytree.tree_unflatten([self._inputs.get(i, leaf) for i, leaf in enumerate(leaves)], spec)
        self._kept = Static(self._inputs.values())
        self._copy_in(leaves)
        with self._kept:
            _warm_up(lambda: function(*arguments), device)
            self._replay, outputs = recorder.capture(lambda: function(*arguments))
        self._outputs, self._spec = pytree.tree_flatten(outputs)

    def __call__(self, leaves: list[Any]) -> Any:
        self._copy_in(leaves)
        self._kept.refresh()
        self._replay()
        if not self._in_place or self._pool.intact() is not self._source():
            self._pool.intact = weakref.ref(self)
        results = [t.clone() if isinstance(t, Tensor) else t for t in self._outputs]
        pairs = [pair for pair in zip(results, self._outputs, strict=True) if isinstance(pair[0], Tensor)]
        self._handed_out = {stamp(copy): output for copy, output in pairs}
        self._copies = [StorageWeakRef(copy.untyped_storage()) for copy, _ in pairs]
        return pytree.tree_unflatten(results, self._spec)

    def orphaned(self) -> bool:
        """Whether the graph that wrote the inputs read in place is gone: others would be copied from now on."""
        return bool(self._in_place) and self._source() is None

    def output_of(self, copy: Tensor) -> Tensor | None:
        """The output of which this is the copy that the latest call returned, if nobody wrote to it."""
        key = stamp(copy)
        return None if key is None else self._handed_out.get(key)

    def _copy_in(self, leaves: list[Any]) -> None:
        """Copies what changed into the graph's memory."""
        for i, static in self._inputs.items():
            leaf = leaves[i]
            if i in self._in_place:
                source = self._pool.intact()
                if source is None or source is not self._source() or source.output_of(leaf) is not static:
                    self._pool.intact = _nothing
                    static.copy_(leaf)
                continue
            now = leaf.value if isinstance(leaf, _Number) else stamp(leaf)
            if now is None or now != self._stamps.get(i):
                static.fill_(now) if isinstance(leaf, _Number) else static.copy_(leaf)
                self._stamps[i] = now
        self._held = [leaves[i] for i in self._inputs]  # no other tensor takes the place of these


def _output_in_place(pool: _Pool, leaf: Any) -> Tensor | None:
    source = pool.intact()
    return source.output_of(leaf) if source is not None and isinstance(leaf, Tensor) else None


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


def _static(leaf: Tensor | _Number, device: torch.device) -> Tensor:
    """Memory for such an input. What a host computes in float64 is float32 on a GPU, as Python's numbers are there."""
    on_host = isinstance(leaf, _Number) or leaf.device.type == "cpu"
    narrow = on_host and leaf.dtype == torch.float64 and device.type == "cuda"
    dtype = torch.float32 if narrow else leaf.dtype
    if isinstance(leaf, _Number):
        return torch.empty((), device=device, dtype=dtype)
    return torch.empty_like(leaf, device=device, dtype=dtype)


def _kind(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device
    return (_Number, leaf.dtype) if isinstance(leaf, _Number) else (type(leaf), leaf)


def _mode() -> Any:
    """The parts of PyTorch's state on which it depends what operations run."""
    autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
    return autocast, torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None


class _Scalings:
    """The scales of a model's LoRA layers. In peft each layer has them as `scaling`: {adapter: number}."""

    def __init__(self, tables: list[dict[str, float]]):
        self.tables = tables
        self._numbers: list[float] = []
        self._tensor: Tensor | None = None

    def __bool__(self) -> bool:
        return bool(self.tables)

    def times(self, factor: float) -> Tensor | None:
        """All of them times the factor, [L] in float64, the same tensor while the values stay; None for no LoRA."""
        numbers = [factor * number for table in self.tables for number in table.values()]
        if numbers != self._numbers:
            self._numbers, self._tensor = numbers, torch.tensor(numbers, dtype=torch.float64)
        return self._tensor

    @contextlib.contextmanager
    def replaced(self, values: Tensor | None) -> Iterator[None]:
        """Within it, the layers read the elements of `values`."""
        before = [dict(table) for table in self.tables]
        elements = iter(() if values is None else values.unbind())
        try:
            for table in self.tables:
                for adapter in table:
                    table[adapter] = next(elements)
            yield
        finally:
            for table, numbers in zip(self.tables, before, strict=True):
                table.update(numbers)


class _State:
    """The attributes of all modules, and where their tensors are. Compared at every step, so it must be cheap."""

    def __init__(self, model: nn.Module):
        own = [vars(module) for module in model.modules()]
        named = [table["scaling"] for table in own if isinstance(table.get("scaling"), dict)]
        self.scalings = _Scalings([table for table in named if all(map(_is_number, table.values()))])
        known = set(map(id, self.scalings.tables))
        values = list(chain.from_iterable(map(dict.values, own)))
        self._tables = [*own, *(v for v in values if isinstance(v, dict) and id(v) not in known)]
        self._lists = [v for v in values if type(v) is list]
        self._values = self._now()
        self._tensors = [value for value in self._values if isinstance(value, Tensor)]
        self._places = self._addresses()

    def unchanged(self) -> bool:
        """Whether the model holds the same objects."""
        now = self._now()
        same = len(now) == len(self._values) and all(map(operator.is_, now, self._values))
        return same and self._addresses() == self._places

    def equals(self, other: "_State") -> bool:
        """Whether all objects are the same or equal as numbers, strings and lists of these."""
        if len(self._values) != len(other._values) or self._places != other._places:
            return False
        pairs = zip(self._values, other._values, strict=True)
        differing = compress(pairs, map(operator.is_not, self._values, other._values))
        return all(_equal(a, b) for a, b in differing)

    def _now(self) -> list[Any]:
        return [*chain.from_iterable(map(dict.values, self._tables)), *chain.from_iterable(self._lists)]

    def _addresses(self) -> list[int]:
        return [tensor.data_ptr() for tensor in self._tensors]


def _equal(a: Any, b: Any) -> bool:
    if type(a) is list and type(b) is list:
        return len(a) == len(b) and all(map(_equal, a, b))
    return a is b or (type(a) is type(b) and isinstance(a, (str, int, float)) and a == b)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))
