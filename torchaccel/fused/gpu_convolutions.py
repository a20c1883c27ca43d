"""Convolutions on a GPU: for each problem the fastest of PyTorch's, cuDNN's and Triton's kernels."""

import functools
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from torchaccel.fused import cudnn_plans, triton_depthwise, triton_linear, triton_stem
from torchaccel.fused.choice import Run, choose
from torchaccel.fused.cudnn_graphs import Problem
from torchaccel.fused.geometry import Geometry
from torchaccel.fused.reference import ACTIVATIONS
from torchaccel.fused.tensors import channels_last, empty, key_of, tf32

DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # of cuDNN's and Triton's kernels
LEAST_PRODUCTS = 1 << 22  # multiplications below which a convolution is all launch: no plans are searched for it


@dataclass(frozen=True)
class Convolution:
    """One call: activation(conv2d(x, weight) + bias + residual), x and residual channels-last."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    residual: torch.Tensor | None
    geometry: Geometry
    activation: str

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The output's."""
        return self.geometry.output(self.x.shape, self.weight.shape)

    @property
    def is_large(self) -> bool:
        """Whether there is enough to compute for a search."""
        return math.prod(self.shape) * self.weight[0].numel() >= LEAST_PRODUCTS

    @property
    def is_product(self) -> bool:
        """Whether it is a matrix product of its pixels, 1×1 and nothing else."""
        return tuple(self.weight.shape[2:]) == (1, 1) and self.geometry == Geometry()

    def pixels(self) -> torch.Tensor:
        """The input as a matrix: a row for each pixel."""
        return self.x.permute(0, 2, 3, 1).reshape(-1, self.x.shape[1])

    def matrix(self) -> torch.Tensor:
        """The weight of a 1×1 convolution as a linear layer's."""
        return self.weight.reshape(len(self.weight), -1)

    def image(self, rows: torch.Tensor) -> torch.Tensor:
        """The output from its pixels, one in each row."""
        batch, _, height, width = self.shape
        return rows.view(batch, height, width, -1).permute(0, 3, 1, 2)


def conv_bias_act(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
) -> torch.Tensor:
    """activation(conv2d(x, weight) + bias + residual), channels-last."""
    residual = None if residual is None else channels_last(residual)
    geometry = Geometry.of(stride, padding, dilation, groups)
    call = Convolution(channels_last(x), weight, bias, residual, geometry, activation)
    present = bias is not None, residual is not None
    problem = ("conv", key_of(call.x), key_of(weight), present, geometry, activation, tf32(x))
    found = candidates(call)
    return found[choose(problem, found)]()


def candidates(call: Convolution) -> dict[str, Run]:
    """What may be the fastest for a problem, PyTorch's own operators first.

    Depthwise ones are Triton's: cuDNN's take two to ten times as long. Where all of cuDNN's plans are timed with what
    follows the convolution in them, PyTorch need not time those that it has.
    """
    tiles = _tiles(call)
    planned = not tiles and call.is_large and cudnn_plans.takes(call.x, call.activation)
    timed = not tiles and call.is_large and not planned
    found: dict[str, Run] = {"aten": functools.partial(aten, call, timed)}
    found |= {f"triton {tile}": functools.partial(depthwise, call, tile) for tile in tiles}
    if tiles:
        return found
    if call.activation == "relu" and call.x.dtype in DTYPES:
        found["cudnn"] = functools.partial(cudnn, call, timed)
    if call.is_product:
        found["matmul"] = functools.partial(matmul, call)
        if call.residual is None and call.is_large and triton_linear.takes(call.x, call.weight, call.activation):
            found |= {tiles.name: functools.partial(triton_product, call, tiles) for tiles in triton_linear.TILES}
    if call.residual is None and call.is_large and triton_stem.takes(call.x, call.weight, call.geometry):
        found |= {f"triton {tile}": functools.partial(stem, call, tile) for tile in triton_stem.TILES}
    if planned:
        found["plan"] = functools.partial(plan, call)
    return found


