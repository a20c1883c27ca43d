"""Every model of the zoo through both TensorRT backends, and the native ones, on the GPU."""

import pytest
import torch

import torchaccel
from tests.gpu.helpers import ALL, TENSORRT, need, relative_error, served_by_engine
from tests.models import ZOO
from torchaccel.precision import PRECISIONS, tf32_state


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("backend", TENSORRT)
@pytest.mark.parametrize("name", ZOO)
def test_tensorrt_computes_what_the_module_does(name: str, backend: str, precision: str) -> None:
    need(backend, precision)
    check(name, backend, precision)


@pytest.mark.parametrize("backend", ["inductor", "eager"])
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_large", "fpn_resnet18", "bert"])
def test_native_backends_compute_what_the_module_does(name: str, backend: str) -> None:
    need(backend)
    check(name, backend, "fp16")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("backend", ALL)
def test_every_honoured_precision(backend: str, precision: str) -> None:
    need(backend, precision)
    check("resnet18", backend, precision)


def check(name: str, backend: str, precision: str) -> None:
    module = ZOO[name].module().cuda()
    model = torchaccel.compile(module, precision, backend=backend)
    args, kwargs = ZOO[name].inputs(2, "cuda")
    with torch.inference_mode(), tf32_state(False):
        result, expected = model(*args, **kwargs), module(*args, **kwargs)
    assert type(result) is type(expected)
    assert relative_error(result, expected) <= PRECISIONS[precision].bound
    assert served_by_engine(model)
    assert model.report().to_dict()["graph"] is True
