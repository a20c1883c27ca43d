"""Modules and calls at random: what the fuzz tests draw."""

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from tests.fuzz_module import COMPUTES, OPERATIONS, Recipe
from tests.trees import PLAIN, Other, Pair, Record, Typed, make, tensors, trees

DEPTH = int(os.environ.get("TORCHACCEL_FUZZ", "1"))
DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]
CHANGES = ("nothing", "values", "shapes", "dtypes", "nesting", "autocast")
FULL_SHAPES = st.lists(st.integers(1, 3), max_size=5).map(tuple)
SHAPES = st.lists(st.sampled_from([1, 2, 3] * 8 + [0]), max_size=5).map(tuple)


def count_cases(strategy: "st.SearchStrategy[Example]", count: int, check: Callable[["Example"], int]) -> int:
    """Check that many examples (a multiple of 10), the same ones at each run; returns how many cases they held.

    In runs of ten, since after ten Hypothesis varies what it has rather than drawing anew. With TORCHACCEL_FUZZ above 1
    there are as many times more, other ones each time.
    """
    cases = 0

    def run(example: "Example") -> None:
        nonlocal cases
        cases += check(example)

    first = 0 if DEPTH == 1 else random.randrange(2**32)
    once = settings(max_examples=10, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    for number in range(first, first + count * DEPTH // 10):
        seed(number)(once(given(strategy)(run)))()
    return cases


@st.composite
def recipes(draw: st.DrawFn, operations: Sequence[str], fewest: int) -> Recipe:
    """Of `fewest` to five steps."""
    index = st.integers(0, 5)
    step = st.tuples(st.sampled_from(operations), index, index)
    steps = tuple(draw(st.lists(step, min_size=fewest, max_size=5)))
    kinds = st.sampled_from(["step", "step", "step", "input", "input", "given"])
    picked = st.tuples(kinds, index)
    result = draw(trees(picked | picked | picked | picked | PLAIN | st.just(("seen",))))
    if not any(f"('step', {i})" in repr(result) and steps[i % len(steps)][0] in COMPUTES for i in range(6)):
        result = ("tuple", [result, ("computed",)])
    return Recipe(steps, result)


@dataclass(frozen=True)
class Signature:
    """What engines are told apart by: the described arguments, and whether autocast is on."""

    args: list[Any]
    kwargs: dict[str, Any]
    autocast: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether a tensor has no elements: the module itself serves the call then."""
        found: list[tuple[int, ...]] = []
        for tree in (*self.args, *self.kwargs.values()):
            make(tree, lambda _, shape, dtype: found.append(shape))
        return any(0 in shape for shape in found)


@dataclass(frozen=True)
class Example:
    """A module and calls of it, each a seed that says which signature it has, the values, layouts and mode."""

    recipe: Recipe
    signatures: tuple[Signature, ...]
    calls: list[int]


def changed_value(value: Any) -> Any:
    """Another plain value; for a boolean the number that it equals."""
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, int | float):
        return value + 1 if abs(value) < 100 else 1.25
    return value * 2 if isinstance(value, str | bytes) and value else 3


def changed(tree: Any, change: str, dtypes: list[torch.dtype]) -> Any:
    """A description with all plain values, shapes, dtypes or nestings made others."""
    kind, *rest = tree
    if kind == "plain":
        return kind, changed_value(rest[0]) if change == "values" else rest[0]
    if kind == "tensor":
        shape, dtype = rest
        if change == "shapes":
            shape = (shape[0] % 3 + 1, *shape[1:]) if shape else (2,)
        return kind, shape, dtypes[(dtypes.index(dtype) + (change == "dtypes")) % len(dtypes)]
    if change == "nesting":
        pairs = [("list", "tuple"), ("dict", "ordered"), (Pair, Typed), (Record, Other)]
        kind = {a: b for x, y in pairs for a, b in ((x, y), (y, x))}[kind]
    if isinstance(kind, type):
        return (kind, *(changed(item, change, dtypes) for item in rest))
    if isinstance(rest[0], dict):
        return kind, {name: changed(item, change, dtypes) for name, item in rest[0].items()}
    return kind, [changed(item, change, dtypes) for item in rest[0]]


@st.composite
def examples(
    draw: st.DrawFn,
    *,
    shapes: st.SearchStrategy[Any] = SHAPES,
    dtypes: list[torch.dtype] = DTYPES,
    operations: Sequence[str] = tuple(OPERATIONS),
    changes: Sequence[str] = CHANGES,
    steps: int = 1,
    calls: int = 16,
) -> Example:
    """An example whose calls go to one signature or, with a change between, to two."""
    tree = trees(tensors(shapes, dtypes) | tensors(shapes, dtypes) | PLAIN, max_leaves=4)
    args = draw(st.lists(tree, min_size=1, max_size=3))
    kwargs = draw(st.dictionaries(st.sampled_from(["factor", "x", "y", "second"]), tree, max_size=3))
    if len(args) > 1:
        kwargs.pop("second", None)
    if "'tensor'" not in repr((args, kwargs)):
        args[0] = ("list", [args[0], draw(tensors(shapes, dtypes))])
    recipe = draw(recipes(operations, steps))
    signatures = [Signature(args, kwargs)]
    change = draw(st.sampled_from(changes))
    if "torch.float16" in repr((args, kwargs)) or "half" in repr(recipe.steps):
        change = change.replace("autocast", "nothing")  # PyTorch's own, on a CPU, refuses torch.stack of such
    if change != "nothing":
        others = {name: changed(item, change, dtypes) for name, item in kwargs.items()}
        signatures.append(Signature([changed(item, change, dtypes) for item in args], others, change == "autocast"))
    return Example(recipe, tuple(signatures), draw(st.lists(st.integers(0, 9999), min_size=calls, max_size=calls)))
