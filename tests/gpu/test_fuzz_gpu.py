"""What tests/test_fuzz.py draws, on the GPU: CUDA graphs, tensors on the device and on the host, TensorRT."""

import pytest
import torch
from hypothesis import reject
from torch import nn

import torchaccel
from tests.fuzz import DEPTH, FULL_SHAPES, Example, count_cases, examples
from tests.fuzz_check import check_example
from tests.fuzz_module import OPERATIONS
from tests.gpu.helpers import need
from torchaccel.errors import BuildError

# What TensorRT has no layers for, or ONNX no graph: double precision, weights as outputs, writes to views.
NOT_FOR_TENSORRT = {"wide", "weight", "buffer", "in place", "running sum", "look up", "constant"}
DTYPES = [torch.float32, torch.float16, torch.int64, torch.int32, torch.bool]


@pytest.mark.parametrize(("precision", "count"), [("fp16", 40), ("fp32", 20), ("bf16", 20)])
def test_hundreds_of_calls_on_the_eager_engine_behind_cuda_graphs(precision: str, count: int) -> None:
    """80 examples, 1280 cases."""
    need("eager", precision)

    def check(example: Example) -> int:
        made: list[torchaccel.CompiledModule] = []

        def compiled(module: nn.Module) -> torchaccel.CompiledModule:
            made.append(torchaccel.compile(module, precision, backend="eager"))
            return made[0]

        compared = check_example(example, compiled, "cuda")
        assert all(runner.graph for runner in made[0].report().runners)
        return compared

    assert count_cases(examples(), count, check) >= 16 * count * DEPTH


def test_dozens_of_calls_on_tensorrt() -> None:
    """Ten examples of 8 calls, 80 cases. What TensorRT refuses by name is left for another example."""
    need("onnx_tensorrt", "fp16")

    def check(example: Example) -> int:
        try:
            return check_example(example, lambda m: torchaccel.compile(m, "fp16", backend="onnx_tensorrt"), "cuda")
        except BuildError:
            reject()

    operations = [name for name in OPERATIONS if name not in NOT_FOR_TENSORRT]
    changes = ("nothing", "shapes")
    strategy = examples(shapes=FULL_SHAPES, dtypes=DTYPES, operations=operations, changes=changes, steps=3, calls=8)
    assert count_cases(strategy, 10, check) >= 80 * DEPTH


@pytest.mark.parametrize("backend", ["eager", "onnx_tensorrt"])
def test_an_empty_batch_from_the_host_comes_back_to_the_host(backend: str) -> None:
    need(backend)
    model = torchaccel.compile(nn.Linear(3, 2), "fp16", backend=backend)
    with torch.no_grad():
        for batch in (0, 2, 0):
            result = model(torch.ones(batch, 3))
            assert result.shape == (batch, 2)
            assert result.device.type == "cpu"
        assert model(torch.ones(0, 3, device="cuda")).device.type == "cuda"
