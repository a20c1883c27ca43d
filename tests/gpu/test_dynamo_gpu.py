"""torch.compile(module, backend="torchaccel") on the GPU: engines behind CUDA graphs, and never stale."""

import pytest
import torch

from tests.gpu.helpers import ALL, need, relative_error
from tests.models import small_conv_net
from torchaccel.dynamo import backend, models

# What PyTorch 2.11 says when torch._dynamo.reset() imports Inductor.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")


@pytest.mark.parametrize("engine", ALL)
def test_an_engine_serves_every_shape_with_the_weights_of_now(engine: str) -> None:
    need(engine)
    torch._dynamo.reset()
    module = small_conv_net().cuda().eval()
    fast = torch.compile(module, backend=backend, options={"precision": "fp16", "backend": engine})
    before = set(models())
    with torch.no_grad():
        for batch in (4, 2, 4):
            x = torch.randn(batch, 3, 32, 32, device="cuda")
            assert relative_error(fast(x), module(x)) < 1e-2
            module.fc.weight.mul_(-2)
            assert relative_error(fast(x), module(x)) < 1e-2
    reports = [model.report() for model in models() if model not in before]
    assert sum(report.calls_by_engine for report in reports) == 6
    assert sum(report.calls_by_module for report in reports) == 0
    assert all(runner.graph for report in reports for runner in report.runners)


def test_a_tensor_on_the_cpu_among_those_of_the_gpu_runs_in_no_engine() -> None:
    torch._dynamo.reset()
    module = torch.nn.Linear(4, 2).cuda()
    fast = torch.compile(lambda x: module(x.cuda()), backend=backend, options={"precision": "fp32", "backend": "eager"})
    x = torch.randn(3, 4)
    with torch.no_grad(), pytest.warns(UserWarning, match="several devices"):
        y = fast(x)
    assert y.is_cuda
    assert torch.equal(y, module(x.cuda()))
