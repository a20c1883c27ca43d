"""The drop-in on the GPU: what moves, what is copied, and what the module itself serves."""

import copy
import pickle

import pytest
import torch

import torchaccel
from tests.gpu.helpers import need, relative_error, served_by_engine
from tests.models import small_conv_net


def make() -> torchaccel.CompiledModule:
    need("eager")
    return torchaccel.compile(small_conv_net(), "fp16", backend="eager")


def images(batch: int = 4) -> torch.Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_a_model_follows_its_module_to_the_host_and_back() -> None:
    model = make()
    with torch.inference_mode():
        for device in ("cuda", "cpu", "cuda"):
            assert model.to(device) is model
            x = images().to(device)
            assert relative_error(model(x), model.module(x)) < 1e-2
            assert model.report().device.startswith(device)
    assert served_by_engine(model)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_copy_stays_where_its_tensors_are(device: str) -> None:
    model = make().to(device)
    for other in (copy.copy(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert {parameter.device.type for parameter in other.parameters()} == {device}
        with torch.inference_mode():
            x = images().to(device)
            assert relative_error(other(x), other.module(x)) < 1e-2
        assert other.report().device.startswith(device)
        assert served_by_engine(other)


@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning")  # PyTorch's, at a thread's first backward
def test_inputs_on_the_host_that_the_module_itself_serves_come_back_to_the_host() -> None:
    model = make()
    x = images().requires_grad_()
    result = model(x)
    assert result.device.type == "cpu"
    result.square().sum().backward()
    on_device = images().cuda().requires_grad_()
    model.module(on_device).square().sum().backward()
    assert relative_error(x.grad, on_device.grad.cpu()) < 1e-5
    with torch.inference_mode():
        assert model(images(4)[:0]).device.type == "cpu"
    assert model.report().builds == 0


@pytest.mark.parametrize("why", ["a hook on the root", "training mode"])
def test_a_stream_that_no_ring_can_serve_runs_one_call_at_a_time(why: str) -> None:
    model = make()
    seen = []
    if why == "training mode":
        model.train()
    model.register_forward_hook(lambda module, args, result: seen.append(args[0].device.type))
    raw = (torch.full((2, 3, 32, 32), value, dtype=torch.uint8) for value in range(5))
    with torch.no_grad():
        results = list(model.stream(raw, preprocess=lambda x: x / 255))
    assert [result.device.type for result in results] == ["cpu"] * 5
    assert seen == ["cuda"] * 5
    assert model.report().calls_by_engine == (0 if why == "training mode" else 5)
