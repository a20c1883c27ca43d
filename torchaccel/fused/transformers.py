"""The passes for attention and matrix products: no copies between them, and what follows a product goes into it."""

from collections import defaultdict
from typing import Any

import torch
from torch import fx

from torchaccel.fused import cudnn_plans
from torchaccel.fused.convolutions import activation_of
from torchaccel.fused.graph import (
    aten,
    is_tensor,
    mutates,
    only_user,
    put,
    put_aten,
    replace,
    traced,
    weights,
    written_between,
)
from torchaccel.fused.views import origin, readers, rows_in_memory, without_copies
from torchaccel.nodes import arguments, calls, value
from torchaccel.program import Program
from torchaccel.weights import WeightRule

_ATTENTION = aten.scaled_dot_product_attention.default
LEAST_PRODUCTS = 1 << 24  # multiplications below which a matrix product is all launch


def merge_linears(program: Program) -> int:
    """Linear layers of one input that only attention reads (queries, keys, values) as one, of all their rows."""
    graph, names = program.exported.graph, weights(program)
    if any(mutates(node) for node in graph.nodes):
        return 0
    alike: dict[Any, list[fx.Node]] = defaultdict(list)
    for linear in calls(graph, aten.linear.default):
        given = arguments(linear)
        own = [node for node in (given["weight"], given["bias"]) if node is not None]
        is_own = all(node in names and len(node.users) == 1 for node in own)
        if is_own and _only_attended(readers(linear), linear):
            alike[given["input"], len(own)].append(linear)
    groups = [group for group in alike.values() if len(group) > 1]
    for group in groups:
        _merge(program, group, names)
    return len(groups)


def _only_attended(read: set[fx.Node], linear: fx.Node) -> bool:
    """Whether attention alone reads a linear layer, and not as its mask."""
    if any(reader.target is not _ATTENTION for reader in read):
        return False
    masks = [arguments(reader)["attn_mask"] for reader in read]
    return not any(mask is not None and origin(mask)[0] is linear for mask in masks)


def _merge(program: Program, group: list[fx.Node], names: dict[fx.Node, str]) -> None:
    """One linear layer in the place of the first, with parts of its result for the results of all."""
    given, start = [arguments(linear) for linear in group], 0
    for name in ("weight", "bias"):
        nodes = [one[name] for one in given if one[name] is not None]
        if nodes:
            rules = tuple(program.rules[names[node]] for node in nodes)
            program.rules[names[nodes[0]]] = WeightRule((), "rows", value(nodes[0]).dtype, parts=rules)
            nodes[0].meta["val"] = traced(torch.cat, ([value(node) for node in nodes],))
    merged = put_aten(group[0], aten.linear.default, *(given[0][name] for name in ("input", "weight", "bias")))
    for linear in group:
        end = start + value(linear).shape[-1]
        replace(program, linear, put_aten(linear, aten.slice.Tensor, merged, -1, start, end))
        start = end


def skip_copies(program: Program) -> int:
    """Let attention read what its queries, keys and values were copied from: its kernels take any strides.

    `nn.MultiheadAttention` copies all three, right behind the product that gives them.
    """
    graph = program.exported.graph
    if any(mutates(node) for node in graph.nodes):
        return 0
    done = 0
    for node in calls(graph, _ATTENTION):
        given = arguments(node)
        views = [without_copies(given[name], node) for name in ("query", "key", "value")]
        for index, view in enumerate(views):
            if view is not None and value(view).stride(-1) == 1:
                node.update_arg(index, view)
                done += 1
    return done


def keep_rows(program: Program) -> int:
    """Let linear layers take the rows of their input as they lie in memory, and what reads them reorder the results.

    `nn.MultiheadAttention` turns [batch, sequence] into [sequence, batch] and back: then neither is a copy. Not where
    there is more to reorder then, unless attention reads it, which does not mind.
    """
    graph = program.exported.graph
    if any(mutates(node) for node in graph.nodes):
        return 0
    done = 0
    for linear in calls(graph, aten.linear.default):
        rows = rows_in_memory(arguments(linear)["input"])
        if rows is None:
            continue
        grows = value(linear).shape[-1] > rows.width
        if grows and any(reader.target is not _ATTENTION for reader in readers(linear)):
            continue
        product = put_aten(linear, aten.linear.default, rows.put(linear), *linear.args[1:])
        replace(program, linear, rows.restore(product, linear))
        done += 1
    return done


