"""Edges of CUDA graphs, where there is no driver; tests/gpu/test_repeats.py has what they are for."""

from typing import Any

import pytest

from torchaccel import edges


class Graph:
    instantiated = False

    def instantiate(self) -> None:
        self.instantiated = True

    def raw_cuda_graph(self) -> int:
        raise AssertionError("without the driver's calls nothing is read")


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
