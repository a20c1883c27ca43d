"""The operators on a GPU: for each problem the fastest of PyTorch's, cuDNN's and Triton's kernels."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchaccel.fused import cudnn_plans, triton_kernels, triton_linear
from torchaccel.fused.choice import Run, choose
from torchaccel.fused.cudnn_graphs import Problem
from torchaccel.fused.geometry import Geometry, pair
from torchaccel.fused.gpu_convolutions import DTYPES, conv_bias_act
from torchaccel.fused.reference import REFERENCE
from torchaccel.fused.tensors import channels_last, empty, key_of, tf32


def max_pool2d(
    x: torch.Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> torch.Tensor:
    """Max-pooling, channels-last."""
    geometry = pair(kernel), pair(stride), pair(padding), pair(dilation)
    x = channels_last(x)
    if x.dtype not in DTYPES or x.numel() == 0:
        return REFERENCE["max_pool2d"](x, *geometry, ceil_mode)
    size = functional.max_pool2d(x[:1, :1].to("meta"), *geometry, ceil_mode).shape[2:]
    shape = (*x.shape[:2], *size)
    candidates: dict[str, Run] = {
        "aten": functools.partial(REFERENCE["max_pool2d"], x, *geometry, ceil_mode),
        "triton": lambda: triton_kernels.max_pool(x, empty(x, shape), *geometry),
    }
    return candidates[choose(("max_pool", (key_of(x),), geometry, ceil_mode), candidates)]()


def mean_pixels(x: torch.Tensor) -> torch.Tensor:
    """The mean over height and width: [N, C, H, W] → [N, C]."""
    x = channels_last(x)
    if x.dtype not in DTYPES or x.numel() == 0:
        return REFERENCE["mean_pixels"](x)
    candidates: dict[str, Run] = {
        "aten": functools.partial(REFERENCE["mean_pixels"], x),
    }
    for vectors in triton_kernels.mean_vectors(x.shape):
        candidates[f"triton {vectors}"] = functools.partial(_triton_mean, x, vectors)
    return candidates[choose(("mean", (key_of(x),)), candidates)]()


def _triton_mean(x: torch.Tensor, vectors: int) -> torch.Tensor:
    return triton_kernels.mean_pixels(x, x.new_empty(x.shape[:2]), vectors)


def pad_channels(x: torch.Tensor, channels: int) -> torch.Tensor:
    """`x`, of any strides, as a channels-last tensor with channels of zeros behind its own."""
    if x.dtype not in DTYPES or x.numel() == 0:
        return REFERENCE["pad_channels"](x, channels)
    return triton_kernels.pad_channels(x, empty(x, (x.shape[0], channels, *x.shape[2:])))


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
    tensors = tuple(None if tensor is None else key_of(tensor) for tensor in (query, key, value, mask))
    return candidates[choose(("attention", tensors, causal, scale, order, tf32(query)), candidates)]()


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
    if triton_linear.takes(x, weight, activation):  # cuDNN would compile its plans for minutes, and none is faster
        for tiles in triton_linear.TILES:
            candidates[tiles.name] = functools.partial(_triton_linear, *arguments, tiles)
    elif cudnn_plans.takes(x, activation):
        candidates["plan"] = functools.partial(_planned_linear, *arguments)
    problem = ("linear", key_of(x), key_of(weight), bias is not None, activation, tf32(x))
    return candidates[choose(problem, candidates)]()


def _triton_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str, tiles: triton_linear.Tiles
) -> torch.Tensor:
    return triton_linear.linear(x, weight, bias, x.new_empty(len(x), len(weight)), activation, tiles)


_CUBLAS_EPILOGUES = {"relu": False, "gelu_tanh": True}  # and whether it is PyTorch's `use_gelu`


def _planned_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
    """A matrix product as the 1×1 convolution of as many images of one pixel."""
    pixels, kernel = x[:, :, None, None], weight[:, :, None, None]
    shapes = tuple(pixels.shape), tuple(kernel.shape)
    problem = Problem(*shapes, Geometry(), bias is not None, False, activation, x.dtype, x.device)
    expected = functools.partial(REFERENCE["linear_act"], x, weight, bias, activation)
    y = cudnn_plans.run(problem, (pixels, kernel, bias, None), lambda: expected()[:, :, None, None])
    return y.view(len(x), len(weight))


OPERATORS: dict[str, Callable[..., torch.Tensor]] = {
    "conv_bias_act": conv_bias_act,
    "max_pool2d": max_pool2d,
    "mean_pixels": mean_pixels,
    "pad_channels": pad_channels,
    "attention": attention,
    "linear_act": linear_act,
}
