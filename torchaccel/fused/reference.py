"""What each operator of ours means: PyTorch's own operators in a row, on any device and for any dtype.

Four-dimensional results are channels-last always.
"""

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda x: x,
    "relu": functional.relu,
    "relu6": functional.relu6,
    "silu": functional.silu,
    "hardswish": functional.hardswish,
    "gelu": functional.gelu,
}


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
    """activation(conv2d(x, weight) + bias + residual)."""
    y = functional.conv2d(x, weight, bias, tuple(stride), tuple(padding), tuple(dilation), groups)
    if residual is not None:
        y = y + residual
    return _channels_last(ACTIVATIONS[activation](y))


def max_pool2d(
    x: torch.Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> torch.Tensor:
    """Max-pooling over height and width."""
    geometry = tuple(kernel), tuple(stride), tuple(padding), tuple(dilation)
    return _channels_last(functional.max_pool2d(x, *geometry, ceil_mode))


def mean_pixels(x: torch.Tensor) -> torch.Tensor:
    """The mean over height and width: [N, C, H, W] → [N, C]."""
    return x.mean((2, 3))


def pad_channels(x: torch.Tensor, channels: int) -> torch.Tensor:
    """`x` with channels of zeros behind its own, `channels` in all."""
    zeros = x.new_zeros(x.shape[0], channels - x.shape[1], *x.shape[2:])
    return _channels_last(torch.cat([x, zeros], 1))  # `pad` would bind a batch that is traced as a symbol


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float | None,
) -> torch.Tensor:
    """Scaled dot-product attention; the result is laid out as [batch, sequence, heads, width] is."""
    y = functional.scaled_dot_product_attention(query, key, value, mask, 0.0, causal, scale=scale)
    return y.transpose(1, 2).contiguous().transpose(1, 2)


def _channels_last(y: torch.Tensor) -> torch.Tensor:
    return y.contiguous(memory_format=torch.channels_last)


REFERENCE: dict[str, Callable[..., torch.Tensor]] = {
    "conv_bias_act": conv_bias_act,
    "max_pool2d": max_pool2d,
    "mean_pixels": mean_pixels,
    "pad_channels": pad_channels,
    "attention": attention,
}
