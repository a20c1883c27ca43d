"""What autograd, inference mode and autocast do to a call is what they do to a call of the module."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from tests.helpers import Lambda, assert_fresh, images, in_place, on_cpu, relative_error
from tests.models import small_conv_net


def smooth() -> nn.Module:
    """A module with second derivatives."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


# --- gradients ---


def test_inputs_that_require_grad_anywhere_in_the_arguments_get_the_module_s_gradients() -> None:
    def forward(self: Any, first: Any, *, second: Any) -> dict[str, torch.Tensor]:
        return {"out": self.fc(first["a"][0]) * second[1]["b"], "count": first["n"] + 1}

    torch.manual_seed(0)
    model = on_cpu(Lambda(forward, fc=nn.Linear(2, 2)))
    gradients = []
    for either in (model, model.module):
        x, scale = torch.ones(1, 2, requires_grad=True), torch.full((2,), 3.0, requires_grad=True)
        result = either({"a": [x], "n": torch.tensor(1)}, second=(None, {"b": scale}))
        assert result["out"].requires_grad
        assert result["count"].item() == 2
        either.zero_grad()
        result["out"].sum().backward()
        gradients.append([x.grad, scale.grad, *(copy.copy(parameter.grad) for parameter in model.parameters())])
    assert all(map(torch.equal, *gradients))
    assert (model.report().calls_by_module, model.report().builds) == (1, 0)


def test_one_input_that_requires_grad_beside_one_that_does_not_is_enough() -> None:
    model = on_cpu(Lambda(lambda self, x, y: x * y))
    y = torch.full((2,), 3.0, requires_grad=True)
    model(torch.full((2,), 2.0), y).sum().backward()
    assert y.grad is not None
    assert y.grad.tolist() == [2.0, 2.0]


def test_a_second_backward_is_the_module_s() -> None:
    model = on_cpu(smooth())
    second = []
    for either in (model, model.module):
        x = torch.linspace(-1, 1, 6).reshape(2, 3).requires_grad_()
        (first,) = torch.autograd.grad(either(x).square().sum(), x, create_graph=True)
        second.append(torch.autograd.grad(first.square().sum(), x)[0])
    assert second[0].any()
    assert torch.equal(*second)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # PyTorch's own, in forward mode
def test_function_transforms_and_forward_mode_go_through_the_module() -> None:
    model = on_cpu(smooth())
    x = torch.randn(5, 3)

    def tangent(module: nn.Module) -> torch.Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(module(forward_ad.make_dual(x, torch.ones_like(x)))).tangent

    with torch.no_grad():
        assert torch.allclose(torch.func.vmap(model)(x), model.module(x))
    assert torch.allclose(torch.func.jacrev(model)(x[0]), torch.func.jacrev(model.module)(x[0]))
    assert torch.equal(tangent(model), tangent(model.module))
    assert model.report().builds == 0


@torch.no_grad()
def test_functional_call_uses_the_tensors_that_it_is_given() -> None:
    model = on_cpu(smooth())
    x = torch.randn(5, 3)
    doubled = {name: parameter * 2 for name, parameter in model.named_parameters()}
    before = model(x)
    result = torch.func.functional_call(model, doubled, (x,))
    assert torch.allclose(result, torch.func.functional_call(model.module, doubled, (x,)))
    assert torch.equal(model(x), before)
    assert model.report().calls_by_engine == 3


# --- results ---


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "enabled"])
def test_results_are_of_the_kind_that_the_module_would_give(mode: str) -> None:
    model = on_cpu(Lambda(lambda self, x: (self.fc(x), [x.argmax(1)], x), fc=nn.Linear(2, 2)).requires_grad_(False))
    x = torch.randn(3, 2)
    context = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "enabled": torch.enable_grad}[mode]
    with context():
        results, expected = model(x), model.module(x)
    assert model.report().calls_by_engine == 1
    for y, r in zip((results[0], results[1][0]), (expected[0], expected[1][0]), strict=True):
        assert (y.is_inference(), y.requires_grad, y.is_leaf) == (r.is_inference(), r.requires_grad, r.is_leaf)
    assert results[2] is x


