"""A captured program, its weights apart from it."""

import copy
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from torchaccel.quiet import quiet
from torchaccel.signature import OutputSpec
from torchaccel.weights import WeightRule, WeightStore


@dataclass
class Program:
    """What was captured: flat tensors in, a tuple of tensors out, every operator in the precision it computes in.

    Its weights have shapes and dtypes but no values until `take_weights`.
    """

    exported: ExportedProgram
    rules: dict[str, WeightRule]
    outputs: OutputSpec
    inputs: tuple[torch.Tensor, ...]  # examples: dtypes, device and, where static, shapes of what an engine takes
    batch: tuple[int, int, int] | None = None
    batched: tuple[bool, ...] = ()  # which inputs have the batch as their first dimension
    folded: int = 0
    channels_last: bool = False
    operators: Counter[str] = field(default_factory=Counter)

    def shapes(self, index: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The smallest, the optimal and the largest shape of an input; all the same where it is static."""
        shape = tuple(self.inputs[index].shape)
        if self.batch is None or not self.batched[index]:
            return shape, shape, shape
        low, best, high = self.batch
        return (low, *shape[1:]), (best, *shape[1:]), (high, *shape[1:])

    @property
    def convolutional(self) -> bool:
        """Whether it has 2-D convolutions, which PyTorch's own kernels run faster in channels-last."""
        return any(name.startswith("aten.conv2d") for name in self.operators)

    @property
    def in_fp32(self) -> set[str]:
        """The operators that compute in float32, such as "conv2d": some may, also where the precision is another."""
        calls = [node for node in self.exported.graph.nodes if node.op == "call_function"]
        wide = [node for node in calls if getattr(node.meta.get("val"), "dtype", None) is torch.float32]
        return {str(node.target).split(".")[1] for node in wide if isinstance(node.target, torch._ops.OpOverload)}

    def take_weights(self, store: WeightStore, module: nn.Module, *, channels_last: bool = False) -> None:
        """Put the store's tensors in the place of the captured ones: folded, cast, and shared with other engines."""
        self.channels_last = channels_last and self.convolutional
        self.rules = {name: replace(rule, channels_last=self.channels_last) for name, rule in self.rules.items()}
        for name, tensor in zip(self.rules, store.get(self.rules.values(), module), strict=True):
            put_weight(self.exported, name, tensor)

    def copy(self) -> "Program":
        """A program for another backend to rewrite, on the same examples; cheap before it has its weights."""
        with quiet(), torch.inference_mode(False), torch.no_grad():  # PyTorch 2.11 warns of its own deprecations
            exported = copy.deepcopy(self.exported)
        return replace(self, exported=exported, rules=dict(self.rules), operators=Counter(self.operators))

    def size_bytes(self) -> int:
        """The memory that its weights take."""
        weights = [_held(self.exported, name)[name] for name in self.rules]
        return sum(weight.numel() * weight.element_size() for weight in weights)

    def drop_weights(self) -> None:
        """Keep the shapes and dtypes of weights and examples and let their memory go."""
        drop_weights(self.exported, self.rules)
        self.drop_examples()

    def drop_examples(self) -> None:
        """Keep the shapes and dtypes of the examples and let their memory go."""
        self.inputs = tuple(tensor.to("meta") for tensor in self.inputs)


def count_operators(graph: torch.fx.Graph) -> Counter[str]:
    """How often each operator stands in a graph, by its full name, such as `aten.conv2d.default`."""
    return Counter(
        str(node.target)
        for node in graph.nodes
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)
    )


def _held(exported: ExportedProgram, name: str) -> dict[str, Any]:
    """Where a program keeps a weight: non-persistent buffers are among its constants."""
    return exported.state_dict if name in exported.state_dict else exported.constants


def drop_weights(exported: ExportedProgram, names: Iterable[str]) -> None:
    """Put tensors without values in the place of these weights."""
    for name in names:
        put_weight(exported, name, _held(exported, name)[name].detach().to("meta"))


def put_weight(exported: ExportedProgram, name: str, tensor: torch.Tensor) -> None:
    """Give a weight of a program its value."""
    held = _held(exported, name)
    is_parameter = isinstance(held[name], nn.Parameter)
    held[name] = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
