"""What the GPU tests share."""

import functools

import pytest
import torch
from torch.utils import _pytree as pytree

import torchaccel
from torchaccel.compiler import BACKENDS
from torchaccel.precision import PRECISIONS

TENSORRT = ("torch_tensorrt", "onnx_tensorrt")
ALL = (*TENSORRT, "fused", "inductor", "eager")


@functools.cache
def problem(backend: str, precision: str) -> str | None:
    """Why a backend cannot serve a precision on this machine."""
    if reason := BACKENDS[backend].unavailable():
        return reason
    return BACKENDS[backend].honours(PRECISIONS[precision], torch.device("cuda", 0))


def need(backend: str, precision: str = "fp16") -> None:
    """Skip the test, with the reason, where the machine lacks what it is about."""
    if reason := problem(backend, precision):
        pytest.skip(f"{backend} at {precision}: {reason}")


def relative_error(result: object, expected: object) -> float:
    """The largest relative error of any floating tensor in two results of the same nesting."""
    (got, spec), (wanted, expected_spec) = pytree.tree_flatten(result), pytree.tree_flatten(expected)
    assert spec == expected_spec
    errors = []
    for y, r in zip(got, wanted, strict=True):
        if isinstance(r, torch.Tensor):
            assert (y.shape, y.dtype, y.device) == (r.shape, r.dtype, r.device)
            errors.append(((y.double() - r.double()).norm() / r.double().norm()).item())
    return max(errors)


def served_by_engine(model: torchaccel.CompiledModule) -> bool:
    """Whether every call so far ran an engine."""
    report = model.report()
    return report.calls_by_engine > 0 and report.calls_by_module == 0
