"""Rows of views and copies drawn at random: what they are of the tensor that they began with."""

import math
import random
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests.fused.programs import check
from tests.helpers import Lambda, captured
from torchaccel.fused.graph import aten, put_aten, replace, tidy
from torchaccel.fused.views import View, rows_in_memory, without_copies
from torchaccel.nodes import value

SHAPE = (4, 6, 1, 8)
ROWS_DRAWN = 60


def step(draw: random.Random, x: torch.Tensor) -> torch.Tensor:  # noqa: PLR0911
    """One view of a tensor, or a copy."""
    kind = draw.choice(["permute", "split", "merge", "select", "unsqueeze", "squeeze", "copy", "turn"])
    dim = draw.randrange(x.dim())
    size = x.shape[dim]
    if kind == "permute":
        return x.permute(draw.sample(range(x.dim()), x.dim()))
    if kind == "split" and size > 1 and (parts := [part for part in range(2, size + 1) if size % part == 0]):
        return x.unflatten(dim, (size // (part := draw.choice(parts)), part))
    if kind == "merge" and x.dim() > 1:
        return x.reshape(*x.shape[: dim - 1], -1, *x.shape[dim + 1 :]) if dim else x.reshape(-1, *x.shape[2:])
    if kind == "select" and x.dim() > 2:
        return x.select(dim, draw.randrange(size))
    if kind == "unsqueeze" and x.dim() < 6:
        return x.unsqueeze(dim)
    if kind == "squeeze" and x.dim() > 1:
        return x.squeeze(dim)
    if kind == "turn" and x.dim() > 1:
        return x.transpose(dim, -1)
    return x.contiguous()


class Rows(nn.Module):
    """As many rows of steps, each from the product of an input."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        results = []
        for seed in range(ROWS_DRAWN):
            draw, y = random.Random(seed), x * (seed + 1)
            for _ in range(draw.randint(2, 7)):
                y = step(draw, y)
            results.append(y * 2)
        return tuple(results)


@torch.no_grad()
def test_a_row_without_its_copies_is_the_same_tensor() -> None:
    module, x = Rows().eval(), torch.randn(SHAPE)
    program = captured(module, x)
    graph, found = program.exported.graph, Counter[str]()
    for last in [node for node in graph.nodes if node.target is aten.mul.Tensor and node.args[1] == 2]:
        copied = last.args[0]
        view = without_copies(copied, last)
        found["viewed" if view is not None else "left"] += 1
        if view is not None:
            assert value(view).shape == value(copied).shape
            last.replace_input_with(copied, view)
    tidy(program)
    assert min(found["viewed"], found["left"]) >= 5
    check(program, module, x)


@torch.no_grad()
def test_rows_in_memory_are_those_of_the_tensor_in_another_order() -> None:
    module, x = Rows().eval(), torch.randn(SHAPE)
    program = captured(module, x)
    found: Counter[str] = Counter()
    for last in [node for node in program.exported.graph.nodes if node.target is aten.mul.Tensor and node.args[1] == 2]:
        rows = rows_in_memory(last.args[0]) if value(last).dim() > 1 else None
        found["moved" if rows is not None else "left"] += 1
        if rows is not None:
            matrix = rows.put(last)
            assert list(value(matrix).shape) == [math.prod(rows.sizes), value(last).shape[-1]]
            doubled = put_aten(last, aten.mul.Tensor, matrix, 2)
            replace(program, last, rows.restore(doubled, last))
    tidy(program)
    assert min(found["moved"], found["left"]) >= 5
    check(program, module, x)


@pytest.mark.parametrize(("sizes", "wanted"), [((6, 4), (4, 6)), ((4, 6), (3, 8)), ((4, 6), (2, 3, 4))])
def test_a_dimension_that_begins_inside_a_factor_is_refused(sizes: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="do not divide"):
        View(sizes).reshape(wanted)


LAST: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], bool]] = {
    "a dimension turned in itself": (
        lambda y: y.unflatten(1, (2, 3)).transpose(1, 2).contiguous().reshape(4, 6, 8),
        False,
    ),
    "factors of two dimensions": (
        lambda y: y[:, :, :2].contiguous().unflatten(0, (2, 2)).permute(0, 3, 1, 2).reshape(4, 2, 6),
        False,
    ),
    "nothing copied": (lambda y: y.transpose(0, 1), False),
    "counted from the end": (lambda y: y.select(-1, -2).unsqueeze(-1).transpose(-3, -2).contiguous(), True),
}


@torch.no_grad()
@pytest.mark.parametrize("name", LAST)
def test_a_copy_goes_where_a_view_stands_for_it(name: str) -> None:
    function, goes = LAST[name]
    module, x = Lambda(lambda m, x: function(x * 3) * 2), torch.randn(4, 6, 8)
    program = captured(module, x)
    (doubled,) = program.exported.graph.output_node().all_input_nodes
    (copied,) = doubled.all_input_nodes
    view = without_copies(copied, doubled)
    assert (view is not None) == goes
    if view is not None:
        doubled.replace_input_with(copied, view)
    check(program, module, x)
