"""The operators on a GPU: for each problem the fastest of PyTorch's, cuDNN's and Triton's kernels."""

import functools
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchaccel.fused import cudnn_plans, triton_depthwise, triton_kernels, triton_linear
from torchaccel.fused.choice import Run, choose
from torchaccel.fused.reference import ACTIVATIONS, REFERENCE

_TRITON_DTYPES = _CUDNN_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


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
    x = _channels_last(x)
    residual = None if residual is None else _channels_last(residual)
    geometry = _pair(stride), _pair(padding), _pair(dilation)
    candidates: dict[str, Run] = {
        "aten": functools.partial(_aten_conv, x, weight, bias, residual, *geometry, groups, activation)
    }
    if activation == "relu" and x.dtype in _CUDNN_DTYPES:
        candidates["cudnn"] = functools.partial(_cudnn_conv, x, weight, bias, residual, *geometry, groups)
    if groups == x.shape[1] and weight.shape[0] == groups and x.dtype in _TRITON_DTYPES:
        candidates |= _triton_depthwise(x, weight, bias, residual, *geometry, activation)
    if tuple(weight.shape[2:]) == (1, 1) and geometry == ((1, 1), (0, 0), (1, 1)) and groups == 1:
        candidates["matmul"] = functools.partial(_matmul_conv, x, weight, bias, residual, activation)
    if cudnn_plans.takes(x, activation):
        candidates["plan"] = functools.partial(_planned_conv, x, weight, bias, residual, *geometry, groups, activation)
    present = bias is not None, residual is not None
    problem = ("conv", _key(x), _key(weight), present, geometry, groups, activation, _tf32(x))
    return candidates[choose(problem, candidates)]()


def _aten_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    activation: str,
) -> torch.Tensor:
    with _cudnn_timed():
        y = functional.conv2d(x, weight, bias, stride, padding, dilation, groups)
    if residual is not None:
        y += residual
    return _channels_last(ACTIVATIONS[activation](y))


def _cudnn_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> torch.Tensor:
    with _cudnn_timed():
        if residual is None:
            y = torch.cudnn_convolution_relu(x, weight, bias, stride, padding, dilation, groups)
        else:
            y = torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, stride, padding, dilation, groups)
    return _channels_last(y)


def _planned_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    activation: str,
) -> torch.Tensor:
    """By the fastest of cuDNN's plans; they are timed the first time, and `choose` runs nothing new in a capture."""
    size = _out_size(x, weight.shape[2:], stride, padding, dilation)
    problem = cudnn_plans.Problem(
        tuple(x.shape),
        tuple(weight.shape),
        (x.shape[0], weight.shape[0], *size),
        stride,
        padding,
        dilation,
        bias is not None,
        residual is not None,
        activation,
        x.dtype,
        x.device,
    )
    tensors = x, _channels_last(weight), bias, residual
    arguments = x, weight, bias, residual, stride, padding, dilation, groups, activation
    plan = cudnn_plans.best_plan(problem, lambda plan: plan(*tensors), lambda: _aten_conv(*arguments))
    if plan is None:
        raise RuntimeError(f"cuDNN has no plan for {problem}")
    return plan(*tensors)


def _triton_depthwise(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    activation: str,
) -> dict[str, Run]:
    """By each of the tiles that are worth timing."""
    kernel = weight.shape[2], weight.shape[3]
    shape = x.shape[0], x.shape[1], *_out_size(x, kernel, stride, padding, dilation)

    def run(tile: triton_depthwise.Tile) -> torch.Tensor:
        geometry = stride, padding, dilation
        return triton_depthwise.depthwise(x, weight, bias, residual, _empty(x, shape), *geometry, activation, tile)

    found = triton_depthwise.tiles(shape, x.dtype, kernel)
    return {f"triton {tile}": functools.partial(run, tile) for tile in found}


def _matmul_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
) -> torch.Tensor:
    """A 1×1 convolution of channels-last tensors is one matrix product, with bias and ReLU in its epilogue."""
    batch, channels, height, width = x.shape
    pixels = x.permute(0, 2, 3, 1).reshape(-1, channels)
    matrix = weight.reshape(weight.shape[0], channels)
    if bias is not None and activation == "relu" and residual is None:
        y = torch._addmm_activation(bias, pixels, matrix.t())
    else:
        y = functional.linear(pixels, matrix, bias)
        if residual is not None:
            y += residual.permute(0, 2, 3, 1).reshape(y.shape)
        y = ACTIVATIONS[activation](y)
    return y.view(batch, height, width, -1).permute(0, 3, 1, 2)


