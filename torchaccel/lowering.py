"""What a backend cannot take, or takes slowly, written in other operators, before a program has its weights."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from torchaccel.nodes import arguments, calls, pair, value
from torchaccel.prepare import CONVOLUTIONS, weight_nodes
from torchaccel.weights import WeightRule

aten = torch.ops.aten

FEW_CHANNELS = 4
SMALL_WINDOW = 3
CHANNELS_AT_ONCE = 8  # a Tensor Core kernel loads 16 bytes at once


def decompose_hardswish(program: ExportedProgram) -> None:
    """Write x·clamp(x+3, 0, 6)/6 for HardSwish in bfloat16.

    TensorRT's ONNX parser refuses it, and what Torch-TensorRT makes of it gives NaN on TensorRT-RTX 1.4 (measured).
    """
    graph = program.graph
    for node in list(graph.nodes):
        if node.target not in (aten.hardswish.default, aten.hardswish_.default):
            continue
        x: Any = node.args[0]
        in_place_seen = node.target is aten.hardswish_.default and len(x.users) > 1
        if node.meta["val"].dtype is not torch.bfloat16 or in_place_seen:
            continue
        with graph.inserting_before(node):
            shifted = graph.call_function(aten.add.Tensor, (x, 3.0))
            clamped = graph.call_function(aten.clamp.default, (shifted, 0.0, 6.0))
            product = graph.call_function(aten.mul.Tensor, (x, clamped))
            result = graph.call_function(aten.div.Tensor, (product, 6.0))
        for step in (shifted, clamped, product, result):
            step.meta = dict(node.meta)
        node.replace_all_uses_with(result)
        graph.erase_node(node)
    program.graph_module.recompile()


def widen_depthwise(program: ExportedProgram, rules: dict[str, WeightRule]) -> None:
    """Compute depthwise convolutions of a bfloat16 program in float32; their inputs and results stay bfloat16.

    TensorRT-RTX 1.4 builds them in bfloat16 and then cannot compile their kernels on the GPU (measured on Hopper).
    They are bound by memory, and their weights, which are few, are not rounded then.
    """
    weights = {node: str(spec.target) for spec, node in weight_nodes(program)}
    for conv in [node for node in program.graph.nodes if node.target in CONVOLUTIONS]:
        parameters: list[Any] = [node for node in conv.args[1:3] if node is not None]
        groups = conv.args[6] if len(conv.args) > 6 else 1
        if groups == 1 or parameters[0].meta["val"].shape[1] != 1 or conv.meta["val"].dtype is not torch.bfloat16:
            continue
        if any(node not in weights or len(node.users) > 1 for node in parameters):
            continue
        for node in parameters:
            rules[weights[node]] = replace(rules[weights[node]], dtype=torch.float32)
            node.meta["val"] = node.meta["val"].float()
        _cast_around(program.graph, conv, torch.float32)
    program.graph_module.recompile()


def _cast_around(graph: fx.Graph, node: fx.Node, dtype: torch.dtype) -> None:
    """Cast the first argument of a node to `dtype`, and its result back."""
    x: Any = node.args[0]
    value = node.meta["val"]
    with graph.inserting_before(node):
        wide = graph.call_function(aten.to.dtype, (x, dtype))
    wide.meta = {**x.meta, "val": x.meta["val"].to(dtype)}
    node.args = (wide, *node.args[1:])
    with graph.inserting_after(node):
        narrow = graph.call_function(aten.to.dtype, (node, value.dtype))
    narrow.meta = dict(node.meta)
    node.meta = {**node.meta, "val": value.to(dtype)}
    node.replace_all_uses_with(narrow, delete_user_cb=lambda user: user is not narrow)


def space_to_depth(program: ExportedProgram) -> None:
    """Compute a 2-D convolution of even stride on few channels, as a first layer is, as one of stride 1 on more.

    Each block of stride × stride pixels becomes one that has the channels of all; the kernel is laid out likewise,
    filled up with zeros, by operators on the weight, which stays as it is. Exact up to the order of the additions.
    TensorRT-RTX 1.4 has slow kernels for three channels: of ResNet-18's 0.84 ms at batch 32 in fp16 the first layer
    took 0.46 ms, and takes 0.15 ms so (measured on an H200). With windows of 3×3 nothing is gained: MobileNetV3-L took
    2 % longer.
    """
    graph = program.graph
    for conv in calls(graph, aten.conv2d.default):
        given = arguments(conv)
        x, weight, paddings, strides = given["input"], given["weight"], pair(given["padding"]), pair(given["stride"])
        shape, kernel, stride = value(x).shape, value(weight).shape, strides[0]
        if len(shape) != 4 or stride % 2 or stride != strides[1] or shape[1] > FEW_CHANNELS or given["groups"] != 1:
            continue
        if pair(given["dilation"]) != [1, 1] or not all(isinstance(size, int) for size in (*shape[1:], *kernel)):
            continue
        if max(kernel[2:]) <= SMALL_WINDOW:
            continue
        more = -shape[1] % (CHANNELS_AT_ONCE // math.gcd(CHANNELS_AT_ONCE, stride * stride))
        kernel_fill = [-size % stride for size in kernel[2:]]
        ends = [
            stride * (size - 1) + taken + fill - before - padding
            for size, taken, fill, before, padding in zip(
                value(conv).shape[2:], kernel[2:], kernel_fill, shape[2:], paddings, strict=True
            )
        ]
        if min(ends) < 0:  # pixels at the end that no kernel reaches
            continue
        with graph.inserting_before(conv):
            x = _unshuffled(graph, x, [paddings[1], ends[1], paddings[0], ends[0], 0, more], stride)
            weight = _unshuffled(graph, weight, [0, kernel_fill[1], 0, kernel_fill[0], 0, more], stride)
        conv.args, conv.kwargs = (x, weight, given["bias"]), {}
    program.graph_module.recompile()


def _unshuffled(graph: fx.Graph, x: Any, fill: list[int], stride: int) -> fx.Node:
    """A tensor filled up with zeros, its blocks of pixels as channels."""
    size, channels, height, width = value(x).shape
    channels, height, width = channels + sum(fill[4:]), height + sum(fill[2:4]), width + sum(fill[:2])
    shape = (size, channels * stride * stride, height // stride, width // stride)
    if any(fill):
        x = _call(graph, aten.constant_pad_nd.default, (x, fill), (size, channels, height, width))
    return _call(graph, aten.pixel_unshuffle.default, (x, stride), shape)


def _call(graph: fx.Graph, operator: Any, args: tuple[Any, ...], shape: tuple[Any, ...]) -> fx.Node:
    """A step that returns a tensor of that shape, like its first argument; to run it for that would fix the batch."""
    step = graph.call_function(operator, args)
    step.meta = {**args[0].meta, "val": value(args[0]).new_empty(shape)}
    return step
