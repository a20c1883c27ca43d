"""The operators that the passes put into a program: opaque to tracing and to Inductor, and exact on any device.

On a CPU, and where a program is traced, each is what `reference.py` says; on a GPU the fastest of several kernels.
"""

from collections.abc import Callable
from typing import Any

import torch

from torchaccel.fused.reference import REFERENCE

_library = torch.library.Library("torchaccel", "FRAGMENT")

_SCHEMAS = {
    "conv_bias_act": "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int[] stride, int[] padding, "
    "int[] dilation, int groups, str activation) -> Tensor",
    "max_pool2d": "(Tensor x, int[] kernel, int[] stride, int[] padding, int[] dilation, bool ceil_mode) -> Tensor",
    "mean_pixels": "(Tensor x) -> Tensor",
    "pad_channels": "(Tensor x, int channels) -> Tensor",
    "attention": "(Tensor query, Tensor key, Tensor value, Tensor? mask, bool causal, float? scale, "
    "int[] order) -> Tensor",
    "linear_act": "(Tensor x, Tensor weight, Tensor? bias, str activation) -> Tensor",
}


def _on_gpu(name: str) -> Callable[..., torch.Tensor]:
    """The operator on a GPU; Triton is imported when it first runs there."""

    def run(*args: Any) -> torch.Tensor:
        from torchaccel.fused import gpu

        return gpu.OPERATORS[name](*args)

    return run


def _unaliased(reference: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The reference as an operator, which never returns one of its own inputs."""

    def run(x: torch.Tensor, *args: Any) -> torch.Tensor:
        y = reference(x, *args)
        return y.clone() if y is x else y

    return run


for _name, _schema in _SCHEMAS.items():
    _library.define(f"{_name}{_schema}")
    _library.impl(_name, _unaliased(REFERENCE[_name]), "CPU")
    _library.impl(_name, _on_gpu(_name), "CUDA")
    torch.library.register_fake(f"torchaccel::{_name}", _unaliased(REFERENCE[_name]), lib=_library)

OPAQUE = tuple(getattr(torch.ops.torchaccel, name).default for name in _SCHEMAS)
