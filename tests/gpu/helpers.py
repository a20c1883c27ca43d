"""What the GPU tests share."""

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import torchaccel
from torchaccel import trt
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


def warned_of_overlap(backend: str, graph: bool) -> AbstractContextManager[Any]:
    """Within it a build must warn that kernels overlap, if they do there without a graph."""
    if graph or backend not in TENSORRT or trt.load().flavour != "tensorrt_rtx":
        return nullcontext()
    if torch.cuda.get_device_capability() < (9, 0):
        return nullcontext()
    return pytest.warns(torchaccel.BackendWarning, match="one result in some thousand is wrong")


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
