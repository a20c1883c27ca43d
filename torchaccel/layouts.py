"""Programs that mean the same in any layout: they are traced on contiguous tensors and run on channels-last ones."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from torchaccel.nodes import arguments
from torchaccel.prepare import aten

# What gives a view in one layout may have to copy in another; `view` itself then fails.
_ROUNDABOUT: dict[Any, Any] = {
    aten.view.default: aten.reshape.default,
    aten.view_as.default: aten.reshape_as.default,
}
_MAY_COPY = {
    *_ROUNDABOUT,
    *_ROUNDABOUT.values(),
    aten.flatten.using_ints,
    aten.ravel.default,
    aten.contiguous.default,
}
_BY_STRIDES = {aten.as_strided.default, aten.view.dtype, aten.view_as_complex.default}
# What may return its own input, though its schema does not say so.
_UNDECLARED = {
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.feature_alpha_dropout.default,
    aten.type_as.default,
}
# In a program, which draws no random numbers, they write nothing, though their schemas say so.
_INERT = {
    aten.dropout_.default,
    aten.feature_dropout_.default,
    aten.alpha_dropout_.default,
    aten.feature_alpha_dropout_.default,
}


def settle_layouts(program: ExportedProgram) -> int:
    """Let views copy where the layout asks for it; returns how many places were changed.

    A copy is as good as a view where nothing of its memory is written afterwards. Where something is, or strides are
    counted, the memory is brought into the layout that was traced right where it begins.
    """
    graph = program.graph
    memory, written = _memory(graph)
    pinned, done = dict[fx.Node, None](), 0
    for place, node in enumerate(graph.nodes):
        if node.target in _BY_STRIDES:
            pinned |= dict.fromkeys(memory[node])
        elif node.target in _MAY_COPY or (_asks_for_layout(node) and memory[node] != [node]):
            later = [root for root in memory[node] if written.get(root, -1) > place]
            pinned |= dict.fromkeys(later)
            if not later and node.target in _ROUNDABOUT:
                node.target = _ROUNDABOUT[node.target]
                done += 1
    return done + sum(_pin(program, root) for root in pinned)


def _asks_for_layout(node: fx.Node) -> bool:
    """Whether an operator is given a memory format, as a cast may be: it copies in one layout and not in another."""
    return any(isinstance(argument, torch.memory_format) for argument in (*node.args, *node.kwargs.values()))


def _memory(graph: fx.Graph) -> tuple[dict[fx.Node, list[fx.Node]], dict[fx.Node, int]]:
    """For each node the nodes whose memory it may give, and for each of those the place of the last write to it."""
    memory: dict[fx.Node, list[fx.Node]] = {}
    written: dict[fx.Node, int] = {}
    for place, node in enumerate(graph.nodes):
        shared = [root for source, _ in _shared(node, memory) for root in memory[source]]
        memory[node] = list(dict.fromkeys(shared)) or [node]
        for source, is_write in _shared(node, memory):
            if is_write:
                written |= dict.fromkeys(memory[source], place)
    return memory, written


def _shared(node: fx.Node, memory: dict[fx.Node, list[fx.Node]]) -> Iterator[tuple[fx.Node, bool]]:
    """The arguments that share memory with what a node gives, and whether it writes to them."""
    target: Any = node.target
    schema = getattr(target, "_schema", None)
    if node.op != "call_function":
        return
    if schema is None:  # one of several results: fresh, unless all are views
        yield from ((source, False) for source in node.all_input_nodes if memory[source] != [source])
        return
    for index, (argument, given) in enumerate(zip(schema.arguments, arguments(node).values(), strict=True)):
        if argument.alias_info is None and not (target in _UNDECLARED and index == 0):
            continue
        is_write = argument.alias_info is not None and argument.alias_info.is_write and target not in _INERT
        for source in given if isinstance(given, list | tuple) else [given]:
            if isinstance(source, fx.Node):
                yield source, is_write


def _pin(program: ExportedProgram, root: fx.Node) -> bool:
    """Have all that read a tensor read it in the layout that was traced, if that is contiguous."""
    traced = root.meta.get("val")
    if not isinstance(traced, torch.Tensor) or not traced.is_contiguous():
        return False
    before = root.next
    while before.op == "placeholder":  # they stay together
        before = before.next
    with program.graph.inserting_before(before):
        settled = program.graph.call_function(aten.contiguous.default, (root,))
    settled.meta = {"val": traced}
    is_input = root.op == "placeholder"  # as an output it would have another kind of specification
    root.replace_all_uses_with(
        settled, delete_user_cb=lambda user: user is not settled and not (is_input and user.op == "output")
    )
    if not is_input:
        program.graph_signature.replace_all_uses(root.name, settled.name)
    return True