def drop_full_masks(program: Program) -> int:
    """Drop masks that are computed of nothing given and hide nothing, as BERT's without padding: they cost a kernel."""
    graph = program.exported.graph
    if any(mutates(node) for node in graph.nodes):  # such as one that fills a part of a mask
        return 0
    given = [(node, arguments(node)["attn_mask"]) for node in calls(graph, _ATTENTION)]
    masks = [(node, mask) for node, mask in given if mask is not None and value(mask).dtype == torch.bool]
    constants = _constants(graph, [mask for _, mask in masks])
    full = [node for node, mask in masks if mask in constants and bool(constants[mask].all())]
    for node in full:
        node.update_arg(3, None)
    return len(full)


def _constants(graph: fx.Graph, wanted: list[fx.Node]) -> dict[fx.Node, torch.Tensor]:
    """The values, computed on the CPU, of these nodes and what they are made of, but for what inputs or weights are in.

    Each node is looked at once: that of a mask may be all of a network.
    """
    needed, found = set(wanted), dict[fx.Node, torch.Tensor]()
    for node in reversed(graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    for node in graph.nodes:
        if node in needed and all(source in found for source in node.all_input_nodes):
            computed = _computed(node, found)
            if computed is not None:
                found[node] = computed
    return found


def _computed(node: fx.Node, given: dict[fx.Node, torch.Tensor]) -> torch.Tensor | None:
    """The value of an operator for given ones; None where it gives no tensor, or not always the same."""
    target: Any = node.target
    is_random = torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())
    if node.op != "call_function" or is_random or not is_tensor(node):
        return None
    args, kwargs = fx.map_arg((node.args, node.kwargs), given.__getitem__)
    kwargs = {key: torch.device("cpu") if key == "device" else argument for key, argument in kwargs.items()}
    try:
        return target(*args, **{**kwargs, "pin_memory": False} if "pin_memory" in kwargs else kwargs)
    except (RuntimeError, TypeError, ValueError):  # a size that is not known yet, of a dynamic batch
        return None


def choose_attention(program: Program) -> int:
    """Scaled dot-product attention by whichever of PyTorch's kernels is the fastest for these shapes and strides.

    Its result is laid out as its queries are, so that what undoes their permutation has nothing to copy.
    """
    done = 0
    for node in calls(program.exported.graph, _ATTENTION):
        given = arguments(node)
        tensors = [given[name] for name in ("query", "key", "value")]
        if given["dropout_p"] or given["enable_gqa"] or any(value(tensor).dim() != 4 for tensor in tensors):
            continue
        order = _order(value(tensors[0])) if program.batch is None else [0, 2, 1, 3]
        args = (*tensors, given["attn_mask"], bool(given["is_causal"]), given["scale"], order)
        replace(program, node, put(program, node, "attention", args))
        done += 1
    return done


def _order(query: torch.Tensor) -> list[int]:
    """The dimensions of a tensor from the outermost in memory to the innermost, which is the last one always."""
    strides = query.stride()
    return [*sorted(range(3), key=lambda dim: (-strides[dim], dim)), 3]


def fuse_linears(program: Program) -> int:
    """A linear layer and the activation behind it in one operator, where cuDNN's plans can be had for it."""
    done = 0
    for linear in calls(program.exported.graph, aten.linear.default):
        given = arguments(linear)
        x, weight, bias = given["input"], given["weight"], given["bias"]
        if (
            program.batch is not None
            or not is_tensor(weight)
            or value(weight).dim() != 2
            or not cudnn_plans.possible(value(x))
        ):
            continue
        if not _is_large(value(linear), value(weight)):
            continue
        last, activation = linear, "none"
        act = only_user(linear)
        if act is not None and not written_between(linear, act) and (found := activation_of(act)) != "none":
            last, activation = act, found
        # Rows beforehand: a copy that this takes is then not the operator's, and can be merged with what gives x.
        rows = put_aten(last, aten.reshape.default, x, [-1, value(x).shape[-1]])
        product = put(program, last, "linear_act", (rows, weight, bias, activation))
        replace(program, last, put_aten(last, aten.reshape.default, product, list(value(last).shape)))
        done += 1
    return done


def _is_large(y: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether there is enough to compute for one kernel to be faster than another."""
    channels = weight.shape[1]
    aligned = channels % 8 == 0 and weight.shape[0] % 8 == 0
    return aligned and y.numel() * channels >= LEAST_PRODUCTS