def test_a_result_without_gradients_can_be_used_with_autograd_afterwards() -> None:
    model = on_cpu(small_conv_net())
    with torch.no_grad():
        result = model(images())
    weight = torch.ones(5, requires_grad=True)
    (result * weight).sum().backward()
    assert torch.equal(weight.grad, result.sum(0))
    result.requires_grad_().square().sum().backward()
    assert torch.equal(result.grad, result.detach() * 2)


@pytest.mark.parametrize("served", ["no_grad", "inference_mode"])
def test_an_input_made_in_inference_mode_is_served_anywhere(served: str) -> None:
    model = on_cpu(small_conv_net())
    with torch.inference_mode():
        x = images()
    assert x.is_inference()
    with torch.no_grad() if served == "no_grad" else torch.inference_mode():
        for _ in range(2):
            assert relative_error(model(x), model.module(x)) < 2e-6


def test_in_inference_mode_an_input_that_requires_grad_is_served_by_an_engine() -> None:
    model = on_cpu(small_conv_net())
    x = images().requires_grad_()
    with torch.inference_mode():
        result = model(x)
    assert not result.requires_grad
    assert model.report().calls_by_engine == 1


@pytest.mark.parametrize("made", ["in inference mode", "outside"])
@pytest.mark.parametrize("dynamic_batch", [None, (1, 2, 4)])
def test_an_engine_built_in_inference_mode_is_refreshed_outside_it(made: str, dynamic_batch: Any) -> None:
    """Also where `compile` itself was called inside; the module's weights are ordinary tensors."""
    module = small_conv_net()
    if made == "in inference mode":
        with torch.inference_mode():
            model = on_cpu(module, dynamic_batch=dynamic_batch, inputs=images())
    else:
        model = on_cpu(module, dynamic_batch=dynamic_batch)
        with torch.inference_mode():
            model(images())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for refreshes in (1, 2):
        model.train()
        model(images(4)).square().sum().backward()
        optimizer.step()
        model.eval()
        assert_fresh(model, images(), builds=1, refreshes=refreshes)
        with torch.inference_mode():
            assert model(images()).is_inference()
    with torch.inference_mode():
        in_place(model)
        model.refresh()
        assert relative_error(model(x := images()), model.module(x)) < 2e-6


def test_a_module_whose_weights_are_inference_tensors_is_served_and_refreshed() -> None:
    with torch.inference_mode():
        module = small_conv_net()
    model = on_cpu(module)
    with torch.no_grad():
        x = images()
        assert relative_error(model(x), module(x)) < 2e-6
        with torch.inference_mode():
            module.fc.weight.mul_(-2)
        model.refresh()
        assert relative_error(model(x), module(x)) < 2e-6
    assert model.report().builds == 1


# --- autocast ---


@torch.no_grad()
def test_autocast_s_state_is_a_part_of_the_signature() -> None:
    model = on_cpu(Lambda(lambda self, x: {"y": self.fc(x), "z": x.float().exp()}, fc=nn.Linear(2, 2)))
    x = torch.randn(3, 2)
    seen = []
    for _ in range(2):
        for dtype in (None, torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                result, expected = model(x), model.module(x)
                with torch.autocast("cpu", enabled=False):
                    assert model(x)["y"].dtype is torch.float32
            assert {name: y.dtype for name, y in result.items()} == {name: r.dtype for name, r in expected.items()}
            assert relative_error(result["y"], expected["y"]) < 1e-2
            seen.append(result["y"].dtype)
    assert seen == [torch.float32, torch.bfloat16, torch.float16] * 2
    assert model.report().builds == 3
    assert model.report().calls_by_module == 0


def test_under_autocast_gradients_are_the_module_s() -> None:
    model = on_cpu(smooth())
    gradients = []
    for either in (model, model.module):
        x = torch.ones(2, 3, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            result = either(x)
        assert result.dtype is torch.bfloat16
        result.float().square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_inference_mode_inside_autocast_gives_both() -> None:
    model = on_cpu(smooth())
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        result = model(torch.ones(2, 3))
    assert result.dtype is torch.bfloat16
    assert result.is_inference()
