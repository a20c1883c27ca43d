"""Weights that hooks of torch.nn.utils compute before each forward, on the root of a compiled module."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from tests.helpers import on_cpu, relative_error
from torchaccel.computed import compute_weights, computes_weight

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")

KINDS: dict[str, Callable[[nn.Module], Any]] = {
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "pruning": lambda module: prune.l1_unstructured(module, "weight", 0.5),
    "pruned twice": lambda module: prune.random_unstructured(KINDS["pruning"](module), "weight", 0.3),
}


class OwnCall(nn.Linear):
    """A class whose calls are not those of `nn.Module`."""

    def __call__(self, x: torch.Tensor) -> Any:
        return super().__call__(x) + 1


@pytest.fixture(params=KINDS)
def module(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)  # a spectral norm that happens to be near zero would magnify what bf16 rounds
    made: nn.Module = KINDS[request.param](nn.Linear(4, 3))
    return made.eval()


@torch.no_grad()
def write(module: nn.Module) -> None:
    """New values for what the weight is computed from, and not for the weight."""
    for name, parameter in module.named_parameters():
        if name != "bias":
            parameter.copy_(torch.randn_like(parameter))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_a_weight_is_computed_from_is_followed(module: nn.Module, precision: str) -> None:
    model, x = on_cpu(module, precision), torch.randn(2, 4)
    with torch.no_grad():
        for _ in range(3):
            assert relative_error(model(x), module(x)) < (2e-6 if precision == "fp32" else 5e-2)
            write(module)
    assert (model.report().builds, model.report().refreshes) == (1, 2)


def test_an_engine_that_is_built_before_any_call_has_the_weights_of_now(module: nn.Module) -> None:
    x = torch.randn(2, 4)
    write(module)
    model = on_cpu(module, inputs=x)
    with torch.no_grad():
        assert relative_error(model(x), module(x)) < 2e-6


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_with_a_call_of_its_own_has_them_too(kind: str) -> None:
    module = KINDS[kind](OwnCall(4, 3)).eval()
    model, x = on_cpu(module), torch.randn(2, 4)
    with torch.no_grad():
        for _ in range(2):
            assert relative_error(model(x), module(x)) < 2e-6
            write(module)


def test_other_hooks_are_neither_these_nor_run_with_these(module: nn.Module) -> None:
    handle = module.register_forward_pre_hook(lambda *_: pytest.fail("called"))
    assert [computes_weight(hook) for hook in module._forward_pre_hooks.values()] == [True, False]
    write(module)
    before = module.weight
    compute_weights(module)
    found = module.weight
    assert not torch.equal(found, before)
    handle.remove()
    module(torch.ones(1, 4))
    assert torch.equal(found, module.weight)
