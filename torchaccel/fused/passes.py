"""The passes: each rewrites a captured program into an equal one that runs faster, and says how often it did.

They go by the flow of data alone, so a network in functional style is rewritten like one of nested modules. Each is
exact up to the rounding of one operator, and can be left out: `rewrite(program, passes)`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from torchaccel.fused.convolutions import (
    fuse_convolutions,
    lay_out_depthwise,
    merge_residual_bias,
    pad_first_channels,
    take_patches,
)
from torchaccel.fused.graph import aten, is_tensor, put, put_aten, replace, same_shape, tidy
from torchaccel.fused.operators import OPAQUE
from torchaccel.fused.transformers import (
    choose_attention,
    drop_full_masks,
    fuse_linears,
    keep_rows,
    merge_linears,
    skip_copies,
)
from torchaccel.layouts import settle_layouts
from torchaccel.nodes import arguments, calls, pair, value
from torchaccel.program import Program

Pass = Callable[[Program], int]

_IN_PLACE: dict[Any, Any] = {
    aten.relu_.default: aten.relu.default,
    aten.hardtanh_.default: aten.hardtanh.default,
    aten.relu6_.default: aten.relu6.default,
    aten.silu_.default: aten.silu.default,
    aten.hardswish_.default: aten.hardswish.default,
    aten.add_.Tensor: aten.add.Tensor,
    aten.mul_.Tensor: aten.mul.Tensor,
    aten.dropout_.default: aten.dropout.default,
}
# Operators whose result is new memory that nothing else refers to.
_FRESH = {
    *_IN_PLACE.values(),
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.batch_norm.default,
    aten.linear.default,
    aten.max_pool2d.default,
    aten.avg_pool2d.default,
    aten.sub.Tensor,
    aten.cat.default,
    aten.layer_norm.default,
} - {aten.dropout.default}


def write_out_of_place(program: Program) -> int:
    """Turn operators that write to their input into ones that return a new tensor, where that is the same.

    It is where the input is fresh memory and nothing that ran before the write can be a view of it: then whoever
    reads it later reads what was written.
    """
    done = 0
    for node in calls(program.exported.graph, *_IN_PLACE):
        x = node.args[0]
        if not is_tensor(x) or x.target not in _FRESH or not _keeps_dtype(node):
            continue
        order = {other: index for index, other in enumerate(program.exported.graph.nodes)}
        users = [user for user in x.users if user is not node]
        if any(order[user] < order[node] and user.target not in _FRESH for user in users):
            continue
        later = [user for user in users if order[user] > order[node]]
        node.target = _IN_PLACE[node.target]
        for user in later:
            user.replace_input_with(x, node)
            if user.op == "output":
                program.exported.graph_signature.replace_all_uses(x.name, node.name)
        done += 1
    return done


def _keeps_dtype(node: fx.Node) -> bool:
    """Whether a new tensor would have the dtype of the one written to: a wider operand widens it."""
    dtype = value(node).dtype
    return all(torch.result_type(value(node), value(x)) is dtype for x in node.all_input_nodes if is_tensor(x))


def drop_no_ops(program: Program) -> int:
    """Drop dropout, and casts to the dtype that is there already."""
    done = 0
    for node in calls(program.exported.graph, aten.dropout.default, aten.to.dtype, aten.detach.default):
        given = arguments(node)
        x = next(iter(given.values()))
        needed = given.get("train") or given.get("copy") or given.get("memory_format") is not None
        read_by_writers = any(user.target in _IN_PLACE or user.op == "output" for user in node.users)
        if needed or not same_shape(x, node) or read_by_writers:
            continue
        replace(program, node, x)
        done += 1
    return done


def let_views_copy(program: Program) -> int:
    """Views that copy where the layout asks for it: those behind convolutions are no longer the ones traced."""
    return settle_layouts(program.exported)


def replace_max_pools(program: Program) -> int:
    """Max-pooling by a kernel of ours: PyTorch's channels-last one takes four times what the memory allows."""
    done = 0
    for pool in calls(program.exported.graph, aten.max_pool2d.default):
        given = arguments(pool)
        x = given["self"]
        if value(x).dim() != 4 or not value(x).is_floating_point():
            continue
        kernel = pair(given["kernel_size"])
        stride = pair(given["stride"]) if given["stride"] else kernel
        geometry = kernel, stride, pair(given["padding"]), pair(given["dilation"])
        replace(program, pool, put(program, pool, "max_pool2d", (x, *geometry, bool(given["ceil_mode"]))))
        done += 1
    return done


def replace_means(program: Program) -> int:
    """The mean over height and width, where what gives them is an operator of ours, which nothing else fuses with."""
    done = 0
    for node in calls(program.exported.graph, aten.adaptive_avg_pool2d.default, aten.mean.dim):
        given = arguments(node)
        x = given["self"]
        if not is_tensor(x) or x.target not in OPAQUE or value(x).dim() != 4 or value(node).dtype != value(x).dtype:
            continue
        if node.target is aten.mean.dim:
            keep = given["keepdim"]
            if not given["dim"] or sorted(dim % 4 for dim in given["dim"]) != [2, 3]:
                continue
        else:
            keep = True
            if pair(given["output_size"]) != [1, 1]:
                continue
        mean = put(program, node, "mean_pixels", (x,))
        if keep:
            mean = put_aten(node, aten.unsqueeze.default, put_aten(node, aten.unsqueeze.default, mean, -1), -1)
        replace(program, node, mean)
        done += 1
    return done


PASSES: tuple[Pass, ...] = (
    write_out_of_place,
    drop_no_ops,
    let_views_copy,
    take_patches,
    fuse_convolutions,
    merge_residual_bias,
    pad_first_channels,
    lay_out_depthwise,
    replace_max_pools,
    replace_means,
    merge_linears,
    keep_rows,
    skip_copies,
    drop_full_masks,
    choose_attention,
    keep_rows,  # once more, since the layout of what attention gives is known now
    fuse_linears,
)


def rewrite(program: Program, passes: Sequence[Pass] = PASSES) -> dict[str, int]:
    """Run the passes on a program that has no weights yet; returns how often each found something."""
    counts: dict[str, int] = {}
    for run in passes:
        counts[run.__name__] = counts.get(run.__name__, 0) + run(program)
    tidy(program)
    return counts
