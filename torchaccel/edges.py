"""The edges of a captured CUDA graph: which kernels wait for which.

TensorRT-RTX launches kernels programmatically dependent: one may begin before the one ahead of it has ended, and waits
by itself for what it needs. Some of its kernels do not wait; with full edges between them none can begin early.
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

    Returns how many were not. Raises RuntimeError where the driver has no such call (before CUDA 12.3) or refuses it.
    """
    raw, done = ctypes.c_void_p(graph.raw_cuda_graph()), 0
    sources, targets, kinds = _edges(raw)
    for index, edge in enumerate(kinds):
        if edge.kind:
            one = ctypes.byref(sources, index * ctypes.sizeof(ctypes.c_void_p))
            other = ctypes.byref(targets, index * ctypes.sizeof(ctypes.c_void_p))
            _call("cuGraphRemoveDependencies_v2", raw, one, other, ctypes.byref(edge), ctypes.c_size_t(1))
            _call("cuGraphAddDependencies_v2", raw, one, other, ctypes.byref(_EdgeData()), ctypes.c_size_t(1))
            done += 1
    graph.instantiate()
    return done


def _edges(raw: ctypes.c_void_p) -> tuple[Any, Any, Any]:
    """From where, to where, and of what kind: an array each."""
    count = ctypes.c_size_t()
    _call("cuGraphGetEdges_v2", raw, None, None, None, ctypes.byref(count))
    size = count.value
    arrays = (ctypes.c_void_p * size)(), (ctypes.c_void_p * size)(), (_EdgeData * size)()
    _call("cuGraphGetEdges_v2", raw, *arrays, ctypes.byref(count))
    return arrays


def _call(name: str, *arguments: Any) -> None:
    try:
        function = getattr(ctypes.CDLL("libcuda.so.1"), name)
    except (OSError, AttributeError) as error:
        raise RuntimeError(f"this CUDA driver has no {name}: update it to CUDA 12.3 or later") from error
    if status := function(*arguments):
        raise RuntimeError(f"{name} failed with CUDA error {status}")
