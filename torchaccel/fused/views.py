"""What a row of views and copies is of the tensor that it began with: its dimensions split, picked from, reordered."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from torchaccel.fused.graph import aten, put_aten
from torchaccel.nodes import arguments, value


@dataclass(frozen=True)
class _Factor:
    """A factor of a dimension of the base: `size` places, `step` apart; fixed where one of them was selected."""

    dim: int
    size: int
    step: int
    index: int | None = None


class View:
    """A tensor whose every dimension is some factors of the dimensions of a base, the outermost first.

    Unlike strides it can say of what was merged how to split it again, though nothing could be merged in memory.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self._fixed: list[_Factor] = []
        self._dims = [[_Factor(dim, size, 1)] if size != 1 else [] for dim, size in enumerate(sizes)]

    def permute(self, order: Sequence[int]) -> None:
        """Reorder the dimensions."""
        self._dims = [self._dims[dim] for dim in order]

    def select(self, dim: int, index: int) -> None:
        """Take one place of a dimension, which goes; raises ValueError where the dimension was merged."""
        factors = self._dims.pop(dim)
        if len(factors) > 1:
            raise ValueError("what was merged has no single stride to select by")
        self._fixed += [_Factor(factor.dim, factor.size, factor.step, index) for factor in factors]

    def unsqueeze(self, dim: int) -> None:
        """Put in a dimension of one place."""
        self._dims.insert(dim, [])

    def squeeze(self, dim: int) -> None:
        """Take a dimension out if it has one place."""
        if not self._dims[dim]:
            del self._dims[dim]

    def reshape(self, sizes: Sequence[int]) -> None:
        """Split and merge; raises ValueError where a new dimension would begin inside a factor."""
        left = [factor for factors in self._dims for factor in factors]
        self._dims = []
        for size in sizes:
            dim: list[_Factor] = []
            wanted = size
            while wanted > 1:
                factor = left.pop(0)
                common = math.gcd(wanted, factor.size)
                if common not in (wanted, factor.size):
                    raise ValueError("the sizes do not divide each other")
                inner = factor.size // common
                if inner > 1:  # which belongs to what comes next
                    left.insert(0, _Factor(factor.dim, inner, factor.step))
                dim.append(_Factor(factor.dim, common, factor.step * inner))
                wanted //= common
            self._dims.append(dim)

    def rows(self, base: fx.Node) -> Rows | None:
        """The rows along the last dimension; None where that is not what lies innermost, or nothing is reordered."""
        tensor, last = value(base), self._dims[-1]
        strides = tensor.stride()
        memory = sorted(range(tensor.dim()), key=lambda dim: (-strides[dim], dim))
        wanted = [factor for factors in self._dims[:-1] for factor in factors]
        lying = sorted((*wanted, *last), key=lambda factor: (memory.index(factor.dim), -factor.step))
        rows = lying[: len(wanted)]
        if self._fixed or lying[len(wanted) :] != last or rows == wanted:
            return None
        if not tensor.permute(memory).is_contiguous():
            return None
        order = [rows.index(factor) for factor in wanted]
        shape = [math.prod(factor.size for factor in factors) for factors in self._dims[:-1]]
        width = math.prod(factor.size for factor in last)
        return Rows(base, memory, [factor.size for factor in rows], order, shape, width)

    def put(self, base: fx.Node, at: fx.Node) -> fx.Node:
        """The same out of the base by views alone, before `at`; raises ValueError where it takes a copy."""
        dims = [_joined(factors) for factors in self._dims]
        kept = [factor for factors in dims for factor in factors]
        factors = sorted((*kept, *self._fixed), key=lambda factor: (factor.dim, -factor.step))
        node = _reshaped(at, base, [factor.size for factor in factors])
        for place in reversed(range(len(factors))):
            if (index := factors[place].index) is not None:
                node = put_aten(at, aten.select.int, node, place, index)
        order = [factor for factor in factors if factor.index is None]
        node = _permuted(at, node, [order.index(factor) for factor in kept])
        for place, factors in enumerate(dims):
            if not factors:
                node = put_aten(at, aten.unsqueeze.default, node, place)
        return node


