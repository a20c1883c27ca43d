"""One engine for a range of batches."""

import pytest
import torch

import torchaccel
from tests.gpu.helpers import ALL, need, relative_error, served_by_engine
from tests.models import ZOO, small_conv_net


@pytest.mark.parametrize("backend", ALL)
def test_one_engine_serves_the_range(backend: str) -> None:
    need(backend)
    module = small_conv_net().cuda()
    model = torchaccel.compile(module, "fp16", backend=backend, dynamic_batch=(1, 4, 16))
    with torch.inference_mode():
        for batch in (3, 1, 16, 4):
            x = torch.randn(batch, 3, 32, 32, device="cuda")
            assert relative_error(model(x), module(x)) < 1e-2
        with pytest.raises(torchaccel.InputError, match="dynamic_batch"):
            model(torch.randn(17, 3, 32, 32, device="cuda"))
    report = model.report()
    assert report.builds == 1
    assert [gate.batch for gate in report.engines[0].gates] == [1, 4, 16]
    assert served_by_engine(model)


@pytest.mark.parametrize("backend", ["torch_tensorrt", "onnx_tensorrt"])
@pytest.mark.parametrize("name", ["resnet18", "bert"])
def test_models_with_a_dynamic_batch(name: str, backend: str) -> None:
    need(backend)
    module = ZOO[name].module().cuda()
    model = torchaccel.compile(module, "fp16", backend=backend, dynamic_batch=(1, 2, 8))
    with torch.inference_mode():
        for batch in (1, 5):
            args, kwargs = ZOO[name].inputs(batch, "cuda")
            assert relative_error(model(*args, **kwargs), module(*args, **kwargs)) < 1e-2
    assert model.report().builds == 1
