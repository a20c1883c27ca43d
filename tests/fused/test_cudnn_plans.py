"""cuDNN's plans, as far as they go without a GPU: what it is asked for is valid; where it is missing that is said."""

import itertools
import time
from dataclasses import fields, replace
from typing import Any, ClassVar

import pytest
import torch
from torch.nn import functional

from torchaccel.fused import cudnn_plans
from torchaccel.fused.cudnn_graphs import ACTIVATIONS, DTYPES, Problem, operations
from torchaccel.fused.cudnn_plans import Plan
from torchaccel.fused.geometry import Geometry
from torchaccel.fused.notes import Notes, taking
from torchaccel.probes import import_problem

needs_cudnn = pytest.mark.skipif(bool(import_problem("cudnn")), reason=str(import_problem("cudnn")))
PROBLEM = Problem(
    (2, 64, 56, 56),
    (128, 64, 3, 3),
    Geometry((2, 2), (1, 1)),
    True,
    False,
    "relu",
    torch.float16,
    torch.device("cuda", 0),
)


@needs_cudnn
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_cudnn_takes_what_it_is_asked_for(activation: str, dtype: torch.dtype) -> None:
    for bias, residual in itertools.product((True, False), repeat=2):
        problem = replace(PROBLEM, activation=activation, dtype=dtype, bias=bias, residual=residual)
        assert operations(problem, None) is not None


@pytest.mark.parametrize("geometry", [Geometry(), Geometry((2, 1), (0, 2), (1, 2)), Geometry((3, 2), (4, 1), groups=2)])
def test_the_output_has_the_shape_that_pytorch_gives_it(geometry: Geometry) -> None:
    problem = replace(PROBLEM, geometry=geometry, x=(2, 8, 13, 17), weight=(6, 8 // geometry.groups, 3, 5))
    x, weight = (torch.empty(shape, device="meta") for shape in (problem.x, problem.weight))
    expected = functional.conv2d(x, weight, None, *(getattr(geometry, field.name) for field in fields(geometry)))
    assert problem.y == expected.shape


def test_where_the_package_is_missing_the_reason_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudnn_plans, "import_problem", lambda name: f"{name} is not installed")
    cudnn_plans.problem.cache_clear()
    try:
        assert "pip install nvidia-cudnn-frontend" in str(cudnn_plans.problem())
        assert not cudnn_plans.takes(torch.ones(1, 8, 4, 4, dtype=torch.float16), "relu")
    finally:
        cudnn_plans.problem.cache_clear()


def test_there_are_no_plans_for_float32_or_other_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudnn_plans, "problem", lambda: None)
    x = torch.ones(1, 8, 4, 4, dtype=torch.float16)
    assert cudnn_plans.takes(x, "relu")
    assert not cudnn_plans.takes(x.float(), "relu")
    assert not cudnn_plans.takes(x, "hardswish")
    assert not cudnn_plans.takes(x[:0], "relu")


class Graph:
    """What cuDNN proposes for a problem: plans by name, of which one can be built at a time."""

    names: tuple[str, ...] = ("slow", "fast", "fast", "middling")
    built: ClassVar[list[str]] = []

    def get_execution_plan_count(self) -> int:
        return len(self.names)

    def get_plan_name_at_index(self, index: int) -> str:
        return self.names[index]

    def build_plan_at_index(self, index: int) -> None:
        self.built.append(self.names[index])

    def get_workspace_size_plan_at_index(self, index: int) -> int:
        return 0


@pytest.fixture
def graph(monkeypatch: pytest.MonkeyPatch) -> type[Graph]:
    """A process that has no plans yet, and a cuDNN whose plans take given times."""
    times_ms = {"slow": 3.0, "fast": 1.0, "middling": 2.0}

    def plan_ms(run: Any, expected: torch.Tensor, best_ms: float | None) -> float:
        run()
        return times_ms[run.args[0].name]

    monkeypatch.setattr(cudnn_plans, "_plans", {})
    monkeypatch.setattr(cudnn_plans, "_graph", lambda problem: Graph())
    monkeypatch.setattr(cudnn_plans, "_plan_ms", plan_ms)
    monkeypatch.setattr(Graph, "built", [])
    return Graph