def _reshaped(at: fx.Node, node: fx.Node, sizes: list[int]) -> fx.Node:
    return node if list(value(node).shape) == sizes else put_aten(at, aten.reshape.default, node, sizes)


def _permuted(at: fx.Node, node: fx.Node, order: list[int]) -> fx.Node:
    return node if order == sorted(order) else put_aten(at, aten.permute.default, node, order)


def _joined(factors: list[_Factor]) -> list[_Factor]:
    """Neighbours of one dimension as one factor; raises ValueError where more than one is left."""
    joined = factors[:1]
    for factor in factors[1:]:
        outer = joined[-1]
        if outer.dim != factor.dim or outer.step != factor.step * factor.size:
            raise ValueError("a dimension has no single stride")
        joined[-1] = _Factor(outer.dim, outer.size * factor.size, factor.step)
    return joined


_COPIES = (aten.contiguous.default, aten.clone.default)
_STEPS = {
    aten.reshape.default,
    aten.view.default,
    aten.unflatten.int,
    aten.permute.default,
    aten.transpose.int,
    aten.select.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    *_COPIES,
}


def without_copies(node: fx.Node, at: fx.Node) -> fx.Node | None:
    """`node` as a view of what it was copied from, put before `at`; None where nothing was copied, or it has to be."""
    base, row = origin(node)
    view = _followed(base, row) if any(step.target in _COPIES for step in row) else None
    try:
        return None if view is None else view.put(base, at)
    except ValueError:
        return None


@dataclass(frozen=True)
class Rows:
    """The rows of a tensor [..., width] in the order in which they lie in memory, and how that tensor has them."""

    base: fx.Node
    memory: list[int]  # the base's dimensions, the outermost first
    sizes: list[int]
    order: list[int]
    shape: list[int]
    width: int

    def put(self, at: fx.Node) -> fx.Node:
        """Them as a matrix, which is a view of the base."""
        return _reshaped(at, _permuted(at, self.base, self.memory), [math.prod(self.sizes), self.width])

    def restore(self, matrix: fx.Node, at: fx.Node) -> fx.Node:
        """What was computed of each row, in the order and shape that the tensor has."""
        width = value(matrix).shape[1]
        node = _permuted(at, _reshaped(at, matrix, [*self.sizes, width]), [*self.order, len(self.order)])
        return _reshaped(at, node, [*self.shape, width])


def readers(node: fx.Node) -> set[fx.Node]:
    """Who reads a tensor, directly or through views and copies."""
    found: set[fx.Node] = set()
    for user in node.users:
        found |= readers(user) if user.target in _STEPS else {user}
    return found


def rows_in_memory(node: fx.Node) -> Rows | None:
    """The rows of what a row of views and copies gives, where it has them in another order than they lie in memory."""
    base, row = origin(node)
    view = _followed(base, row) if row else None
    return None if view is None else view.rows(base)


def origin(node: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """Where a row of views and copies began, and its steps."""
    row: list[fx.Node] = []
    while node.target in _STEPS:
        row.insert(0, node)
        node = arguments(node)["self"]
    return node, row


def _followed(base: fx.Node, row: Sequence[fx.Node]) -> View | None:
    """What the steps make of the base; None where that cannot be said, or the sizes are not known."""
    sizes = value(base).shape
    if not all(isinstance(size, int) and size for size in sizes):
        return None
    view = View(sizes)
    try:
        for step in row:
            _follow(view, step)
    except ValueError:
        return None
    return view


def _follow(view: View, step: fx.Node) -> None:
    given = arguments(step)
    target, dims = step.target, value(step.args[0]).dim()
    if target is aten.permute.default:
        view.permute([dim % dims for dim in given["dims"]])
    elif target is aten.transpose.int:
        order = list(range(dims))
        a, b = given["dim0"] % dims, given["dim1"] % dims
        order[a], order[b] = b, a
        view.permute(order)
    elif target is aten.select.int:
        view.select(given["dim"] % dims, given["index"])
    elif target is aten.unsqueeze.default:
        view.unsqueeze(given["dim"] % (dims + 1))
    elif target is aten.squeeze.dim:
        view.squeeze(given["dim"] % dims)
    elif target not in _COPIES:
        view.reshape(value(step).shape)
