"""Torch-TensorRT's own converters and TensorRT-RTX's own builder in a process that has no GPU; prints what they made.

Torch-TensorRT asks for a GPU where none is needed: at its import, for the compute capability, and after a build, when
it loads the engine. This process answers the first, and keeps the engine's bytes instead of the second.
"""

import io
import json
from contextlib import redirect_stdout
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers import Lambda, build_plan, lowered_program
from tests.models import ZOO, small_conv_net, small_transformer
from torchaccel.backends.base import Plan
from torchaccel.backends.torch_tensorrt import TorchTensorRT
from torchaccel.errors import BuildError

GPU = torch.device("cuda", 0)
BACKEND = TorchTensorRT()


class SerialisedEngine:
    """An engine that is not loaded."""

    def __init__(self, content: Any) -> None:
        self._content = bytes(content)

    def serialize(self) -> bytes:
        return self._content

    def get_aliased_input_tensor(self, name: str) -> None:
        return None


class Runtime:
    """A runtime that loads nothing."""

    def __init__(self, logger: Any) -> None:
        pass

    def deserialize_cuda_engine(self, content: Any) -> SerialisedEngine:
        return SerialisedEngine(content)


def answer_for_a_gpu() -> None:
    cuda: Any = torch.cuda
    properties = SimpleNamespace(major=9, minor=0, name="none", total_memory=1 << 36, multi_processor_count=1)
    cuda.get_device_capability = lambda *_: (properties.major, properties.minor)
    cuda.get_device_properties = lambda *_: properties
    cuda.get_device_name = lambda *_: properties.name
    cuda.current_device = lambda: 0
    cuda.mem_get_info = lambda *_: (properties.total_memory, properties.total_memory)
    from torch_tensorrt.dynamo.conversion import _TRTInterpreter as interpreter

    assert interpreter.trt.__name__ == "tensorrt_rtx"
    interpreter.trt.Runtime = Runtime


build, lowered = partial(build_plan, BACKEND), partial(lowered_program, BACKEND)


def described(plan: Plan) -> dict[str, Any]:
    assert plan.coverage is not None
    coverage = {"engines": plan.coverage.engines, "outside": dict(plan.coverage.outside)}
    return {"bytes": len(plan.payload), "manifest": plan.manifest, **coverage}


def convolutional(precision: str, dynamic_batch: Any) -> dict[str, Any]:
    x = torch.randn(2, 3, 16, 16)
    return described(build(small_conv_net(), x, precision=precision, dynamic_batch=dynamic_batch))


def of_the_zoo(name: str, precision: str) -> dict[str, Any]:
    case = ZOO[name]
    return described(build(case.module(), *case.inputs(2)[0], precision=precision))


def transformer(dynamic_batch: Any) -> dict[str, Any]:
    return described(build(small_transformer(), torch.randn(2, 3, 32, 32), dynamic_batch=dynamic_batch))


def rebuilt() -> dict[str, Any]:
    """The bytes of engines built again: they follow from the new weights, not from those that the program had."""
    x = torch.randn(2, 3, 16, 16)
    old, new = small_conv_net(), small_conv_net()
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.mul_(1.5)

    def again(first: nn.Module, then: nn.Module) -> bytes:
        return BACKEND.rebuild(build(first, x), lowered(then, x), GPU).payload

    return {"is_fresh": again(old, new) == again(new, new), "has_changed": again(old, new) != again(old, old)}


def refused() -> dict[str, Any]:
    """What a user is told, and what is printed meanwhile."""
    printed = io.StringIO()
    with redirect_stdout(printed), pytest.raises(BuildError) as refusal:
        build(Lambda(lambda self, x: torch.linalg.svd(x)[1] + 1), torch.randn(2, 3, 3), precision="tf32")
    return {"error": str(refusal.value), "printed": printed.getvalue()}


CASES = {
    **{
        f"convolutional, {precision}, {name}": (convolutional, precision, batch)
        for precision in ("tf32", "fp16", "bf16")
        for name, batch in (("static", None), ("dynamic", (1, 2, 8)))
    },
    "resnet18, fp16": (of_the_zoo, "resnet18", "fp16"),
    "convnext_tiny, fp16": (of_the_zoo, "convnext_tiny", "fp16"),
    "mobilenet_v3_large, bf16": (of_the_zoo, "mobilenet_v3_large", "bf16"),
    "transformer, dynamic": (transformer, (1, 4, 8)),
    "built again": (rebuilt,),
    "refused": (refused,),
}

if __name__ == "__main__":
    answer_for_a_gpu()
    print(json.dumps({name: make(*given) for name, (make, *given) in CASES.items()}))
