"""The torch.compile backend: `torch.compile(module, backend="torchaccel")`.

Dynamo hands over graphs whose inputs are the call's tensors and sizes, and the module's parameters and buffers. Each
graph becomes a module that owns these parameters and buffers, and `torchaccel.compile` compiles that: the weights are
followed, outputs checked and reports written as for any other module.

>>> import torch, torchaccel
>>> module = torch.nn.Linear(4, 2)
>>> fast = torch.compile(module, backend=torchaccel.dynamo.backend, options={"precision": "fp32", "backend": "eager"})
>>> with torch.no_grad():
...     fast(torch.ones(3, 4)).shape
torch.Size([3, 2])
>>> torchaccel.dynamo.models()[-1].report().calls_by_engine
1
"""

import itertools
import operator
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import fx, nn

from torchaccel.compiled import CompiledModule
from torchaccel.compiler import compile
from torchaccel.errors import BackendWarning, OptionError
from torchaccel.fxgraph import observe, placeholders, put_weight, weight_places, why_no_engine, with_weights
from torchaccel.options import Options, make_options

REFUSED = {
    "module": "torch.compile has it already",
    "inputs": "engines are built at the first call",
    "dynamic_batch": "each size gets an engine of its own here; torchaccel.compile(module, dynamic_batch=…) has it",
    "keep_fp32": "Dynamo's graphs have no submodules to name; torchaccel.compile(module, keep_fp32=…) has it",
}
ALLOWED = tuple(field.name for field in fields(Options) if field.name not in REFUSED)

_models: "WeakValueDictionary[int, CompiledModule]" = WeakValueDictionary()
_count = itertools.count()


