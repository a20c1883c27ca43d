"""Pytrees at random: described by plain data, so that one can be made twice, with other tensors of the same kind."""

import enum
import math
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st

Pair = namedtuple("Pair", "first second")


class Typed(NamedTuple):
    x: Any
    y: Any = None


@dataclass
class Record:
    x: Any
    note: Any = None


@dataclass(frozen=True)
class Other:
    x: Any
    note: Any = None


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


PLAIN = st.tuples(
    st.just("plain"),
    st.none()
    | st.booleans()
    | st.integers(-2, 2)
    | st.floats()
    | st.sampled_from([-0.0, 0.0, 1.0, math.nan, 1j, Colour.RED, Colour.BLUE, torch.float32, torch.device("cpu")])
    | st.sampled_from([slice(0, 2), slice(None), torch.Size([2]), torch.Size([])])
    | st.text(max_size=2)
    | st.binary(max_size=2),
)


def tensors(shapes: st.SearchStrategy[tuple[int, ...]], dtypes: list[torch.dtype]) -> st.SearchStrategy[Any]:
    """Descriptions of a tensor: ("tensor", shape, dtype)."""
    return st.tuples(st.just("tensor"), shapes, st.sampled_from(dtypes))


def trees(leaves: st.SearchStrategy[Any], max_leaves: int = 6) -> st.SearchStrategy[Any]:
    """Descriptions of nested lists, tuples, dictionaries, named tuples and dataclasses of `leaves`."""
    names = st.sampled_from(["a", "b", "c"])
    return st.recursive(
        leaves,
        lambda inner: (
            st.tuples(st.sampled_from(["list", "tuple"]), st.lists(inner, max_size=3))
            | st.tuples(st.sampled_from(["dict", "ordered"]), st.dictionaries(names, inner, max_size=3))
            | st.tuples(st.sampled_from([Pair, Typed, Record, Other]), inner, inner)
        ),
        max_leaves=max_leaves,
    )


def make(tree: Any, leaf: Callable[..., Any]) -> Any:
    """What a description describes; `leaf` makes of its kind and the rest whatever is neither nested nor plain."""
    kind, *rest = tree
    if kind == "plain":
        return rest[0]
    if kind in ("list", "tuple"):
        return {"list": list, "tuple": tuple}[kind](make(item, leaf) for item in rest[0])
    if kind in ("dict", "ordered"):
        return {"dict": dict, "ordered": OrderedDict}[kind]((name, make(item, leaf)) for name, item in rest[0].items())
    if isinstance(kind, type):
        return kind(*(make(item, leaf) for item in rest))
    return leaf(kind, *rest)


def parts(tree: Any) -> list[Any] | None:
    """What a nested value holds, in order; None for a leaf."""
    if isinstance(tree, dict):
        return list(tree.values())
    if isinstance(tree, list | tuple) and not isinstance(tree, torch.Size):
        return list(tree)
    if is_dataclass(tree) and not isinstance(tree, type):
        return [getattr(tree, field.name) for field in fields(tree)]
    return None


def leaves_of(tree: Any) -> list[Any]:
    """The leaves in order, found without PyTorch's pytrees, which are a part of what is tested."""
    inner = parts(tree)
    return [tree] if inner is None else [leaf for part in inner for leaf in leaves_of(part)]


def nesting(tree: Any) -> str:
    """The types, keys and plain values of a tree; of its tensors, the dtype and shape."""
    inner = parts(tree)
    if inner is not None:
        keys = list(tree) if isinstance(tree, dict) else ""
        return f"{type(tree).__name__}{keys}({', '.join(map(nesting, inner))})"
    if isinstance(tree, torch.Tensor):
        return f"{tree.dtype}{list(tree.shape)}"
    return f"{type(tree).__name__}:{tree!r}"
