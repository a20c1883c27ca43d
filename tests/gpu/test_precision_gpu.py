"""Nothing is called FP32 that computed in TF32, and PyTorch's own state comes back."""

import copy

import pytest
import torch

import torchaccel
from tests.gpu.helpers import ALL, need, problem
from tests.models import small_conv_net
from torchaccel.precision import tf32_state


def test_rtx_refuses_fp32_before_anything_is_built() -> None:
    if torchaccel.environment().tensorrt_rtx is None:
        pytest.skip("TensorRT-RTX is not installed")
    module = small_conv_net()
    with pytest.raises(torchaccel.BackendError, match="TF32"):
        torchaccel.compile(module, "fp32", backend="onnx_tensorrt")


def test_auto_moves_on_with_one_warning_that_says_why() -> None:
    if problem("torch_tensorrt", "fp16") or not problem("torch_tensorrt", "fp32"):
        pytest.skip("Torch-TensorRT is not usable here, or honours fp32")
    with pytest.warns(torchaccel.BackendWarning, match="TF32") as caught:
        model = torchaccel.compile(small_conv_net(), "fp32")
    assert len(caught) == 1
    with torch.inference_mode():
        model(torch.randn(2, 3, 32, 32, device="cuda"))
    assert model.report().backend == "inductor"
    assert "TF32" in model.report().backend_reason


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("backend", ["inductor", "eager"])
def test_fp32_is_ieee_and_tf32_is_not(backend: str, graph: bool) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.ReLU(), torch.nn.Linear(512, 512)).cuda()
    x = torch.randn(64, 512, device="cuda")
    exact = module.double()(x.double()).detach()
    module.float()
    errors = {}
    for precision in ("fp32", "tf32"):
        need(backend, precision)
        model = torchaccel.compile(module, precision, backend=backend, cuda_graph=graph)
        with torch.inference_mode(), tf32_state(precision == "fp32"):  # the opposite of what the engine is to use
            errors[precision] = ((model(x).double() - exact).norm() / exact.norm()).item()
    assert errors["fp32"] < 2e-6
    assert 5e-5 < errors["tf32"] < 2e-3


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("backend", ["fused", "inductor", "eager"])
def test_what_is_kept_in_fp32_in_an_fp16_engine_is_ieee(backend: str, graph: bool) -> None:
    need(backend)
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Conv2d(64, 64, 3), torch.nn.Flatten(), torch.nn.Linear(64 * 36, 256)).cuda()
    x = torch.randn(8, 64, 8, 8, device="cuda").half().float()
    exact = copy.deepcopy(module).double()(x.double()).half()
    model = torchaccel.compile(module, "fp16", backend=backend, keep_fp32=["0", "1", "2"], cuda_graph=graph)
    with torch.inference_mode(), tf32_state(True):
        same = (model(x) == exact).double().mean().item()
    assert same > 0.98, "TF32's errors are about as large as fp16's last rounding"


@pytest.mark.parametrize("backend", ALL)
def test_the_tf32_flags_are_restored(backend: str) -> None:
    need(backend, "tf32")
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    model = torchaccel.compile(small_conv_net(), "tf32", backend=backend)
    with torch.inference_mode():
        model(torch.randn(2, 3, 32, 32, device="cuda"))
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before