def aten(call: Convolution, timed: bool = False) -> torch.Tensor:
    """By PyTorch's operators; `timed` as in `_cudnn`."""
    with _cudnn(timed):
        geometry = call.geometry
        y = functional.conv2d(
            call.x, call.weight, call.bias, geometry.stride, geometry.padding, geometry.dilation, geometry.groups
        )
    if call.residual is not None:
        y += call.residual
    return channels_last(ACTIVATIONS[call.activation](y))


def cudnn(call: Convolution, timed: bool = False) -> torch.Tensor:
    """By PyTorch's fused convolutions, whose activation is ReLU."""
    x, weight, bias, residual, where = call.x, call.weight, call.bias, call.residual, call.geometry
    geometry = where.stride, where.padding, where.dilation, where.groups
    with _cudnn(timed):
        if residual is None:
            y = torch.cudnn_convolution_relu(x, weight, bias, *geometry)
        else:
            y = torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *geometry)
    return channels_last(y)


def plan(call: Convolution) -> torch.Tensor:
    """By the fastest of cuDNN's plans; they are timed the first time, and `choose` runs nothing new in a capture."""
    x, weight, bias, residual = call.x, channels_last(call.weight), call.bias, call.residual
    shapes = tuple(x.shape), tuple(weight.shape)
    present = bias is not None, residual is not None
    problem = Problem(*shapes, call.geometry, *present, call.activation, x.dtype, x.device)
    return cudnn_plans.run(problem, (x, weight, bias, residual), functools.partial(aten, call))


def depthwise(call: Convolution, tile: triton_depthwise.Tile) -> torch.Tensor:
    """A channel by itself, by Triton."""
    y, tensors = empty(call.x, call.shape), (call.x, call.weight, call.bias, call.residual)
    return triton_depthwise.depthwise(*tensors, y, call.geometry, call.activation, tile)


def _tiles(call: Convolution) -> list[triton_depthwise.Tile]:
    """Those worth timing; none where it is not depthwise, or not for Triton."""
    groups = call.geometry.groups
    if not call.x.shape[1] == len(call.weight) == groups or call.x.dtype not in DTYPES:
        return []
    _, _, rows, columns = call.weight.shape
    return triton_depthwise.tiles(call.shape, call.x.dtype, (rows, columns))


def stem(call: Convolution, tile: triton_stem.Tile) -> torch.Tensor:
    """A network's first convolution, by Triton."""
    tensors = call.x, channels_last(call.weight), call.bias
    return triton_stem.stem(*tensors, empty(call.x, call.shape), call.geometry, call.activation, tile)


def matmul(call: Convolution) -> torch.Tensor:
    """A 1×1 convolution of channels-last tensors is one matrix product, with bias and ReLU in its epilogue."""
    pixels, matrix, bias = call.pixels(), call.matrix(), call.bias
    if bias is not None and call.activation == "relu" and call.residual is None:
        return call.image(torch._addmm_activation(bias, pixels, matrix.t()))
    y = functional.linear(pixels, matrix, bias)
    if call.residual is not None:
        y += call.residual.permute(0, 2, 3, 1).reshape(y.shape)
    return call.image(ACTIVATIONS[call.activation](y))


def triton_product(call: Convolution, tiles: triton_linear.Tiles) -> torch.Tensor:
    """The same product with any activation in its epilogue."""
    pixels, matrix = call.pixels(), call.matrix()
    y = pixels.new_empty(len(pixels), len(matrix))
    return call.image(triton_linear.linear(pixels, matrix, call.bias, y, call.activation, tiles))


_flags = threading.RLock()


@contextmanager
def _cudnn(timed: bool) -> Iterator[None]:
    """Have cuDNN give the same bits at every run, and, `timed`, time its plans for a problem that it sees first.

    Otherwise its heuristic is trusted. The flags are the process's: one thread at a time changes them.
    """
    flags: Any = torch.backends.cudnn
    with _flags:
        before = flags.benchmark, flags.benchmark_limit, flags.deterministic
        try:
            flags.benchmark, flags.benchmark_limit, flags.deterministic = timed, 0, True
            yield
        finally:
            flags.benchmark, flags.benchmark_limit, flags.deterministic = before
