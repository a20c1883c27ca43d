"""backend="fused" as a caller has it, on a CPU: its weights, its routes, and what its report says."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers import assert_served_afresh, captured, engine_weights, on_cpu, relative_error, settled
from tests.models import small_conv_net
from torchaccel.backends import fused
from torchaccel.backends.fused import Fused
from torchaccel.errors import BuildError
from torchaccel.fused.notes import Notes, note, taking
from torchaccel.precision import PRECISIONS
from torchaccel.weights import WeightStore

CPU = torch.device("cpu")


class Residual(nn.Module):
    """A first layer to pad, and a residual branch whose bias is merged into the main one's."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
        self.side, self.norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        return self.fc((self.one(x) + self.norm(self.side(x))).relu().mean((2, 3)))


def residual() -> nn.Module:
    torch.manual_seed(0)
    return settled(Residual())


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@torch.no_grad()
def test_refreshed_weights_are_those_of_an_engine_built_afresh(precision: str) -> None:
    module, x = residual(), torch.randn(2, 3, 9, 9)
    model = on_cpu(module, precision, "fused")
    model(x)
    rules = engine_weights(model)
    assert {rule.function for rule in rules} == {"cast", "sum", "folded_weight"}
    assert [rule.input_channels for rule in rules if rule.input_channels] == [4]
    held = {rule: tensor.data_ptr() for rule, tensor in rules.items()}
    for tensor in (*module.parameters(), module.norm.running_var):
        tensor.mul_(1.1).add_(1e-3)
    assert_served_afresh(model, x, fresh=copy.deepcopy(model))
    assert {rule: tensor.data_ptr() for rule, tensor in engine_weights(model).items()} == held
    assert (model.report().builds, model.report().refreshes) == (1, 1)


def test_two_signatures_share_the_weights() -> None:
    model = on_cpu(residual(), "fp32", "fused")
    with torch.no_grad():
        for size in (9, 12):
            x = torch.randn(2, 3, size, size)
            assert relative_error(model(x), model.module(x)) < 1e-6
    first, second = (
        {rule: built.engine._run.get_parameter(name) for name, rule in built.plan.payload.rules.items()}
        for built in model._state.built.values()
    )
    assert all(first[rule] is second[rule] or first[rule].data_ptr() == second[rule].data_ptr() for rule in first)


def test_the_report_says_by_which_route() -> None:
    model = on_cpu(residual(), "fp32", "fused", inputs=torch.randn(2, 3, 9, 9))
    assert model.report().engines[-1].library == f"PyTorch {torch.__version__} (plain route)"


@pytest.fixture
def program() -> Any:
    module, x = residual(), torch.randn(2, 3, 9, 9)
    program = captured(module, x)
    Fused().lower(program)
    program.take_weights(WeightStore(), module, channels_last=True)
    return program


def _failing(program: Any) -> Any:
    def run(*inputs: torch.Tensor) -> Any:
        raise RuntimeError("no kernel for this\nand a long trace")

    return run


def test_a_route_that_fails_leaves_the_other_and_its_reason(program: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fused._ROUTES, "failing", _failing)
    monkeypatch.setattr(fused, "_tried", lambda routes, program, device: routes)
    monkeypatch.setattr(fused, "_time_ms", lambda engine, inputs, device: 1.0)
    backend = Fused(routes=("failing", "plain"))
    plan = backend.build(program, PRECISIONS["fp32"], CPU)
    engine = backend.load(plan, CPU)
    assert torch.isfinite(engine(torch.randn(2, 3, 9, 9))[0]).all()
    assert plan.manifest["route"] == "plain"
    assert "plain route" in plan.library
    assert "failing failed: RuntimeError: no kernel for this" in plan.library
    assert "trace" not in plan.library


@pytest.mark.parametrize("known", [True, False])
def test_a_route_fails_whatever_it_raises(known: bool, program: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class CompilationError(Exception):
        """As Triton's: no RuntimeError."""

    def broken(program: Any) -> Any:
        raise CompilationError("at 3:1")

    monkeypatch.setitem(fused._ROUTES, "broken", broken)
    monkeypatch.setattr(fused, "_tried", lambda routes, program, device: routes)
    monkeypatch.setattr(fused, "_time_ms", lambda engine, inputs, device: 1.0)
    routes, notes = ("broken", "plain"), Notes()
    with taking(notes):
        note(("route", routes), {"route": "broken", "routes_ms": {}, "routes_failed": {}})
    backend = Fused(routes=routes)
    plan = backend.build(program, PRECISIONS["fp32"], CPU)
    with taking(Notes(notes.made if known else None)):
        backend.load(plan, CPU)
    assert plan.manifest["route"] == "plain"
    assert plan.manifest["routes_failed"] == {"broken": "CompilationError: at 3:1"}


def test_where_no_route_works_the_error_has_the_reason(program: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fused._ROUTES, "failing", _failing)
    backend = Fused(routes=("failing",))
    with pytest.raises(BuildError, match=r"could not be run .*no kernel for this"):
        backend.load(backend.build(program, PRECISIONS["fp32"], CPU), CPU)


def test_the_faster_route_serves(program: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fused._ROUTES, "other", fused._plain)
    monkeypatch.setattr(fused, "_tried", lambda routes, program, device: routes)
    times = iter([2.0, 1.0])
    monkeypatch.setattr(fused, "_time_ms", lambda engine, inputs, device: next(times))
    backend = Fused(routes=("plain", "other"))
    plan = backend.build(program, PRECISIONS["fp32"], CPU)
    backend.load(plan, CPU)
    assert plan.manifest["route"] == "other"
    assert plan.manifest["routes_ms"] == {"plain": 2.0, "other": 1.0}


@pytest.mark.parametrize("known", [True, False])
def test_a_route_that_has_no_memory_is_no_failed_route(
    known: bool, program: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(program: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setitem(fused._ROUTES, "exhausted", exhausted)
    monkeypatch.setattr(fused, "_tried", lambda routes, program, device: routes)
    monkeypatch.setattr(fused, "_time_ms", lambda engine, inputs, device: 1.0)
    routes = ("exhausted", "plain")
    if known:
        monkeypatch.setattr(fused, "_fastest", None)  # what an earlier process chose is all that is tried
    notes = Notes()
    with taking(notes):
        note(("route", routes), {"route": "exhausted", "routes_ms": {}, "routes_failed": {}})
    backend = Fused(routes=routes)
    with taking(Notes(notes.made if known else None)), pytest.raises(torch.OutOfMemoryError):
        backend.load(backend.build(program, PRECISIONS["fp32"], CPU), CPU)


def test_one_engine_serves_every_batch_of_a_range() -> None:
    module = small_conv_net()
    model = on_cpu(module, backend="fused", dynamic_batch=(1, 4, 8))
    with torch.no_grad():
        for size in (1, 3, 8):
            x = torch.randn(size, 3, 16, 16)
            assert relative_error(model(x), module(x)) < 1e-5
    assert model.report().builds == 1
