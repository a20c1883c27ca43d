"""The speed that is promised, on a Hopper GPU with TensorRT-RTX: medians of one run, side by side."""

import pytest
import torch

import torchaccel
from tests.gpu.helpers import need
from tests.models import ZOO
from torchaccel.precision import tf32_state

REPLAY_MS = {
    ("torch_tensorrt", 1): 0.23,
    ("torch_tensorrt", 32): 0.90,
    ("onnx_tensorrt", 1): 0.22,
    ("onnx_tensorrt", 32): 0.87,
}
CALL_OVER_REPLAY_MS = 0.04
FP16_OVER_STRICT_FP32 = 4.0

pytestmark = [
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="the figures are a Hopper GPU's (compute capability 9.0)",
    ),
    pytest.mark.filterwarnings("default::torchaccel.MeasurementWarning"),
]


@pytest.mark.parametrize(("backend", "batch"), REPLAY_MS)
def test_replay_and_call(backend: str, batch: int) -> None:
    need(backend)
    module = ZOO["resnet18"].module().cuda()
    model = torchaccel.compile(module, "fp16", backend=backend)
    x = torch.randn(batch, 3, 224, 224, device="cuda")
    with torch.inference_mode():
        runner = model.runner_for(x)
        times = torchaccel.compare({"replay": runner.replay, "call": lambda: model(x)}, samples=200).timings
    replay, call = times["replay"].median_ms, times["call"].median_ms
    print(f"{backend} b{batch}: replay {replay:.4f} ms, call {call:.4f} ms")
    assert replay <= REPLAY_MS[backend, batch]
    if batch == 1:
        assert call <= replay + CALL_OVER_REPLAY_MS


def test_fp16_against_strict_fp32() -> None:
    need("onnx_tensorrt")
    module = ZOO["resnet18"].module().cuda()
    model = torchaccel.compile(module, "fp16", backend="onnx_tensorrt")
    x = torch.randn(32, 3, 224, 224, device="cuda")
    with torch.inference_mode(), tf32_state(False):
        times = torchaccel.compare({"module": lambda: module(x), "engine": lambda: model(x)}).timings
    gain = times["module"].median_ms / times["engine"].median_ms
    print(f"fp16 over strict fp32 eager at batch 32: {gain:.2f}")
    assert gain >= FP16_OVER_STRICT_FP32
