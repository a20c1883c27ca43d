"""The edges of a captured CUDA graph: which kernels wait for which.

TensorRT-RTX launches its kernels programmatically dependent, and so does cuDNN some of those that it compiles: one may
begin before the kernel ahead of it has ended, and waits by itself for what it needs. Not all do, and then results are
wrong, now and then. With full edges between them none can begin early. (Every other edge is not enough: ResNet-18 was
still off in tf32, with a dynamic batch.)
"""

import ctypes
from typing import Any

import torch


class _EdgeData(ctypes.Structure):
    """`CUgraphEdgeData` of the CUDA driver API; all zero is a full dependency."""

    _fields_ = (
        ("from_port", ctypes.c_ubyte),
        ("to_port", ctypes.c_ubyte),
        ("kind", ctypes.c_ubyte),
        ("reserved", ctypes.c_ubyte * 5),
    )


def complete(graph: torch.cuda.CUDAGraph) -> int:
    """Make every edge of a graph captured with `keep_graph=True` a full one, and instantiate it.

    Returns how many were not. Raises RuntimeError where the driver refuses; one before CUDA 12.3 has no such edges.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        calls = driver.cuGraphGetEdges_v2, driver.cuGraphRemoveDependencies_v2, driver.cuGraphAddDependencies_v2
    except (OSError, AttributeError):
        calls = None
    done = _complete(graph.raw_cuda_graph(), *calls) if calls else 0
    graph.instantiate()
    return done


def _complete(graph: int, read: Any, remove: Any, add: Any) -> int:
    raw, count, one, done = ctypes.c_void_p(graph), ctypes.c_size_t(), ctypes.c_size_t(1), 0
    _check(read(raw, None, None, None, ctypes.byref(count)))
    if not count.value:  # a kernel by itself; the driver refuses to list no edges
        return done
    sources, targets = ((ctypes.c_void_p * count.value)() for _ in range(2))
    kinds = (_EdgeData * count.value)()
    _check(read(raw, sources, targets, kinds, ctypes.byref(count)))
    for source, target, edge in zip(sources, targets, kinds, strict=True):
        if edge.kind:
            ends = ctypes.byref(ctypes.c_void_p(source)), ctypes.byref(ctypes.c_void_p(target))
            _check(remove(raw, *ends, ctypes.byref(edge), one))
            _check(add(raw, *ends, ctypes.byref(_EdgeData()), one))
            done += 1
    return done


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"the CUDA driver refused to change a graph's edges: error {status}")
