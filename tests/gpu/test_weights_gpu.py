"""A tracked change of the weights is acted on at the next call."""

import pytest
import torch

import torchaccel
from tests.gpu.helpers import ALL, need, relative_error, served_by_engine
from tests.models import small_conv_net


@pytest.mark.parametrize("backend", ALL)
def test_the_next_call_uses_the_new_weights(backend: str) -> None:
    need(backend)
    module = small_conv_net().cuda()
    model = torchaccel.compile(module, "fp16", backend=backend)
    x = torch.randn(4, 3, 32, 32, device="cuda")
    with torch.no_grad():
        before = model(x)
        module.fc.weight.mul_(-2)
        after = model(x)
        assert relative_error(after, module(x)) < 1e-2
        assert relative_error(before, after) > 0.5
    report = model.report()
    assert report.refreshes == 1
    assert report.builds == (2 if "tensorrt" in backend else 1)
    assert served_by_engine(model)


@pytest.mark.parametrize("backend", ["onnx_tensorrt", "eager"])
def test_fused_adamw_and_batch_norm_statistics_count(backend: str) -> None:
    need(backend)
    module = small_conv_net().cuda()
    model = torchaccel.compile(module, "fp16", backend=backend)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)
    x = torch.randn(4, 3, 32, 32, device="cuda")
    with torch.no_grad():
        model(x)
    model.train()
    model(x).square().sum().backward()
    optimizer.step()
    model.eval()
    with torch.no_grad():
        assert relative_error(model(x), module(x)) < 1e-2
    assert model.report().calls_by_module == 1


def test_a_refreshed_engine_holds_bit_for_bit_the_weights_of_a_fresh_one() -> None:
    need("eager")
    module = small_conv_net().cuda()
    model = torchaccel.compile(module, "fp16", backend="eager")
    x = torch.randn(4, 3, 32, 32, device="cuda")
    with torch.no_grad():
        model(x)
        for parameter in module.parameters():
            parameter.add_(1e-6)
        refreshed = model(x)
        fresh = torchaccel.compile(module, "fp16", backend="eager")(x)
    assert torch.equal(refreshed, fresh)
    assert model.report().builds == 1
