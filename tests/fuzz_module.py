"""A small module that computes what a recipe says, whatever it is given.

Values are positive and of few bits, and what rounding could flip (a comparison, a cast to integers) is computed from
exact values alone: then a small relative error is due in every precision, and a larger one is a bug.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tests.trees import leaves_of, make, nesting

Step = tuple[str, int, int]


@dataclass(frozen=True)
class Recipe:
    """What a module computes: steps, each on tensors that are there, and what it returns of them."""

    steps: tuple[Step, ...]
    result: Any


class Drawn(nn.Module):
    """Finds the tensors and numbers among its arguments, computes what the recipe says and nests the results."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 12).reshape(4, 3))
        self.register_buffer("offset", torch.tensor([0.25]))
        self.recipe = recipe

    def forward(self, first: Any, second: Any = 0.5, *rest: Any, factor: Any = 2, **named: Any) -> Any:
        given = leaves_of((first, second, rest, factor, named))
        inputs = [leaf for leaf in given if isinstance(leaf, torch.Tensor)]
        numbers = [abs(leaf) for leaf in given if type(leaf) in (int, float, bool) and 0.25 <= abs(leaf) <= 4]
        pool = [(tensor, True) for tensor in inputs]
        steps = []
        for name, i, j in self.recipe.steps:
            candidates = [tensor for tensor, exact in pool if exact or name not in DISCRETE]
            a, b = candidates[i % len(candidates)], pool[j % len(pool)][0]
            exact = (name in KEEPS_EXACT and any(a is tensor for tensor, exact in pool if exact)) or name in DISCRETE
            steps.append(OPERATIONS[name](self, a, b, (numbers or [1.0])[j % len(numbers or [1.0])]))
            pool.append((steps[-1], exact or not steps[-1].is_floating_point()))

        def leaf(kind: str, index: int = 0) -> Any:
            if kind == "input":
                return inputs[index % len(inputs)]
            if kind == "step":
                return steps[index % len(steps)]
            if kind == "given":
                plain = [item for item in given if not isinstance(item, torch.Tensor)]
                return plain[index % len(plain)] if plain else None
            return nesting((first, second, rest, factor, named)) if kind == "seen" else inputs[0] * self.scale

        return make(self.recipe.result, leaf)


def _reduced(a: torch.Tensor) -> torch.Tensor:
    """The mean of floating values; a small sum of others, which no precision rounds."""
    along = -1 if a.dim() else ()
    return a.mean(along) if a.is_floating_point() else a.sum(along).clamp(max=64)


def _matrix_product(module: Drawn, a: torch.Tensor) -> torch.Tensor:
    if not a.dim():
        return a * module.offset
    a = a[..., :4].to(module.weight.dtype)
    return a @ module.weight[: a.shape[-1]]


def _stepped(a: torch.Tensor) -> torch.Tensor:
    """ReLU, shifted to where the values are."""
    return torch.relu(a - 1) if a.is_floating_point() else ~a


def _in_place(y: torch.Tensor) -> torch.Tensor:
    """Writes to a computed tensor and to a view of it."""
    y += 1
    if y.dim():
        y[..., :1].mul_(2)
    return y


def _expanded(a: torch.Tensor) -> torch.Tensor:
    return a.unsqueeze(0).expand(2, *a.shape) if a.dim() < 6 else a[:1]


OPERATIONS: dict[str, Callable[[Drawn, torch.Tensor, torch.Tensor, Any], torch.Tensor]] = {
    "scale": lambda m, a, b, n: a * m.scale,
    "times": lambda m, a, b, n: a * n,
    "shift": lambda m, a, b, n: a + m.offset,
    "add": lambda m, a, b, n: a + _reduced(b.reshape(-1)),
    "matrix product": lambda m, a, b, n: _matrix_product(m, a),
    "stack": lambda m, a, b, n: torch.stack([a, a * m.scale]),
    "cat": lambda m, a, b, n: torch.cat([a.reshape(-1)[:9], b.reshape(-1)[:9], m.offset]),
    "reduce": lambda m, a, b, n: _reduced(a),
    "arange": lambda m, a, b, n: a + torch.arange(a.shape[-1] if a.dim() else 1, device=a.device),
    "wide": lambda m, a, b, n: a.to(torch.float64),
    "single": lambda m, a, b, n: a.to(torch.float32),
    "half": lambda m, a, b, n: a.to(torch.float16),
    "integer": lambda m, a, b, n: (a * 8).to(torch.int64),
    "compare": lambda m, a, b, n: a > 1,
    "where": lambda m, a, b, n: torch.where(a > 1, a, a + a),
    "step": lambda m, a, b, n: _stepped(a),
    "masked": lambda m, a, b, n: a.masked_fill(a > 1, 1),
    "look up": lambda m, a, b, n: nn.functional.embedding((a * 8).long() % 4, m.weight),
    "in place": lambda m, a, b, n: _in_place(a * m.scale),
    "running sum": lambda m, a, b, n: a.cumsum(0) if a.dim() else a.cumsum(-1),
    "largest": lambda m, a, b, n: a.max() if a.numel() else a,
    "weight": lambda m, a, b, n: m.weight,
    "buffer": lambda m, a, b, n: m.offset,
    "constant": lambda m, a, b, n: torch.ones(2, device=a.device) if n == 1 else torch.full_like(a, 3),
    "halves": lambda m, a, b, n: a.reshape(-1).chunk(2)[-1],
    "transpose": lambda m, a, b, n: a.transpose(0, -1),
    "flatten": lambda m, a, b, n: a.reshape(-1),
    "part": lambda m, a, b, n: a[..., :2] if a.dim() else a.unsqueeze(0),
    "rest": lambda m, a, b, n: a[1:] if a.dim() else a.unsqueeze(0),
    "expand": lambda m, a, b, n: _expanded(a),
    "flip": lambda m, a, b, n: a.flip(0) if a.dim() else a,
    "contiguous": lambda m, a, b, n: a.contiguous(),
    "clone": lambda m, a, b, n: a.clone(),
}
DISCRETE = {"integer", "compare", "where", "step", "masked", "look up"}
KEEPS_EXACT = {"transpose", "flatten", "part", "rest", "expand", "flip", "contiguous", "clone", "wide", "single"}
COMPUTES = {"scale", "shift", "add", "stack", "cat", "arange", "in place"}  # a new tensor in every precision
SAME_OBJECT = {
    "contiguous",
    "flip",
    "wide",
    "single",
    "half",
    "largest",
}  # hand the operand back in some precisions or layouts
