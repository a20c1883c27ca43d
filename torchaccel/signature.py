"""Pytree in, pytree out, and the key of a call."""

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

from torchaccel.errors import InputError

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
    """PyTorch's own flattening; a dataclass that it does not know yet is made known to it on the way."""
    leaves, spec = pytree.tree_flatten(tree)
    unknown = {type(leaf) for leaf in leaves if is_dataclass(leaf) and not isinstance(leaf, type)}
    if not unknown:
        return leaves, spec
    for kind in unknown:
        pytree.register_dataclass(kind)
    return flatten(tree)


def read_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Flatten a call and give it a key that tells apart all calls that need different engines.

    The key holds the nesting, each tensor's shape, dtype and device type, each other value with its type, and the
    state of autocast, which decides the dtypes that the module would return.
    """
    if not kwargs and len(args) == 1 and isinstance(args[0], torch.Tensor):  # the common call, without the walk
        (x,) = args
        autocast = _autocast_key()
        return Call((x,), (x.shape, x.dtype, x.device.type, autocast), _SINGLE, (HOLE,), autocast)
    leaves, spec = flatten((args, kwargs))
    tensors = tuple(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
    template = tuple(HOLE if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)
    described = tuple(
        (leaf.shape, leaf.dtype, leaf.device.type) if isinstance(leaf, torch.Tensor) else _constant_key(leaf)
        for leaf in leaves
    )
    autocast = _autocast_key()
    return Call(tensors, (described, spec, autocast), spec, template, autocast)


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


def split_outputs(result: Any, inputs: Sequence[torch.Tensor]) -> tuple[tuple[torch.Tensor, ...], OutputSpec]:
    """The tensors that a result computes, each once, and how to assemble the result from them and the inputs."""
    leaves, spec = flatten(result)
    places: dict[int, tuple[str, Any]] = {id(tensor): ("input", index) for index, tensor in enumerate(inputs)}
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
