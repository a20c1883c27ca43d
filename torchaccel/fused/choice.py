"""Choosing among kernels that compute the same, by timing them: once for each problem in a process.

Where the notes of an earlier process have the choice, nothing is timed.
"""

import functools
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from contextlib import suppress

import torch

from torchaccel.edges import complete
from torchaccel.failures import contained
from torchaccel.fused.ahead import is_compiling
from torchaccel.fused.notes import note, recall

Run = Callable[[], torch.Tensor]

RUNS_IN_A_GRAPH, REPLAYS = 8, 5
# How far two kernels of one problem may be apart: they round differently, and TF32 counts as float32.
_TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 5e-2, torch.float32: 5e-3, torch.float64: 1e-9}

_chosen: dict[Hashable, str] = {}
_failures: Counter[tuple[str, str]] = Counter()
_times_ms: dict[Hashable, dict[str, float]] = {}
_streams: dict[torch.device, torch.cuda.Stream] = {}  # one for each device: cuBLAS keeps a workspace for every stream
_lock = threading.Lock()


def choose(problem: Hashable, candidates: Mapping[str, Run]) -> str:
    """The name of the fastest candidate; the first is the reference, which always works.

    A candidate that raises anything but want of memory, or is off from the reference, is out. While a graph is being
    captured nothing can be timed: the reference serves then, for this once. So it does while kernels are compiled, and
    the candidates that are Triton's, by their names, have theirs compiled.
    """
    first, *others = candidates
    if is_compiling():
        if problem not in _chosen:
            _compile(candidates)
        return first
    name = _chosen.get(problem)
    if name is None:
        if not others or torch.cuda.is_current_stream_capturing():
            return first
        with _lock:
            name = _chosen.get(problem) or _recalled(problem, candidates) or _fastest(problem, candidates)
            _chosen[problem] = name
    note(problem, name)
    return name


def _compile(candidates: Mapping[str, Run]) -> None:
    for name, run in candidates.items():
        if name.startswith("triton"):
            with contained():  # it is raised once more, and counted, where the kernel is timed
                run()


def failures() -> Counter[tuple[str, str]]:
    """How often which candidate raised what, for whoever wonders why it was not chosen."""
    return Counter(_failures)


def times_ms() -> dict[Hashable, dict[str, float]]:
    """What was timed so far: for each problem the milliseconds of each candidate that was not out."""
    return dict(_times_ms)


def _recalled(problem: Hashable, candidates: Mapping[str, Run]) -> str | None:
    """The candidate that an earlier process chose; None where that is not known, or cannot be run any more."""
    name = recall(problem, _chosen)
    if name not in candidates:
        return None
    with contained(functools.partial(_fail, name)), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        candidates[name]()
        return str(name)
    return None


def _fastest(problem: Hashable, candidates: Mapping[str, Run]) -> str:
    times = _times_ms[problem] = _race(candidates)
    return min(times, key=times.__getitem__)


def _fail(name: str, error: Exception) -> None:
    _failures[name, str(error).partition("\n")[0]] += 1


def _race(candidates: Mapping[str, Run]) -> dict[str, float]:
    """The milliseconds of every candidate that works and is right."""
    (name, run), *others = candidates.items()
    expected = run()
    times = {name: graph_ms(run, expected.device)}
    for name, run in others:
        with contained(functools.partial(_fail, name)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a kernel that cannot take the problem says why before it raises
            if _agree(run(), expected):
                times[name] = graph_ms(run, expected.device)
    return times


def _agree(result: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether a result is the reference's up to rounding; where that is not finite nothing can be said."""
    if not bool(expected.isfinite().all()):
        return True
    error = (result.float() - expected.float()).norm()
    return bool(error <= _TOLERANCE.get(expected.dtype, 1e-5) * expected.float().norm() + 1e-6)


def graph_ms(run: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one run on a GPU, without what launching costs the host: the best of some replays of a graph."""
    side = _streams.setdefault(device, torch.cuda.Stream(device))
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.device(device), torch.cuda.stream(side):
        for _ in range(2):
            run()
        side.synchronize()
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for _ in range(RUNS_IN_A_GRAPH):
                run()
        except BaseException:
            with suppress(RuntimeError), warnings.catch_warnings():  # both say only that the graph is of no use
                warnings.simplefilter("ignore")
                graph.capture_end()
            raise
        graph.capture_end()
        complete(graph)
        graph.replay()
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(REPLAYS)]
        for start, end in events:
            start.record(side)
            graph.replay()
            end.record(side)
        side.synchronize()
    torch.cuda.current_stream(device).wait_stream(side)
    return min(start.elapsed_time(end) for start, end in events) / RUNS_IN_A_GRAPH
