"""The speed promised of backend="fused", on a Hopper GPU with cuDNN's own plans: medians, channels-last fp16 inputs."""

import pytest
import torch
import torchvision

import torchaccel
from tests.gpu.helpers import need
from tests.models import look_trained
from torchaccel.fused import cudnn_plans

REPLAY_MS = {
    ("resnet18", 1): 0.155,
    ("resnet18", 32): 0.47,
    ("resnet18", 128): 1.36,
    ("resnet50", 1): 0.33,
    ("resnet50", 32): 1.19,
    ("vit_b_16", 32): 3.0,
}
CALL_MS = {("resnet18", 1): 0.19, ("resnet18", 32): 0.51}

pytestmark = [
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="the figures are a Hopper GPU's (compute capability 9.0)",
    ),
    pytest.mark.filterwarnings("ignore::torchaccel.MeasurementWarning"),
    # What PyTorch 2.11 says when it imports Inductor.
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
]


@pytest.mark.parametrize(("name", "batch"), REPLAY_MS)
def test_a_replay_takes_no_longer_than_promised(name: str, batch: int) -> None:
    need("fused")
    if reason := cudnn_plans.problem():
        pytest.skip(reason)
    torch.manual_seed(0)
    module = look_trained(torchvision.models.get_model(name)).cuda().half()
    x = torch.randn(batch, 3, 224, 224, device="cuda").half().to(memory_format=torch.channels_last)
    fused = torchaccel.compile(module, "fp16", backend="fused")
    eager = torchaccel.compile(module, "fp16", backend="eager")
    with torch.inference_mode():
        runs = {"fused": fused.runner_for(x).replay, "eager": eager.runner_for(x).replay, "call": lambda: fused(x)}
        times = torchaccel.compare(runs, samples=200).timings
    replay, call, graph = (times[key].median_ms for key in ("fused", "call", "eager"))
    engine = fused.report().engines[0]
    print(f"{name} b{batch}: replay {replay:.4f} ms, call {call:.4f} ms; eager in a graph {graph:.4f} ms")
    print(f"{engine.library}, built in {engine.load_ms / 1e3:.1f} s")
    assert replay <= REPLAY_MS[name, batch]
    assert call <= CALL_MS.get((name, batch), call)
    assert replay <= graph
