"""What the choice among kernels has to know of tensors: what makes another problem, and how they are laid out."""

from collections.abc import Hashable, Sequence
from typing import Any

import torch


def key_of(tensor: torch.Tensor) -> Hashable:
    """All of a tensor that a kernel's time depends on."""
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device


def tf32(tensor: torch.Tensor) -> Hashable:
    """What float32 is computed in, which is another problem for each answer."""
    backends: Any = torch.backends
    return backends.cudnn.conv.fp32_precision if tensor.dtype is torch.float32 else None


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """The tensor itself where it is laid out so, or a copy."""
    return x.contiguous(memory_format=torch.channels_last)


def empty(x: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """A channels-last tensor of another shape, on the device and of the dtype of `x`."""
    return torch.empty(tuple(shape), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor at a multiple of 16 bytes, which kernels are told of; a view can begin anywhere."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone(memory_format=torch.preserve_format)