def best(notes: Notes, raises: str = "") -> str:
    """The name of the plan that a process with these notes takes, and nothing of which it remembers afterwards."""

    def example(plan: Plan) -> torch.Tensor:
        if plan.name == raises:
            raise RuntimeError("CUDNN_STATUS_EXECUTION_FAILED")
        return torch.ones(1)

    with taking(notes):
        plan = cudnn_plans.best_plan(PROBLEM, example, lambda: torch.ones(1))
    notes.forget()
    assert plan is not None
    return plan.name


def test_the_plan_of_an_earlier_process_is_the_only_one_that_is_built(graph: type[Graph]) -> None:
    first = Notes()
    assert best(first) == "fast"
    assert graph.built == ["slow", "fast", "middling", "fast"]
    cudnn_plans._plans.clear()
    graph.built.clear()
    second = Notes(first.made)
    assert best(second) == "fast"
    assert graph.built == ["fast"]
    assert second.new() == {}
    assert cudnn_plans._plans == {}, "what was recalled is forgotten"


def test_building_ends_after_a_time_with_the_best_that_was_built(
    graph: type[Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))  # a plan takes a second to build
    monkeypatch.setattr(cudnn_plans, "ENOUGH_BUILDING_S", 0.5)
    assert best(Notes()) == "slow"
    assert set(graph.built) == {"slow"}


@pytest.mark.parametrize("fault", ["name", "index", "fails"])
def test_a_plan_that_is_no_longer_there_is_searched_anew(
    fault: str, graph: type[Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Notes()
    best(first)
    cudnn_plans._plans.clear()
    others = {"name": ("slow", "middling", "fast"), "index": ("middling",), "fails": Graph.names}
    monkeypatch.setattr(Graph, "names", others[fault])
    graph.built.clear()
    second = Notes(first.made)
    found = best(second, raises="fast" if fault == "fails" else "")
    assert found == ("fast" if fault == "name" else "middling")
    assert set(graph.built) == set(others[fault])
    assert [name for _, name in second.new().values()] == [found]


class NotSupported(Exception):
    """As the package's own errors: no RuntimeError."""


@pytest.mark.parametrize("fails", ["build", "graph", "run"])
def test_a_plan_that_fails_is_out_whatever_it_raises(
    fails: str, graph: type[Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(self: Graph, index: int) -> None:
        if fails == "build" and self.names[index] == "fast":
            raise NotSupported

    def example(plan: Plan) -> torch.Tensor:
        if fails == "run" and plan.name == "fast":
            raise NotSupported
        return torch.ones(1)

    def no_graph(problem: Problem) -> Graph:
        raise NotSupported

    monkeypatch.setattr(Graph, "build_plan_at_index", build)
    if fails == "graph":
        monkeypatch.setattr(cudnn_plans, "_graph", no_graph)
    plan = cudnn_plans.best_plan(PROBLEM, example, lambda: torch.ones(1))
    assert (plan and plan.name) == (None if fails == "graph" else "middling")


def test_the_best_plan_that_cannot_be_built_once_more_is_taken_from_the_search(
    graph: type[Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    def only(problem: Problem, index: int, name: str) -> Plan:
        raise NotSupported

    monkeypatch.setattr(cudnn_plans, "_only", only)
    assert best(Notes()) == "fast"


def test_without_memory_for_a_plan_nothing_is_searched(graph: type[Graph]) -> None:
    first = Notes()
    best(first)
    cudnn_plans._plans.clear()
    graph.built.clear()

    def example(plan: Plan) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with taking(Notes(first.made)), pytest.raises(torch.OutOfMemoryError):
        cudnn_plans.best_plan(PROBLEM, example, lambda: torch.ones(1))
    assert graph.built == ["fast"]
