"""Programs rewritten by passes, for tests: what is in them, and that they compute what the module does, on a CPU."""

from collections import Counter
from typing import Any

import torch
from torch import nn

from tests.helpers import captured, relative_error
from torchaccel.backends.fused import Fused
from torchaccel.fused.passes import PASSES, rewrite
from torchaccel.precision import PRECISIONS
from torchaccel.program import Program
from torchaccel.weights import WeightStore

CPU = torch.device("cpu")
FP32 = PRECISIONS["fp32"]


def lowered(module: nn.Module, *inputs: torch.Tensor, run: Any = PASSES, **options: Any) -> Program:
    """The program of a module, rewritten by these passes."""
    program = captured(module, *inputs, **options)
    rewrite(program, run)
    return program


def operators(program: Program) -> Counter[str]:
    """How often each operator stands in a program, by its short name."""
    nodes = [node for node in program.exported.graph.nodes if node.op == "call_function"]
    return Counter(str(node.target).rsplit(".", 1)[0].removeprefix("aten.") for node in nodes)


@torch.no_grad()
def check(program: Program, module: nn.Module, *inputs: torch.Tensor) -> None:
    """The rewritten program computes what the module does, to fp32's rounding, in the layout that it is served in."""
    program.take_weights(WeightStore(), module, channels_last=True)
    backend = Fused(passes=())
    engine = backend.load(backend.build(program, FP32, CPU), CPU)
    results = engine(*(engine.input_buffer(index, tensor) for index, tensor in enumerate(inputs)))
    expected = module(*inputs)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for result, wanted in zip(results, expected, strict=True):
        assert result.shape == wanted.shape
        assert relative_error(result, wanted) < 2e-6
