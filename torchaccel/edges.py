"""The edges of a captured CUDA graph: which kernels wait for which.

TensorRT-RTX launches its kernels programmatically dependent: one may begin before the kernel ahead of it has ended, and
waits by itself. One that needs nothing of the kernel ahead does not wait, and takes it that all before that have ended.
But where the kernel ahead began early too, they need not have: with three in a row results are wrong, now and then.
"""

import ctypes
from collections import defaultdict
from collections.abc import Sequence

import torch


class _EdgeData(ctypes.Structure):
    """`CUgraphEdgeData` of the CUDA driver API; all zero is a full dependency."""

    _fields_ = (
        ("from_port", ctypes.c_ubyte),
        ("to_port", ctypes.c_ubyte),
        ("kind", ctypes.c_ubyte),
        ("reserved", ctypes.c_ubyte * 5),
    )


Edge = tuple[int, int]


def separate(graph: torch.cuda.CUDAGraph) -> None:
    """Let no two kernels in a row begin early, in a graph captured with `keep_graph=True`, and instantiate it.

    Raises RuntimeError where the driver refuses. One before CUDA 12.3 has no such edges.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        read = driver.cuGraphGetEdges_v2
        remove, add = driver.cuGraphRemoveDependencies_v2, driver.cuGraphAddDependencies_v2
    except (OSError, AttributeError):
        graph.instantiate()
        return
    raw, count = ctypes.c_void_p(graph.raw_cuda_graph()), ctypes.c_size_t()
    _check(read(raw, None, None, None, ctypes.byref(count)))
    sources, targets = ((ctypes.c_void_p * count.value)() for _ in range(2))
    kinds = (_EdgeData * count.value)()
    _check(read(raw, sources, targets, kinds, ctypes.byref(count)))
    edges = {(a or 0, b or 0): data for a, b, data in zip(sources, targets, kinds, strict=True)}
    to_complete, to_add = plan(list(edges), [edge for edge, data in edges.items() if data.kind])
    for edge in to_complete:
        _check(remove(raw, *_ends(edge), ctypes.byref(edges[edge]), ctypes.c_size_t(1)))
    for edge in (*to_complete, *to_add):
        _check(add(raw, *_ends(edge), ctypes.byref(_EdgeData()), ctypes.c_size_t(1)))
    graph.instantiate()


def plan(edges: Sequence[Edge], early: Sequence[Edge]) -> tuple[list[Edge], list[Edge]]:
    """Which of the early edges have to become full ones, and which full ones there have to be besides.

    An early edge stays where all that comes before its first kernel has ended when that begins. What follows its second
    kernel waits for both.

    >>> plan([(1, 2), (2, 3), (3, 4), (4, 5)], [(1, 2), (2, 3), (3, 4)])
    ([(2, 3)], [(1, 3), (3, 5)])
    """
    before: dict[int, list[int]] = defaultdict(list)
    after: dict[int, list[int]] = defaultdict(list)
    for source, target in edges:
        before[target].append(source)
        after[source].append(target)
    full, added, begins_early = [], [], set[int]()
    for source, target in _in_order(early, before):
        alone = len(after[source]) == 1 and len(before[target]) == 1
        if alone and source not in begins_early:
            begins_early.add(target)
            added += [(source, follower) for follower in after[target]]
        else:
            full.append((source, target))
    return full, added


def _in_order(edges: Sequence[Edge], before: dict[int, list[int]]) -> list[Edge]:
    """The edges in the order in which their first kernels run."""
    depth: dict[int, int] = {}
    for edge in edges:
        waiting = [edge[0]]
        while waiting:
            node = waiting[-1]
            unknown = [source for source in before[node] if source not in depth]
            if unknown:
                waiting += unknown
            else:
                depth[waiting.pop()] = 1 + max((depth[source] for source in before[node]), default=0)
    return sorted(edges, key=lambda edge: depth[edge[0]])


def _ends(edge: Edge) -> tuple[object, object]:
    return ctypes.byref(ctypes.c_void_p(edge[0])), ctypes.byref(ctypes.c_void_p(edge[1]))


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"the CUDA driver refused to change a graph's edges: error {status}")
