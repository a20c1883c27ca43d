"""The passes for convolutions: what follows them goes into them, and they into the form that runs fastest."""

from dataclasses import replace as with_changes
from typing import Any

import torch
from torch import fx

from torchaccel.fused import cudnn_plans
from torchaccel.fused.graph import (
    aten,
    is_tensor,
    only_user,
    put,
    put_aten,
    replace,
    same_shape,
    traced,
    weights,
    written_between,
)
from torchaccel.nodes import arguments, calls, pair, value
from torchaccel.program import Program
from torchaccel.weights import WeightRule

_conv_bias_act = torch.ops.torchaccel.conv_bias_act.default
_pad_channels = torch.ops.torchaccel.pad_channels.default


def fuse_convolutions(program: Program) -> int:
    """Convolution + bias [+ residual] + ReLU in one operator, as PyTorch has it of cuDNN; one without bias as it is.

    A depthwise one, and any where cuDNN's own plans can be had, takes in a bare sum and other activations too.
    """
    return sum(_fuse_convolution(program, node) for node in _convolutions(program))


def _convolutions(program: Program) -> list[fx.Node]:
    return calls(program.exported.graph, aten.conv2d.default, aten.conv2d.padding)


def _fuse_convolution(program: Program, conv: fx.Node) -> bool:
    given = arguments(conv)
    padding = _padding(given)
    x, weight, bias = given["input"], given["weight"], given["bias"]
    if padding is None or value(x).dim() != 4 or not value(x).is_floating_point():
        return False
    depthwise = value(weight).shape[1] == 1 and value(weight).shape[0] == given["groups"]
    takes_any = depthwise or cudnn_plans.possible(value(x))
    last, residual, activation = _epilogue(conv, takes_any)
    if activation == "none" and bias is not None and not takes_any:  # left to whoever merges it with what follows
        return False
    if last is not conv and written_between(conv, last):
        return False
    geometry = pair(given["stride"]), padding, pair(given["dilation"]), given["groups"]
    fused = put(program, last, "conv_bias_act", (x, weight, bias, residual, *geometry, activation))
    replace(program, last, fused)
    return True


