"""A captured program in plain values: every operator with all its arguments, and the weights by content.

What is no plain value, and is not known here, is refused rather than abbreviated: a key must not leave anything out.
"""

import hashlib
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, SymIntArgument, TensorArgument

from torchaccel.prepare import WEIGHT_KINDS
from torchaccel.program import Program

# Operators whose meaning follows from the versions of PyTorch and torchvision, and from our own code.
NAMESPACES = ("aten", "prims", "torchvision", "torchaccel")
MODULES = ("_operator", "builtins", "math", "torch")
_WORDS = (torch.dtype, torch.layout, torch.memory_format)
_TENSORS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


class NoKeyError(Exception):
    """A program holds something that no key says; the message names it."""


def program_key(program: Program, *, values: bool = True) -> dict[str, Any]:
    """What an engine of the program depends on, but for the machine; raises `NoKeyError` where that cannot be said.

    Without `values`, weights count by dtype and layout alone, as they do for an engine's speed.
    """
    exported = program.exported
    signature = exported.graph_signature
    nodes = {node.name: number for number, node in enumerate(exported.graph.nodes)}
    return {
        "graph": _graph(exported.graph_module),
        "inputs": [
            [spec.kind.name, spec.target, _argument(spec.arg, nodes), _content_of(exported, spec, values)]
            for spec in signature.input_specs
        ],
        "outputs": [[spec.kind.name, spec.target, _argument(spec.arg, nodes)] for spec in signature.output_specs],
        "shapes": [list(program.shapes(index)) for index in range(len(program.inputs))],
        "dtypes": [str(tensor.dtype) for tensor in program.inputs],
        "batch": [program.batch, list(program.batched)],
        "ranges": [[str(name), str(held.lower), str(held.upper)] for name, held in exported.range_constraints.items()],
    }


def content(tensor: torch.Tensor) -> str:
    """The SHA-256 of a tensor's values, bit for bit, in row-major order."""
    if tensor.is_meta or tensor.layout is not torch.strided or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        kind = type(tensor).__name__
        raise NoKeyError(f"a tensor without plain values (a {kind} of layout {tensor.layout} on {tensor.device})")
    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    # what has one element is contiguous with any strides, and `view` asks for 1
    raw = flat.as_strided((flat.numel(),), (1,)).view(torch.uint8)
    return hashlib.sha256(raw.numpy().data).hexdigest()


def _content_of(exported: ExportedProgram, spec: Any, values: bool) -> str | None:
    if spec.kind not in _TENSORS or (spec.kind in WEIGHT_KINDS and not values):
        return None
    tensor = exported.state_dict.get(spec.target)
    return content(exported.constants[spec.target] if tensor is None else tensor)


def _argument(argument: Any, nodes: dict[str, int]) -> Any:
    """Which node an input or output of the program is, or which value."""
    if isinstance(argument, TensorArgument | SymIntArgument):
        return nodes[argument.name]
    if isinstance(argument, ConstantArgument):
        return "constant", _value(argument.value, {})
    raise NoKeyError(f"an argument of the program that is a {type(argument).__name__}")


def _graph(module: fx.GraphModule) -> list[Any]:
    """Every node: what it does, with which arguments, nodes by their number, and what it gives."""
    numbers = {node: number for number, node in enumerate(module.graph.nodes)}
    return [
        [
            node.op,
            _target(module, node),
            [_value(item, numbers) for item in node.args],
            [[name, _value(item, numbers)] for name, item in sorted(node.kwargs.items())],
            _result(node.meta.get("val")),
        ]
        for node in module.graph.nodes
    ]


def _target(module: fx.GraphModule, node: fx.Node) -> Any:
    target: Any = node.target
    if node.op in ("placeholder", "output"):
        return None
    if node.op == "get_attr":
        return _attribute(operator.attrgetter(target)(module), target)
    if isinstance(target, torch._ops.OpOverload) and target.namespace in NAMESPACES:
        return str(target)
    if isinstance(target, torch._ops.HigherOrderOperator):
        return "higher_order", target.name()
    if node.op == "call_function" and getattr(target, "__module__", "") in MODULES:
        return target.__module__, target.__qualname__
    raise NoKeyError(f"the operator {target}, whose meaning no version of PyTorch fixes")


def _attribute(held: Any, name: str) -> Any:
    if isinstance(held, torch.Tensor):
        return content(held)
    if isinstance(held, fx.GraphModule):
        return _graph(held)
    raise NoKeyError(f"the attribute {name!r}, a {type(held).__name__}")


def _value(value: Any, numbers: dict[fx.Node, int]) -> Any:
    """An argument: plain values as they are, everything else as a tuple that begins with what it is."""
    if isinstance(value, fx.Node):
        return "node", numbers[value]
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, list | tuple):
        items = [_value(item, numbers) for item in value]
        return items if isinstance(value, list) else ("tuple", items)
    if isinstance(value, dict):
        return "dict", [[_value(name, numbers), _value(item, numbers)] for name, item in value.items()]
    if isinstance(value, slice):
        return "slice", [_value(item, numbers) for item in (value.start, value.stop, value.step)]
    return _word(value)


def _word(value: Any) -> Any:
    if isinstance(value, _WORDS):
        return type(value).__name__, str(value)
    if isinstance(value, torch.device):
        return "device", value.type  # any GPU of the kind that the key names
    if isinstance(value, complex):
        return "complex", value.real, value.imag
    raise NoKeyError(f"an operator's argument that is a {type(value).__name__}")


def _result(value: Any) -> Any:
    """What a node gives: of a tensor its dtype, sizes, strides and kind of device."""
    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided:
            raise NoKeyError(f"a tensor of layout {value.layout}")
        return "tensor", str(value.dtype), _sizes(value.shape), _sizes(value.stride()), value.device.type
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return "symbol", str(value)
    if isinstance(value, list | tuple):
        return [_result(item) for item in value]
    return _value(value, {})


def _sizes(sizes: Sequence[Any]) -> list[Any]:
    return [size if type(size) is int else str(size) for size in sizes]
