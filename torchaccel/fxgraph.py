"""Dynamo's graphs: which of their inputs are weights, and whether an engine can stand for them."""

import copy
import re
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from torchaccel.fingerprint import fingerprint
from torchaccel.signature import PLAIN, why_not_dense


def placeholders(graph: fx.GraphModule) -> list[fx.Node]:
    """The nodes of a graph's inputs, in order."""
    return [node for node in graph.graph.nodes if node.op == "placeholder"]


def weight_places(graph: fx.GraphModule, examples: Sequence[Any]) -> list[int]:
    """Which inputs of a graph are weights that it uses: parameters, and other tensors that a module holds.

    Dynamo passes them like any input; its own record of where each came from tells buffers from a call's arguments.
    """
    pairs = zip(placeholders(graph), examples, strict=True)
    return [place for place, (node, example) in enumerate(pairs) if node.users and _is_weight(node, example)]


def _is_weight(node: fx.Node, example: Any) -> bool:
    if isinstance(example, nn.Parameter):
        return True
    source = getattr(node, "_dynamo_source", None)
    return isinstance(example, torch.Tensor) and source is not None and source.guard_source.is_unspecialized_nn_module()


def with_weights(graph: fx.GraphModule, places: Sequence[int], weights: Sequence[torch.Tensor]) -> fx.GraphModule:
    """The graph as a module that owns `weights`, those very objects, and takes the other inputs only."""
    module = fx.GraphModule(graph, copy.deepcopy(graph.graph), class_name=traced_name(graph))
    nodes = placeholders(module)
    for place, weight in zip(places, weights, strict=True):
        node = nodes[place]
        put_weight(module, node.name, weight)
        with module.graph.inserting_before(node):
            node.replace_all_uses_with(module.graph.get_attr(node.name))
        module.graph.erase_node(node)
    _inline_checkpoints(module.graph)
    for node in module.graph.nodes:
        for name in ("example_value", "grapharg"):  # Dynamo's fake tensors, and its links to real ones
            node.meta.pop(name, None)
    module.recompile()
    return module


def _inline_checkpoints(graph: fx.Graph) -> None:
    """Call what torch.utils.checkpoint wraps, which means the same without gradients; torch.export refuses the wrap."""
    for node in list(graph.nodes):
        if node.target is torch.ops.higher_order.tag_activation_checkpoint:
            body: Any = node.args[0]
            with graph.inserting_before(node):
                node.replace_all_uses_with(graph.call_module(body.target, node.args[1:]))
            graph.erase_node(node)


def put_weight(module: nn.Module, name: str, weight: torch.Tensor) -> None:
    """Make `weight` itself, no copy, the module's parameter or buffer of that name."""
    if isinstance(weight, nn.Parameter):
        module.register_parameter(name, weight)
    else:
        module.register_buffer(name, weight)


def traced_name(graph: fx.GraphModule) -> str:
    """Where the code of a graph stands, such as "forward (model.py, line 12)"."""
    for node in graph.graph.nodes:
        if found := re.search(r'File "(.*)", line (\d+), in (\S+)', node.stack_trace or ""):
            return f"{found[3]} ({PurePath(found[1]).name}, line {found[2]})"
    return "a graph"


def why_no_engine(graph: fx.GraphModule) -> str:
    """What the graph itself shows to be beyond engines; empty where nothing is."""
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    for node in graph.graph.nodes:
        is_item = node.op == "call_method" and node.target == "item"
        if is_item or any(map(free_unbacked_symbols, _values(node, torch.Tensor, torch.SymInt, torch.SymFloat))):
            return (
                f"it reads the value of a tensor on the host ({node.name}); a Python float that changes from call to "
                f"call is one too: pass it as a tensor"
            )
    ends = [*placeholders(graph), *graph.graph.output_node().all_input_nodes]
    devices = sorted({str(tensor.device) for node in ends for tensor in _values(node, torch.Tensor)})
    return f"its tensors are on several devices ({', '.join(devices)})" if len(devices) > 1 else ""


def _values(node: fx.Node, *kinds: type) -> list[Any]:
    """What Dynamo found a node to be: its fake tensors and symbols of some types."""
    return [leaf for leaf in pytree.tree_leaves(node.meta.get("example_value")) if isinstance(leaf, kinds)]


class _Traces(NamedTuple):
    """What a run can leave behind besides its outputs: versions and bits of its tensors, states of the generators."""

    tensors: list[tuple[int | None, list[list[int]]]]
    generators: list[Any]


class Observed(NamedTuple):
    """What one run of a graph returned, and what it did besides.

    `why_no_engine` is what no engine does; empty where there is nothing. `untracked` are the places of the inputs, or
    weights, that it writes to without a step of their version counters.
    """

    outputs: Any
    why_no_engine: str
    untracked: tuple[int, ...]


def observe(graph: fx.GraphModule, args: Sequence[Any]) -> Observed:
    """Run a graph once, as it is, and look at what it does.

    Observed and not derived, since operators do not declare all that they do: batch_norm writes to running statistics
    without a word in its schema or a step of their version counters.
    """
    problems = [_beyond_engines(arg) for arg in args]
    places = [place for place, arg in enumerate(args) if isinstance(arg, torch.Tensor) and not problems[place]]
    tensors = [args[place] for place in places]
    before = _traces(tensors)
    outputs = graph(*args)
    after = _traces(tensors)
    changes = zip(places, before.tensors, after.tensors, strict=True)
    written = {place: old[0] == new[0] for place, old, new in changes if old != new}
    untracked = tuple(place for place, same_version in written.items() if same_version)
    names = [node.name for node in placeholders(graph)]
    if any(problems):
        why = next(f"its input {name} is {problem}" for name, problem in zip(names, problems, strict=True) if problem)
    elif written:
        why = f"it writes to its inputs or weights ({', '.join(names[place] for place in written)})"
    elif before.generators != after.generators:
        why = "it draws random numbers"
    else:
        why = _why_not_outputs(outputs, tensors)
    return Observed(outputs, why, untracked)


def _beyond_engines(arg: Any) -> str:
    if not isinstance(arg, torch.Tensor):
        return "" if isinstance(arg, PLAIN) else f"a {type(arg).__qualname__}"
    if type(arg) not in (torch.Tensor, nn.Parameter):
        return f"a {type(arg).__qualname__}, a kind of tensor of its own"
    return why_not_dense(arg)


def _traces(tensors: Sequence[torch.Tensor]) -> _Traces:
    versions = [None if tensor.is_inference() else tensor._version for tensor in tensors]
    plain = [tensor.detach().resolve_conj().resolve_neg() for tensor in tensors]
    bits = [[part.tolist() for part in fingerprint([tensor])] for tensor in plain]
    gpus = {tensor.device for tensor in tensors if tensor.is_cuda}
    generators = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, gpus)]
    return _Traces(list(zip(versions, bits, strict=True)), [state.tolist() for state in generators])


def _why_not_outputs(outputs: Any, tensors: Sequence[torch.Tensor]) -> str:
    """What of the outputs an engine would not give: memory that is shared, gradients, other kinds of tensors."""
    computed = {id(leaf): leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)}
    if not computed:
        return "it computes no tensor"
    for output in computed.values():
        if problem := _beyond_engines(output):
            return f"an output is {problem}"
        if output.requires_grad:
            return "it enables gradients itself"
    returned = [at for tensor in computed.values() if (at := tensor.untyped_storage().data_ptr())]  # 0: no memory
    given = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    if len(set(returned)) < len(returned) or given.intersection(returned):
        return "an output shares memory with an input, a weight or another output, and engines give copies"
    return ""