def backend(
    graph: fx.GraphModule,
    examples: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """What torch.compile calls with each graph that Dynamo captures; not for calling by hand.

    Nothing is built here: the first call does, outside Dynamo's compilation, so that the errors of `torchaccel.compile`
    reach the caller as they are (Dynamo would wrap them, or drop them for good under `suppress_errors`).

    Args:
        graph: the captured graph.
        examples: its inputs, weights among them.
        options: the arguments of `torchaccel.compile` by name, except `module`, `inputs`, `dynamic_batch`, `keep_fp32`.
        mode: none; the modes are Inductor's.
    """
    return _Captured(graph, examples, dict(options or {}), mode)


def models() -> list[CompiledModule]:
    """The compiled modules behind torch.compile, oldest first: one for each graph and set of weights.

    `report()` on one says what serves it, or why PyTorch runs its graph; `refresh()` takes weights that were written
    behind PyTorch's back. They live as long as the module and Dynamo's code do.
    """
    references: Any = _models.valuerefs()  # a list of its own, whatever other threads add
    alive = [(reference.key, model) for reference in references if (model := reference()) is not None]
    return [model for _, model in sorted(alive)]


class _Served:
    """One graph with one set of weights: the compiled module that owns them."""

    def __init__(self, model: CompiledModule, names: Sequence[str], weights: Sequence[torch.Tensor]) -> None:
        self.model = model
        self._names = names
        self._weights = tuple(weights)
        self._lock = threading.RLock()
        _models[next(_count)] = model

    def __call__(self, weights: Sequence[torch.Tensor], inputs: Sequence[Any]) -> Any:
        """Run an engine with `weights`; one that is another object than before replaces that in the module."""
        with self._lock:
            if not all(map(operator.is_, weights, self._weights)):
                for name, weight in zip(self._names, weights, strict=True):
                    put_weight(self.model.module, name, weight)
                self._weights = tuple(weights)
            return self.model(*inputs)

    def note(self, event: str) -> None:
        """Leave a line in the report."""
        self.model._state.report.events.append(event)

    def count(self) -> None:
        """Count a call of the graph itself."""
        self.model._state.report.calls_by_module += 1


class _Held:
    """What hangs on a weight: the compiled modules that own it, by graph.

    It hangs there, and not on the graph, because Dynamo keeps a graph for ever and uses it for every module of the
    same code: so compiled modules go when their weights do, or the graph. Copies and pickles of a weight leave it out.
    """

    def __init__(self) -> None:
        self.by_graph: WeakKeyDictionary[_Captured, _Served] = WeakKeyDictionary()

    def __reduce__(self) -> Any:
        return OrderedDict, ()  # of all that could stand for nothing, one that torch.load(weights_only=True) takes


class _Captured:
    """One of Dynamo's graphs: what runs in the place of the code that it was captured from."""

    def __init__(
        self, graph: fx.GraphModule, examples: Sequence[Any], options: dict[str, Any], mode: str | None
    ) -> None:
        nodes, places = placeholders(graph), weight_places(graph, examples)
        self._graph = graph
        self._options = options
        self._mode = mode
        self._weights = places
        self._anchor = next((place for place in places if isinstance(examples[place], nn.Parameter)), None)
        self._names = [nodes[place].name for place in places]
        self._inputs = [place for place, node in enumerate(nodes) if place not in places]
        self._why_not: str | None = None  # unknown before the first call without gradients
        self._untracked: tuple[int, ...] | None = None  # unknown before the first run of the graph
        self._warned_of_gradients = False
        self._lock = threading.RLock()

    def __call__(self, *args: Any) -> Any:
        """Run an engine, or the graph itself where no engine can stand for it; Dynamo's arguments and results."""
        weights = [args[place] for place in self._weights]
        served = self._find(args, weights)
        if torch.is_grad_enabled() and any(isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args):
            self._note_gradients(served)
            return self._run_graph(served, args)
        if self._why_not is None:
            with self._lock:
                if self._why_not is None:
                    outputs, self._why_not = self._why_no_engine(args)
                    if self._why_not:
                        self._note_why_not(served)
                        served.count()
                        return outputs
        if self._why_not:
            return self._run_graph(served, args)
        return served(weights, [args[place] for place in self._inputs])

    def _find(self, args: Sequence[Any], weights: Sequence[torch.Tensor]) -> _Served:
        """The compiled module for these weights: the first parameter tells modules of the same code apart."""
        owner: Any = self if self._anchor is None else args[self._anchor]
        held = owner.__dict__.get("_torchaccel")
        served = held.by_graph.get(self) if isinstance(held, _Held) else None
        if served is not None:
            return served
        with self._lock:
            held = owner.__dict__.setdefault("_torchaccel", _Held())  # atomic: another graph's call may do the same
            if not isinstance(held, _Held):  # what a copy or a pickle has in its place
                held = owner._torchaccel = _Held()
            served = held.by_graph.get(self)
            if served is None:
                served = held.by_graph[self] = self._compile(args, weights)
            return served

    def _compile(self, args: Sequence[Any], weights: Sequence[torch.Tensor]) -> _Served:
        tensors = [arg for arg in (*weights, *args) if isinstance(arg, torch.Tensor)]
        device = tensors[0].device if tensors else torch.device("cpu")
        options = checked_options(self._options, self._mode, device)
        module = with_weights(self._graph, self._weights, weights)
        return _Served(compile(module, **options | {"device": device}), self._names, weights)

    def _why_no_engine(self, args: Sequence[Any]) -> tuple[Any, str]:
        """The graph's outputs, and why no engine can stand for it; empty where one can."""
        reason = why_no_engine(self._graph)
        if not any(isinstance(args[place], torch.Tensor) for place in self._inputs):
            reason = "it has no tensor among its inputs but weights"
        outputs, why_not = self._observe(args)
        return outputs, reason or why_not

    def _run_graph(self, served: _Served, args: Sequence[Any]) -> Any:
        served.count()
        if self._untracked is None:
            return self._observe(args)[0]
        if not self._untracked:
            return self._graph(*args)
        try:
            return self._graph(*args)
        finally:
            self._doubt(args)

    def _observe(self, args: Sequence[Any]) -> tuple[Any, str]:
        """The graph's outputs, and what it did that no engine does; what it writes untracked is remembered."""
        outputs, why_not, self._untracked = observe(self._graph, args)
        self._doubt(args)
        return outputs, why_not

    def _doubt(self, args: Sequence[Any]) -> None:
        """Have every model look at its weights if it has one that the graph writes to without a new version.

        Those are BatchNorm's running statistics: the graph of training writes to them, and that of evaluation is
        another, with a compiled module of its own.
        """
        written = {id(args[place]) for place in self._untracked or ()}
        for model in models() if written else ():
            model._state.watch.note_step(written)

    def _note_gradients(self, served: _Served) -> None:
        if self._warned_of_gradients:
            return
        self._warned_of_gradients = True
        served.note("PyTorch runs the graph where gradients are enabled and something requires them")
        warnings.warn(
            "torch.compile(backend='torchaccel') was called with gradients enabled, and engines compute none: PyTorch "
            "runs the captured graph itself. Call under torch.no_grad() or torch.inference_mode() to run engines.",
            BackendWarning,
            stacklevel=4,
        )

    def _note_why_not(self, served: _Served) -> None:
        served.note(f"PyTorch runs the graph itself, and no engine, because {self._why_not}")
        warnings.warn(
            f"torch.compile(backend='torchaccel'): PyTorch runs {type(served.model.module).__name__} itself, and no "
            f"engine, because {self._why_not}.",
            BackendWarning,
            stacklevel=4,
        )


def checked_options(options: Mapping[str, Any], mode: str | None, device: torch.device) -> dict[str, Any]:
    """The options as arguments for `torchaccel.compile`; raises `OptionError` for a wrong name or value."""
    if mode is not None:
        raise OptionError(
            f"mode={mode!r}: the modes are Inductor's; with backend='torchaccel' allowed is none. "
            f"Pass options={{'precision': 'fp16', …}} instead."
        )
    for name in options:
        if name in REFUSED:
            raise OptionError(f"options has {name!r}, which torch.compile cannot pass on: {REFUSED[name]}.")
        if name not in ALLOWED:
            raise OptionError(f"options has {name!r}; allowed are {', '.join(map(repr, ALLOWED))}.")
    defaults = {"precision": Options.precision, "device": None, "keep_fp32": (), "dynamic_batch": None}
    asked = make_options(**defaults | dict(options)).device
    if asked not in (None, device):
        raise OptionError(
            f"device={str(asked)!r}: torch.compile runs a graph where its tensors are, here {str(device)!r}; "
            f"leave device out, and move the module and its inputs with .to({str(asked)!r})."
        )
    return dict(options)