def _padding(given: dict[str, Any]) -> list[int] | None:
    """The padding of a convolution in numbers; None where it is more on one side than on the other."""
    if given["padding"] == "valid":
        return [0, 0]
    if given["padding"] != "same":
        return pair(given["padding"])
    sizes = [d * (k - 1) for d, k in zip(pair(given["dilation"]), value(given["weight"]).shape[2:], strict=True)]
    return None if any(size % 2 for size in sizes) else [size // 2 for size in sizes]


def _epilogue(conv: fx.Node, takes_any: bool) -> tuple[fx.Node, fx.Node | None, str]:
    """The last node of convolution [+ residual] [+ activation], the residual, and the activation.

    Without `takes_any` only what ends in ReLU counts, which is all that PyTorch has of cuDNN's epilogues.
    """
    named = activation_of if takes_any else _relu
    last, residual = conv, None
    following = only_user(conv)
    if following is not None and (added := _added(following, conv)) is not None:
        last, residual = following, added
    act = only_user(last)
    if act is not None and (activation := named(act)) != "none":
        return act, residual, activation
    return (last, residual, "none") if takes_any else (conv, None, "none")


def _added(add: fx.Node, conv: fx.Node) -> fx.Node | None:
    """What an addition adds to a convolution's result, if it is a tensor of the same shape and nothing is scaled."""
    if add.target is not aten.add.Tensor or arguments(add)["alpha"] != 1:
        return None
    given = arguments(add)
    other = given["other"] if given["self"] is conv else given["self"]
    return other if is_tensor(other) and same_shape(other, conv) else None


def _relu(node: fx.Node) -> str:
    return "relu" if node.target is aten.relu.default else "none"


def activation_of(node: fx.Node) -> str:
    """The name that our operators know a node's activation by, or "none"."""
    names: dict[Any, str] = {
        aten.relu6.default: "relu6",
        aten.silu.default: "silu",
        aten.hardswish.default: "hardswish",
    }
    if node.target is aten.gelu.default:
        return "gelu" if arguments(node)["approximate"] == "none" else "gelu_tanh"
    if node.target is aten.hardtanh.default:
        given = arguments(node)
        return "relu6" if (given["min_val"], given["max_val"]) == (0, 6) else "none"
    return names.get(node.target, _relu(node))


def merge_residual_bias(program: Program) -> int:
    """Add the bias of a convolution that is another's residual to that other's: one is left to be added."""
    done = 0
    for fused in calls(program.exported.graph, _conv_bias_act):
        given = arguments(fused)
        other, names = given["residual"], weights(program)
        if not is_tensor(other) or other.target not in (aten.conv2d.default, aten.conv2d.padding):
            continue
        bias, extra = given["bias"], arguments(other)["bias"]
        own = [node for node in (bias, extra) if node in names and len(node.users) == 1]
        if len(own) < 2 or only_user(other) is not fused:
            continue
        rules = program.rules[names[bias]], program.rules[names[extra]]
        program.rules[names[bias]] = WeightRule((), "sum", value(bias).dtype, parts=rules)
        other.update_arg(2, None)
        _fuse_convolution(program, other)
        done += 1
    return done


def pad_first_channels(program: Program) -> int:
    """Give a convolution of three channels a fourth, of zeros: cuDNN's fast kernels want them in fours or eights.

    Where it reads an input of the program that nothing else reads, that input itself has four from now on: whoever
    calls the program pads it.
    """
    done, names, given = 0, weights(program), program.exported.graph_signature.user_inputs
    for conv in calls(program.exported.graph, _conv_bias_act, aten.conv2d.default, aten.conv2d.padding):
        x, weight = conv.args[0], conv.args[1]
        if not is_tensor(x) or weight not in names or not is_tensor(weight) or arguments(conv)["groups"] != 1:
            continue
        if value(x).dim() != 4 or value(x).shape[1] != 3 or len(weight.users) > 1:
            continue
        program.rules[names[weight]] = with_changes(program.rules[names[weight]], input_channels=4)
        weight.meta["val"] = traced(_pad_channels, (value(weight), 4))
        if x.name in given and only_user(x) is conv:
            x.meta["val"] = traced(_pad_channels, (value(x), 4))
        else:
            conv.args = (put(program, conv, "pad_channels", (x, 4)), *conv.args[1:])
        done += 1
    return done


def lay_out_depthwise(program: Program) -> int:
    """Store depthwise weights as [height, width, channels], so that a thread reads those of its channels at once."""
    done, names = 0, weights(program)
    for conv in calls(program.exported.graph, _conv_bias_act):
        weight = conv.args[1]
        if not is_tensor(weight) or weight not in names or len(weight.users) > 1:
            continue
        if value(weight).shape[1] == 1 and value(weight).shape[0] == arguments(conv)["groups"]:
            program.rules[names[weight]] = with_changes(program.rules[names[weight]], channels_innermost=True)
            done += 1
    return done


def take_patches(program: Program) -> int:
    """A convolution whose windows neither overlap nor leave gaps (ViT's patches) as one matrix product."""
    done = 0
    for conv in _convolutions(program):
        given = arguments(conv)
        x, weight = given["input"], given["weight"]
        kernel = list(value(weight).shape[2:])
        plain = _padding(given) == [0, 0] and pair(given["dilation"]) == [1, 1] and given["groups"] == 1
        if not plain or value(x).dim() != 4 or kernel != pair(given["stride"]) or kernel == [1, 1]:
            continue
        _, _, height, width = value(x).shape
        if not isinstance(height, int) or not isinstance(width, int) or height % kernel[0] or width % kernel[1]:
            continue
        replace(program, conv, _patches_product(conv, x, weight, given["bias"], kernel))
        done += 1
    return done


def _patches_product(conv: fx.Node, x: fx.Node, weight: fx.Node, bias: fx.Node | None, kernel: list[int]) -> fx.Node:
    (kh, kw), channels = kernel, value(x).shape[1]
    height, width = value(x).shape[2] // kh, value(x).shape[3] // kw
    pixels = put_aten(conv, aten.permute.default, x, [0, 2, 3, 1])
    windows = put_aten(conv, aten.reshape.default, pixels, [-1, height, kh, width, kw, channels])
    patches = put_aten(conv, aten.permute.default, windows, [0, 1, 3, 2, 4, 5])
    rows = put_aten(conv, aten.reshape.default, patches, [-1, height, width, kh * kw * channels])
    last = put_aten(conv, aten.permute.default, weight, [0, 2, 3, 1])
    matrix = put_aten(conv, aten.reshape.default, last, [-1, kh * kw * channels])
    product = put_aten(conv, aten.linear.default, rows, matrix, bias)
    return put_aten(conv, aten.permute.default, product, [0, 3, 1, 2])
