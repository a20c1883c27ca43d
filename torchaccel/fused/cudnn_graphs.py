"""A convolution with what follows it as cuDNN's graph API takes it, for tensors of fp16 and bf16 with sums in fp32."""

from dataclasses import dataclass
from typing import Any

import torch

from torchaccel.fused.geometry import Geometry

ACTIVATIONS = ("none", "relu", "relu6", "silu", "gelu", "gelu_tanh")
DTYPES = (torch.float16, torch.bfloat16)
# By these numbers a plan is given its tensors.
X, WEIGHT, BIAS, RESIDUAL, Y = range(1, 6)


@dataclass(frozen=True)
class Problem:
    """A convolution with what follows it: all that its plans depend on. Every tensor is channels-last."""

    x: tuple[int, ...]
    weight: tuple[int, ...]
    geometry: Geometry
    bias: bool
    residual: bool
    activation: str
    dtype: torch.dtype
    device: torch.device

    @property
    def y(self) -> tuple[int, int, int, int]:
        """The output's shape."""
        return self.geometry.output(self.x, self.weight)


def operations(problem: Problem, handle: int | None) -> Any:
    """cuDNN's graph of the problem, validated; without a handle it needs no GPU."""
    import cudnn

    io = cudnn.data_type.HALF if problem.dtype is torch.float16 else cudnn.data_type.BFLOAT16
    graph = cudnn.pygraph(
        name="torchaccel_convolution",
        io_data_type=io,
        intermediate_data_type=cudnn.data_type.FLOAT,
        compute_data_type=cudnn.data_type.FLOAT,
        handle=handle,
    )

    def tensor(uid: int, shape: tuple[int, ...]) -> Any:
        return graph.tensor(dim=list(shape), stride=_strides(shape), data_type=io, uid=uid)

    y = graph.conv_fprop(
        image=tensor(X, problem.x),
        weight=tensor(WEIGHT, problem.weight),
        pre_padding=list(problem.geometry.padding),
        post_padding=list(problem.geometry.padding),
        stride=list(problem.geometry.stride),
        dilation=list(problem.geometry.dilation),
    )
    if problem.bias:
        y = graph.bias(input=y, bias=tensor(BIAS, (1, problem.y[1], 1, 1)))
    if problem.residual:
        y = graph.add(a=y, b=tensor(RESIDUAL, problem.y))
    y = _activate(graph, y, problem.activation)
    y.set_output(True).set_data_type(io).set_dim(list(problem.y)).set_stride(_strides(problem.y)).set_uid(Y)
    graph.validate()
    graph.build_operation_graph()
    return graph


def _activate(graph: Any, y: Any, activation: str) -> Any:
    if activation == "relu":
        return graph.relu(input=y)
    if activation == "relu6":
        return graph.relu(input=y, lower_clip=0.0, upper_clip=6.0)
    if activation == "silu":
        return graph.mul(a=y, b=graph.sigmoid(input=y))
    if activation == "gelu":
        return graph.gelu(input=y)
    if activation == "gelu_tanh":
        return graph.gelu_approx_tanh(input=y)
    return y


def _strides(shape: tuple[int, ...]) -> list[int]:
    """Channels-last, also where a dimension of one leaves PyTorch's own strides open."""
    _, channels, height, width = shape
    return [height * width * channels, 1, width * channels, channels]