def max_pool2d(
    x: torch.Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> torch.Tensor:
    """Max-pooling, channels-last."""
    geometry = _pair(kernel), _pair(stride), _pair(padding), _pair(dilation)
    x = _channels_last(x)
    if x.dtype not in _TRITON_DTYPES or x.numel() == 0:
        return REFERENCE["max_pool2d"](x, *geometry, ceil_mode)
    size = functional.max_pool2d(x[:1, :1].to("meta"), *geometry, ceil_mode).shape[2:]
    shape = (*x.shape[:2], *size)
    candidates: dict[str, Run] = {
        "aten": functools.partial(REFERENCE["max_pool2d"], x, *geometry, ceil_mode),
        "triton": lambda: triton_kernels.max_pool(x, _empty(x, shape), *geometry),
    }
    return candidates[choose(("max_pool", (_key(x),), geometry, ceil_mode), candidates)]()


def mean_pixels(x: torch.Tensor) -> torch.Tensor:
    """The mean over height and width: [N, C, H, W] → [N, C]."""
    x = _channels_last(x)
    if x.dtype not in _TRITON_DTYPES or x.numel() == 0:
        return REFERENCE["mean_pixels"](x)
    candidates: dict[str, Run] = {
        "aten": functools.partial(REFERENCE["mean_pixels"], x),
    }
    for vectors in triton_kernels.VECTORS:
        candidates[f"triton {vectors}"] = functools.partial(_triton_mean, x, vectors)
    return candidates[choose(("mean", (_key(x),)), candidates)]()


def _triton_mean(x: torch.Tensor, vectors: int) -> torch.Tensor:
    return triton_kernels.mean_pixels(x, x.new_empty(x.shape[:2]), vectors)


def pad_channels(x: torch.Tensor, channels: int) -> torch.Tensor:
    """`x`, of any strides, as a channels-last tensor with channels of zeros behind its own."""
    if x.dtype not in _TRITON_DTYPES or x.numel() == 0:
        return REFERENCE["pad_channels"](x, channels)
    return triton_kernels.pad_channels(x, _empty(x, (x.shape[0], channels, *x.shape[2:])))


_ATTENTION = {
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float | None,
    order: Sequence[int],
) -> torch.Tensor:
    """Scaled dot-product attention by the fastest of PyTorch's kernels."""
    order = tuple(order)
    arguments = query, key, value, mask, causal, scale, order
    candidates: dict[str, Run] = {"default": functools.partial(REFERENCE["attention"], *arguments)}
    if query.numel():
        candidates |= {name: functools.partial(_attention_by, kind, *arguments) for name, kind in _ATTENTION.items()}
    tensors = tuple(None if tensor is None else _key(tensor) for tensor in (query, key, value, mask))
    return candidates[choose(("attention", tensors, causal, scale, order, _tf32(query)), candidates)]()


def _attention_by(kind: SDPBackend, *arguments: Any) -> torch.Tensor:
    with sdpa_kernel(kind):
        return REFERENCE["attention"](*arguments)


def linear_act(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
    """activation(linear(x, weight, bias)): [rows, in] → [rows, out], contiguous."""
    x, weight = x.contiguous(), weight.contiguous()
    arguments = x, weight, bias, activation
    candidates: dict[str, Run] = {"aten": functools.partial(REFERENCE["linear_act"], *arguments)}
    if bias is not None and activation in _CUBLAS_EPILOGUES:
        use_gelu = _CUBLAS_EPILOGUES[activation]
        candidates["epilogue"] = lambda: torch._addmm_activation(bias, x, weight.t(), use_gelu=use_gelu)
    if cudnn_plans.takes(x, activation):
        candidates["plan"] = functools.partial(_planned_linear, *arguments)
    if triton_linear.takes(x, weight, activation):
        for tiles in triton_linear.TILES:
            candidates[tiles.name] = functools.partial(_triton_linear, *arguments, tiles)
    problem = ("linear", _key(x), _key(weight), bias is not None, activation, _tf32(x))
    return candidates[choose(problem, candidates)]()


def _triton_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str, tiles: triton_linear.Tiles
) -> torch.Tensor:
    return triton_linear.linear(x, weight, bias, x.new_empty(len(x), len(weight)), activation, tiles)


_CUBLAS_EPILOGUES = {"relu": False, "gelu_tanh": True}  # and whether it is PyTorch's `use_gelu`


def _planned_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
    """A matrix product as the 1×1 convolution of as many images of one pixel."""
    rows, columns, (ones, zeros) = len(x), len(weight), ((1, 1), (0, 0))
    pixels, kernel = x[:, :, None, None], weight[:, :, None, None]
    sizes = tuple(pixels.shape), tuple(kernel.shape), (rows, columns, 1, 1)
    problem = cudnn_plans.Problem(*sizes, ones, zeros, ones, bias is not None, False, activation, x.dtype, x.device)
    plan = cudnn_plans.best_plan(
        problem,
        lambda plan: plan(pixels, kernel, bias, None),
        lambda: REFERENCE["linear_act"](x, weight, bias, activation)[:, :, None, None],
    )
    if plan is None:
        raise RuntimeError(f"cuDNN has no plan for {problem}")
    return plan(pixels, kernel, bias, None).view(rows, columns)


OPERATORS: dict[str, Callable[..., torch.Tensor]] = {
    "conv_bias_act": conv_bias_act,
    "max_pool2d": max_pool2d,
    "mean_pixels": mean_pixels,
    "pad_channels": pad_channels,
    "attention": attention,
    "linear_act": linear_act,
}


def _pair(numbers: Sequence[int]) -> tuple[int, int]:
    height, width = numbers
    return height, width


def _key(tensor: torch.Tensor) -> Hashable:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device


def _tf32(tensor: torch.Tensor) -> Hashable:
    """What float32 is computed in, which is another problem for each answer."""
    backends: Any = torch.backends
    return backends.cudnn.conv.fp32_precision if tensor.dtype is torch.float32 else None


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _empty(x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _out_size(x: torch.Tensor, kernel: Sequence[int], *geometry: tuple[int, int]) -> list[int]:
    stride, padding, dilation = geometry
    return [
        (size + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i, size in enumerate(x.shape[2:])
    ]


_cudnn_flags = threading.RLock()


@contextmanager
def _cudnn_timed() -> Iterator[None]:
    """Let cuDNN time its plans for a problem that it sees for the first time, instead of trusting its heuristic.

    Only those that give the same bits at every run. The flags are the process's: one thread at a time changes them.
    """
    cudnn: Any = torch.backends.cudnn
    with _cudnn_flags:
        before = cudnn.benchmark, cudnn.benchmark_limit, cudnn.deterministic
        try:
            cudnn.benchmark, cudnn.benchmark_limit, cudnn.deterministic = True, 0, True
            yield
        finally:
            cudnn.benchmark, cudnn.benchmark_limit, cudnn.deterministic = before
