"""Pytree in, pytree out, and the key of a call."""

import enum
import functools
import inspect
import threading
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

from torchaccel.errors import InputError

_registering = threading.Lock()
_SINGLE = pytree.tree_flatten(((torch.empty(0),), {}))[1]


class Call(NamedTuple):
    """The arguments of one call, flat: `tensors` in order, and the rest in `template` to put them back into."""

    tensors: tuple[torch.Tensor, ...]
    key: tuple[Any, ...]
    spec: pytree.TreeSpec
    template: tuple[Any, ...]
    autocast: tuple[Any, ...] | None = None

    def arguments(self, tensors: Sequence[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call's args and kwargs, with `tensors` in the place of its own."""
        args, kwargs = pytree.tree_unflatten(fill(self.template, tensors), self.spec)
        return args, kwargs


# Values that an engine may bake in: immutable, and equal only when they mean the same.
_PYTHON = (int, float, complex, bool, str, bytes, type(None), enum.Enum, slice)
_TORCH = (torch.dtype, torch.device, torch.memory_format, torch.layout, torch.Size)
PLAIN: tuple[type, ...] = (*_PYTHON, *_TORCH)
_LEAVES = (torch.Tensor, *PLAIN)


class _Hole:
    """Marks the place of a tensor in a template."""

    def __repr__(self) -> str:
        return "tensor"


HOLE = _Hole()


def fill(template: Sequence[Any], tensors: Sequence[torch.Tensor]) -> list[Any]:
    """The template with its holes filled, in order.

    >>> fill((HOLE, 3), [torch.tensor(1)])
    [tensor(1), 3]
    """
    remaining = iter(tensors)
    return [next(remaining) if item is HOLE else item for item in template]


def flatten(tree: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """PyTorch's own flattening; a dataclass that it does not know yet is made known to it on the way.

    A `torch.Size` is a leaf: once torch.export has run, PyTorch takes it apart, and makes a plain tuple of it.
    """
    leaves, spec = pytree.tree_flatten(tree, is_leaf=_is_size)
    unknown = {type(leaf) for leaf in leaves if is_dataclass(leaf) and not isinstance(leaf, type)}
    if not unknown:
        return leaves, spec
    with _registering:
        for kind in unknown:
            if kind not in pytree.SUPPORTED_NODES:  # another thread may have been first
                _make_known(kind)
    return flatten(tree)


def _is_size(value: Any) -> bool:
    return type(value) is torch.Size


def _make_known(kind: type) -> None:
    """Make a dataclass a node of pytrees, which is put together again as `copy.copy` would.

    Not by its constructor, as `pytree.register_dataclass` does: `__post_init__` would change its values a second time,
    and fields outside the constructor, or attributes that are no fields, would be lost. It remains for dataclasses that
    are dictionaries or lists besides.
    """
    try:
        object.__new__(kind)
    except TypeError:
        pytree.register_dataclass(kind)
        return

    def take_apart(value: Any) -> tuple[list[Any], tuple[str, ...]]:
        names = {field.name: None for field in fields(value) if hasattr(value, field.name)}
        names.update(dict.fromkeys(getattr(value, "__dict__", ())))
        return [getattr(value, name) for name in names], tuple(names)

    def put_together(values: Iterable[Any], names: Any) -> Any:
        value: Any = object.__new__(kind)
        for name, item in zip(names, values, strict=True):
            object.__setattr__(value, name, item)  # also where it is frozen
        return value

    pytree.register_pytree_node(kind, take_apart, put_together)


def keyword_names(function: Callable[..., Any]) -> frozenset[str]:
    """The names that a function gives its arguments; those that it gathers in `**kwargs` come in the caller's order."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return frozenset()
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return frozenset(parameter.name for parameter in parameters if parameter.kind in named)


def read_call(args: tuple[Any, ...], kwargs: dict[str, Any], names: frozenset[str] = frozenset()) -> Call:
    """Flatten a call and give it a key that tells apart all calls that need different engines.

    The key holds the nesting, each tensor's shape, dtype and device type, each other value with its type, and the
    state of autocast, which decides the dtypes that the module would return. The keywords in `names`, those of the
    module's own arguments, come first and sorted: in whatever order a caller writes them, they need one engine. Raises
    `InputError` for what has no such description.
    """
    if len(kwargs) > 1 and not names.isdisjoint(kwargs):
        own = sorted(names.intersection(kwargs))
        kwargs = {name: kwargs[name] for name in (*own, *(name for name in kwargs if name not in names))}
    if not kwargs and len(args) == 1 and isinstance(args[0], torch.Tensor):  # the common call, without the walk
        (x,) = args
        if x.is_nested:
            _refuse_without_shape(args)
        autocast = _autocast_key()
        return Call((x,), (x.shape, x.dtype, x.device.type, autocast), _SINGLE, (HOLE,), autocast)
    leaves: Sequence[Any] = (*args, *kwargs.values())
    if all(map(_is_leaf, leaves)):  # nothing nests: neither the walk, nor the hash of its result
        nesting: Any = len(args), tuple(kwargs)
        spec = _flat_spec(*nesting)
    else:
        leaves, nesting = flatten((args, kwargs))
        spec = nesting
    tensors = tuple(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
    _refuse_without_shape(tensors)
    template = tuple(HOLE if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)
    described = tuple(
        (leaf.shape, leaf.dtype, leaf.device.type) if isinstance(leaf, torch.Tensor) else _constant_key(leaf)
        for leaf in leaves
    )
    autocast = _autocast_key()
    return Call(tensors, (described, nesting, autocast), spec, template, autocast)


def _refuse_without_shape(tensors: Sequence[torch.Tensor]) -> None:
    """Raise `InputError` for a nested tensor that has no shape to ask for; a jagged one has, of symbols."""
    for index, tensor in enumerate(tensors):
        if tensor.is_nested and tensor.layout is torch.strided:
            raise InputError(f"input {index} is {why_not_dense(tensor)}; engines take dense (strided) tensors.")


def why_not_dense(tensor: torch.Tensor) -> str:
    """What a tensor is that is none of an engine's, with the remedy; empty for a dense (strided) one."""
    if tensor.is_nested:
        return "nested: use torch.nested.to_padded_tensor(…, 0.0)"
    if tensor.layout is not torch.strided:
        return f"{str(tensor.layout).removeprefix('torch.')}: use .to_dense()"
    return f"quantized ({tensor.dtype}): use .dequantize(), or .int_repr()" if tensor.is_quantized else ""


def _is_leaf(value: Any) -> bool:
    return isinstance(value, _LEAVES)


@functools.lru_cache(256)
def _flat_spec(positional: int, names: tuple[str, ...]) -> pytree.TreeSpec:
    return pytree.tree_flatten(((0,) * positional, dict.fromkeys(names, 0)))[1]


def constants_key(call: Call) -> tuple[Any, ...]:
    """What tells apart two calls besides their tensors: nesting, plain values, autocast."""
    constants = tuple(leaf if leaf is HOLE else _constant_key(leaf) for leaf in call.template)
    return constants, call.spec, call.autocast


def _constant_key(value: Any) -> tuple[Any, ...]:
    if not isinstance(value, PLAIN):
        raise InputError(
            f"an input holds a {type(value).__qualname__}, which is neither a tensor nor a plain value: an engine "
            f"would keep the first one for ever. Pass tensors (torch.as_tensor for arrays), numbers, strings, or None."
        )
    if isinstance(value, float | complex):
        return type(value), repr(value)  # nan != nan, and 0.0 == -0.0
    if isinstance(value, slice):  # no dictionary takes it as a key before Python 3.12
        return (slice, *map(_constant_key, (value.start, value.stop, value.step)))
    return type(value), value


def _autocast_key() -> tuple[Any, ...] | None:
    if not torch.is_autocast_enabled("cuda") and not torch.is_autocast_enabled("cpu"):
        return None
    return tuple((kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cuda", "cpu"))


@dataclass(frozen=True)
class OutputSpec:
    """How an engine's outputs become the module's: for each leaf of the result, where it comes from.

    A source is ("output", i), ("input", i) where the module hands an input back, ("cast", (i, dtype)) where it only
    casts one, or ("value", v) for what is no tensor.
    """

    spec: pytree.TreeSpec
    sources: tuple[tuple[str, Any], ...]

    @property
    def reads_inputs(self) -> bool:
        """Whether the result holds one of the call's own tensors."""
        return any(kind in ("input", "cast") for kind, _ in self.sources)

    def computed(self, leaves: Sequence[Any]) -> list[torch.Tensor]:
        """Of all leaves of a result, those that are outputs, each once, in the order of the outputs."""
        places = {what: leaf for (kind, what), leaf in zip(self.sources, leaves, strict=True) if kind == "output"}
        return [places[index] for index in range(len(places))]

    def assemble(self, outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> Any:
        """The result as the module would return it."""
        if len(self.sources) == 1 and self.sources[0] == ("output", 0) and self.spec.is_leaf():
            return outputs[0]
        places: dict[str, Callable[[Any], Any]] = {
            "output": outputs.__getitem__,
            "input": inputs.__getitem__,
            "cast": lambda what: inputs[what[0]].to(what[1], copy=True),
            "value": lambda value: value,
        }
        return pytree.tree_unflatten([places[kind](what) for kind, what in self.sources], self.spec)


def split_outputs(
    result: Any, inputs: Sequence[torch.Tensor], written: Container[int] = ()
) -> tuple[tuple[torch.Tensor, ...], OutputSpec]:
    """The tensors that a result computes, each once, and how to assemble the result from them and the inputs.

    The inputs numbered in `written` hold something computed by now.
    """
    leaves, spec = flatten(result)
    places: dict[int, tuple[str, Any]] = {}
    for index, tensor in enumerate(inputs):
        if index not in written:
            places[id(tensor)] = ("input", index)
    outputs: list[torch.Tensor] = []
    sources: list[tuple[str, Any]] = []
    for leaf in leaves:
        if not isinstance(leaf, torch.Tensor):
            if not isinstance(leaf, PLAIN):
                raise InputError(f"an output holds a {type(leaf).__qualname__}, neither a tensor nor a plain value.")
            sources.append(("value", leaf))
            continue
        if id(leaf) not in places:
            places[id(leaf)] = ("output", len(outputs))
            outputs.append(leaf)
        sources.append(places[id(leaf)])
    return tuple(outputs), OutputSpec(spec, tuple(sources))
