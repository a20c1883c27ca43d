"""What the passes share: reading the operators of a program, and putting others in their place."""

import operator
from collections.abc import Iterator, Sequence
from typing import Any, TypeGuard

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from torchaccel.fused import operators  # noqa: F401 - importing it is what makes them
from torchaccel.nodes import value
from torchaccel.prepare import drop_unused_weights, weight_nodes
from torchaccel.program import Program

aten = torch.ops.aten


def is_tensor(node: Any) -> TypeGuard[fx.Node]:
    """Whether an argument is a node that gives one tensor."""
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)


def same_shape(a: Any, b: Any) -> bool:
    """Whether two nodes give tensors of one shape and dtype, whatever the batch."""
    a, b = value(a), value(b)
    if a.dtype != b.dtype or a.dim() != b.dim():
        return False
    return all(statically_known_true(x == y) for x, y in zip(a.shape, b.shape, strict=True))


def only_user(node: fx.Node) -> fx.Node | None:
    """The node that alone reads this one, once."""
    users = list(node.users)
    return users[0] if len(users) == 1 and _reads(users[0], node) == 1 else None


def _reads(user: fx.Node, node: fx.Node) -> int:
    count = 0

    def look(argument: fx.Node) -> fx.Node:
        nonlocal count
        count += argument is node
        return argument

    fx.map_arg((user.args, user.kwargs), look)
    return count


def mutates(node: fx.Node) -> bool:
    """Whether an operator writes to one of its arguments; what is no operator may."""
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return False
    schema = getattr(node.target, "_schema", None)
    return schema is None or schema.is_mutable


def written_between(first: fx.Node, last: fx.Node) -> bool:
    """Whether anything is written between two nodes: reading later what the first reads would then be wrong."""
    node = first.next
    while node is not last:
        if mutates(node):
            return True
        node = node.next
    return False


def put(program: Program, at: fx.Node, name: str, args: Sequence[Any]) -> fx.Node:
    """An operator of ours before `at`, with what it gives traced on the shapes of its arguments."""
    graph = program.exported.graph
    with graph.inserting_before(at):
        target: Any = getattr(torch.ops.torchaccel, name).default
        node = graph.call_function(target, tuple(args))
    given = fx.map_arg(tuple(args), lambda argument: argument.meta["val"])
    node.meta = {key: at.meta[key] for key in ("stack_trace", "nn_module_stack") if key in at.meta}
    node.meta["val"] = traced(target, given)
    return node


def put_aten(at: fx.Node, target: Any, *args: Any) -> fx.Node:
    """One of PyTorch's operators before `at`, traced likewise."""
    with at.graph.inserting_before(at):
        node = at.graph.call_function(target, args)
    node.meta["val"] = traced(target, fx.map_arg(args, lambda argument: argument.meta["val"]))
    return node


def traced(target: Any, given: Any) -> Any:
    """What an operator gives for tensors without values: in the fake mode of those, where they have one."""
    modes = [tensor.fake_mode for tensor in _tensors(given) if isinstance(tensor, torch._subclasses.FakeTensor)]
    if not modes:
        return target(*given)
    with modes[0], torch.no_grad():
        return target(*given)


def _tensors(given: Any) -> Iterator[torch.Tensor]:
    for argument in given:
        if isinstance(argument, torch.Tensor):
            yield argument
        elif isinstance(argument, (list, tuple)):
            yield from _tensors(argument)


def replace(program: Program, old: fx.Node, new: fx.Node) -> None:
    """Let everything that reads `old`, the program's outputs among them, read `new`; what only `old` needs goes."""
    old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    if new.op == "call_function":  # an output that is an input has another kind of specification
        program.exported.graph_signature.replace_all_uses(old.name, new.name)
    _erase(program.exported.graph, old)


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    inputs = node.all_input_nodes
    graph.erase_node(node)
    for source in inputs:
        if source.op == "call_function" and not source.users and _is_pure(source):
            _erase(graph, source)


def weights(program: Program) -> dict[fx.Node, str]:
    """The nodes of weights with the names of their rules."""
    return {node: str(spec.target) for spec, node in weight_nodes(program.exported)}


def tidy(program: Program) -> None:
    """Drop what nothing reads any more, and the rules of weights that are gone."""
    graph = program.exported.graph
    for node in reversed(graph.nodes):
        if node.op == "call_function" and not node.users and _is_pure(node):
            graph.erase_node(node)
    drop_unused_weights(program.exported)
    kept = set(weights(program).values())
    program.rules = {name: rule for name, rule in program.rules.items() if name in kept}
    graph.lint()


def _is_pure(node: fx.Node) -> bool:
    """Whether an operator that nothing reads can go."""
    if mutates(node):
        return False
    namespace = getattr(node.target, "namespace", "")
    return namespace == "torchaccel" or (namespace == "aten" and not str(node.target).startswith("aten._assert"))
