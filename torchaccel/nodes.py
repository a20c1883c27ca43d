"""Reading the operators of a captured program."""

from typing import Any

import torch
from torch import fx


def arguments(node: fx.Node) -> dict[str, Any]:
    """An operator's arguments by name, defaults filled in."""
    target: Any = node.target
    values = {}
    for index, argument in enumerate(target._schema.arguments):
        if index < len(node.args):
            values[argument.name] = node.args[index]
        else:
            values[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return values


def calls(graph: fx.Graph, *targets: Any) -> list[fx.Node]:
    """The calls of these operators, in the order in which they run."""
    return [node for node in graph.nodes if node.op == "call_function" and node.target in targets]


def value(node: Any) -> torch.Tensor:
    """The shape, dtype and layout that a node was traced with."""
    return node.meta["val"]


def pair(numbers: Any) -> list[int]:
    """A number for each of height and width, where one may stand for both."""
    numbers = [numbers] if isinstance(numbers, int) else list(numbers)
    return numbers * 2 if len(numbers) == 1 else numbers
