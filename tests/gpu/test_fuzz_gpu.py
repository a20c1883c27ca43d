"""What tests/test_fuzz.py draws, on the GPU: CUDA graphs, tensors on the device and on the host, TensorRT."""

import pytest
import torch
from hypothesis import given, reject
from torch import nn

import torchaccel
from tests.fuzz import FULL_SHAPES, Example, examples, examples_settings, times_deeper
from tests.fuzz_check import check_example
from tests.fuzz_module import OPERATIONS
from tests.gpu.helpers import need
from torchaccel.errors import BuildError

# What TensorRT has no layers for, or ONNX no graph: double precision, weights as outputs, writes to views.
NOT_FOR_TENSORRT = {"wide", "weight", "buffer", "in place", "running sum", "look up", "constant"}
DTYPES = [torch.float32, torch.float16, torch.int64, torch.int32, torch.bool]


@pytest.mark.parametrize(("precision", "cases"), [("fp16", 320), ("fp32", 160), ("bf16", 160)])
def test_hundreds_of_calls_on_the_eager_engine_behind_cuda_graphs(precision: str, cases: int) -> None:
    need("eager", precision)
    made: list[torchaccel.CompiledModule] = []
    compared = 0

    def compiled(module: nn.Module) -> torchaccel.CompiledModule:
        made[:] = [torchaccel.compile(module, precision, backend="eager")]
        return made[0]

    @examples_settings(cases // 16)
    @given(examples())
    def run(example: Example) -> None:
        nonlocal compared
        compared += check_example(example, compiled, "cuda")
        assert all(runner.graph for runner in made[0].report().runners)

    run()
    assert compared >= times_deeper(cases)


def test_dozens_of_calls_on_tensorrt() -> None:
    """An operator that TensorRT has not is refused by name, and another example drawn; nothing else may go wrong."""
    need("onnx_tensorrt", "fp16")
    operations = [name for name in OPERATIONS if name not in NOT_FOR_TENSORRT]
    compared = 0

    @examples_settings(6)
    @given(examples(shapes=FULL_SHAPES, dtypes=DTYPES, operations=operations, changes=("nothing", "shapes"), steps=3))
    def run(example: Example) -> None:
        nonlocal compared
        try:
            compared += check_example(example, lambda m: torchaccel.compile(m, "fp16", backend="onnx_tensorrt"), "cuda")
        except BuildError:
            reject()

    run()
    assert compared >= times_deeper(64)


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
