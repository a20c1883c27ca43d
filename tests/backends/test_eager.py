"""Eager in either layout: in channels-last where there are 2-D convolutions, and as a race's other candidate, not."""

import pytest
import torch
from torch import nn

import torchaccel
from tests.helpers import relative_error
from tests.models import small_conv_net
from torchaccel import compiler
from torchaccel.backends.eager import Eager
from torchaccel.compiled import CompiledModule

EITHER = (Eager(), Eager(contiguous=True))


def raced(monkeypatch: pytest.MonkeyPatch, module: nn.Module, *field: Eager) -> CompiledModule:
    monkeypatch.setattr(compiler, "FIELD", field)
    return torchaccel.compile(module, "fp32", backend="fastest", device="cpu", cache_dir=False)


@torch.no_grad()
@pytest.mark.parametrize("backend", EITHER, ids=lambda backend: backend.name)
def test_inputs_and_weights_are_in_the_layout_that_it_is_of(backend: Eager, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = raced(monkeypatch, small_conv_net(), backend), torch.randn(2, 3, 8, 8)
    for _ in range(2):
        assert relative_error(model(x), model.module(x)) < 1e-5
        model.module.fc.weight.mul_(-2)
    (built,) = model._state.built.values()
    assert built.engine is not None
    assert built.engine.channels_last == (backend.name == "eager")
    kernels = [weight for weight in built.plan.payload.exported.state_dict.values() if weight.dim() == 4]
    assert kernels
    for weight in kernels:
        layout = torch.channels_last if backend.name == "eager" else torch.contiguous_format
        assert weight.is_contiguous(memory_format=layout)


def test_where_no_layout_differs_a_race_leaves_the_other_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [backend.name for backend in compiler.FIELD][-2:] == ["eager-contiguous", "inductor-autotuned"]
    assert "eager-contiguous" not in compiler.BACKENDS
    with torch.no_grad():
        without = raced(monkeypatch, nn.Linear(8, 4), *EITHER)
        without(torch.randn(2, 8))
        convolutional = raced(monkeypatch, small_conv_net(), *EITHER)
        convolutional(torch.randn(2, 3, 8, 8))
    eager, other = without.report().races[0].entries
    assert (eager.outcome, other.outcome) == ("won", "out")
    assert "no 2-D convolutions" in other.reason
    assert {entry.outcome for entry in convolutional.report().races[0].entries} == {"won", "lost"}
