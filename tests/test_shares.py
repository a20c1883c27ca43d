"""Where the time of a program goes: by operator, as shares that add up to one."""

import time
from typing import Any

import pytest
import torch
from torch import fx, nn

from tests.helpers import Lambda, captured
from tests.test_build import build
from torchaccel.backends.base import Engine, NativeEngine, Plan
from torchaccel.backends.eager import Eager
from torchaccel.precision import Precision
from torchaccel.program import Program
from torchaccel.report import Coverage
from torchaccel.shares import INSIDE, time_shares


@torch.library.custom_op("torchaccel_tests::slow", mutates_args=())
def slow(x: torch.Tensor, seconds: float) -> torch.Tensor:
    """A copy of x, after a while."""
    time.sleep(seconds)
    return x.clone()


@slow.register_fake
def _(x: torch.Tensor, seconds: float) -> torch.Tensor:
    return torch.empty_like(x)


def sleeps(self: Any, x: torch.Tensor) -> torch.Tensor:
    x = slow(slow(x, 0.02), 0.02)  # one after the other
    first, second = x.split(1)
    return slow((first + second).relu(), 0.02).sinh()


def exported(module: nn.Module, x: torch.Tensor) -> Any:
    return captured(module, x).exported.module(check_guards=False)


def by_name(node: fx.Node) -> str:
    return INSIDE if "torchaccel_tests" in str(node.target) else str(node.target)


def test_the_shares_follow_the_time_that_operators_take_and_add_up_to_one() -> None:
    x = torch.randn(2, 4)
    shares = time_shares(exported(Lambda(sleeps), x), by_name, (x,))
    assert sum(shares.values()) == pytest.approx(1)
    assert shares[INSIDE] > 0.8
    assert {"aten.relu.default", "aten.sinh.default", "aten.add.Tensor"} <= set(shares)
    assert all(share >= 0 for share in shares.values())
    assert not [name for name in shares if "getitem" in name]

    def other_way(node: fx.Node) -> str:
        return "slow" if "torchaccel_tests" in str(node.target) else INSIDE

    assert time_shares(exported(Lambda(sleeps), x), other_way, (x,))["slow"] > 0.8


def test_what_has_no_label_has_no_share_and_torch_export_s_check_of_inputs_is_run() -> None:
    x = torch.randn(2, 4)
    program = torch.export.export(Lambda(sleeps), (x,)).module()
    shares = time_shares(program, lambda node: str(node.target) if node.op == "call_function" else None, (x,))
    assert all(".default" in name or ".Tensor" in name or "split" in name for name in shares)
    assert sum(shares.values()) == pytest.approx(1)


def test_the_program_runs_in_the_modes_that_the_caller_gives() -> None:
    seen = []

    def run(interpret: Any, *inputs: torch.Tensor) -> Any:
        result = interpret(*inputs)
        seen.append(result[0].requires_grad)
        return result

    module = nn.Linear(4, 4)
    x = torch.randn(2, 4)
    program = captured(module, x)
    program.take_weights(build(module, x)[2].store, module)
    shares = time_shares(program.exported.module(check_guards=False), str, (x,), run)
    assert len(seen) > 3
    assert sum(shares.values()) == pytest.approx(1)


class Partial(Eager):
    """A backend whose engine has one operator outside."""

    name = "partial"

    def build(self, program: Program, precision: Precision, device: torch.device, *, partial: bool = False) -> Plan:
        plan = super().build(program, precision, device)
        outside = {name: count for name, count in program.operators.items() if "sinh" in name}
        plan.coverage = Coverage(program.operators - Coverage(outside=type(program.operators)(outside)).outside)
        plan.coverage.outside.update(outside)
        return plan

    def load(self, plan: Plan, device: torch.device) -> Engine:
        module = plan.payload.exported.module(check_guards=False)

        class Parts(NativeEngine):
            def outside_time_shares(self, *inputs: torch.Tensor) -> dict[str, float]:
                shares = time_shares(module, lambda node: str(node.target), inputs)
                return {name: share for name, share in shares.items() if "sinh" in name}

        return Parts(module, plan.precision)


def test_a_build_with_operators_outside_records_their_share_of_the_time() -> None:
    built, _, _ = build(Lambda(sleeps), torch.randn(2, 4), Partial())
    coverage = built.record.coverage
    assert coverage is not None
    assert set(coverage.outside_time_shares) == {"aten.sinh.default"}
    assert coverage.outside_time_share == sum(coverage.outside_time_shares.values())
    assert 0 < coverage.outside_time_share < 0.2
    assert "aten.sinh.default ×1 (" in str(coverage)
    assert "% of the time" in str(coverage)


def test_what_cannot_be_measured_has_no_figures_and_serves() -> None:
    class Fails(Partial):
        def load(self, plan: Plan, device: torch.device) -> Engine:
            class Whole(NativeEngine):
                def outside_time_shares(self, *inputs: torch.Tensor) -> dict[str, float]:
                    raise RuntimeError("not node by node")

            return Whole(plan.payload.exported.module(check_guards=False), plan.precision)

    x = torch.randn(2, 4)
    built, runner, _ = build(Lambda(sleeps), x, Fails())
    assert built.record.coverage is not None
    assert built.record.coverage.outside_time_share is None
    assert runner([x])[0].shape == (1, 4)


def test_where_everything_is_inside_nothing_is_measured() -> None:
    built, _, _ = build(nn.Linear(4, 4), torch.randn(2, 4))
    assert built.record.coverage is None or built.record.coverage.outside_time_share is None
