"""Edges of CUDA graphs, where there is no driver; tests/gpu/test_repeats.py has what they are for."""

from typing import Any

import pytest

from torchaccel import edges

INVALID_VALUE = 1


class Driver:
    """The driver's calls on the edges of one graph: from, to, kind."""

    def __init__(self, edges: list[tuple[int, int, int]]) -> None:
        self.edges = edges

    def cuGraphGetEdges_v2(self, graph: Any, sources: Any, targets: Any, kinds: Any, count: Any) -> int:
        if sources is None:
            count._obj.value = len(self.edges)
            return 0
        if not self.edges:
            return INVALID_VALUE
        for place, (source, target, kind) in enumerate(self.edges):
            sources[place], targets[place], kinds[place].kind = source, target, kind
        return 0

    def cuGraphRemoveDependencies_v2(self, graph: Any, source: Any, target: Any, edge: Any, count: Any) -> int:
        self.edges.remove((source._obj.value, target._obj.value, edge._obj.kind))
        return 0

    def cuGraphAddDependencies_v2(self, graph: Any, source: Any, target: Any, edge: Any, count: Any) -> int:
        self.edges.append((source._obj.value, target._obj.value, edge._obj.kind))
        return 0


class Graph:
    instantiated = False

    def instantiate(self) -> None:
        self.instantiated = True

    def raw_cuda_graph(self) -> int:
        return 7


@pytest.mark.parametrize("edges_", [[], [(1, 2, 0)], [(1, 2, 1), (2, 3, 0), (3, 4, 1)]], ids=["none", "full", "mixed"])
def test_every_edge_is_a_full_one_then(edges_: list[tuple[int, int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph of one kernel, which has no edge, keeps its graph too."""
    driver, wanted = Driver(list(edges_)), {(source, target, 0) for source, target, _ in edges_}
    monkeypatch.setattr(edges.ctypes, "CDLL", lambda name: driver)
    graph: Any = Graph()
    assert edges.complete(graph) == sum(kind for _, _, kind in edges_)
    assert set(driver.edges) == wanted
    assert graph.instantiated


def test_without_the_driver_s_calls_a_graph_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver before CUDA 12.3 has no edges but full ones."""

    def missing(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(edges.ctypes, "CDLL", missing)
    graph: Any = Graph()
    assert edges.complete(graph) == 0
    assert graph.instantiated


def test_a_refusal_of_the_driver_has_its_number() -> None:
    edges._check(0)
    with pytest.raises(RuntimeError, match="refused to change a graph's edges: error 719"):
        edges._check(719)
