"""cuDNN's convolutions with their epilogue, each by the fastest of its plans, where cuDNN's graph API is there.

PyTorch takes the first plan of cuDNN's heuristic; there are 25 to 80 for each layer, and the best of them takes as
little as a tenth of the time. The API is that of the package nvidia-cudnn-frontend, which is optional; it is made for
tensors of fp16 and bf16 with sums in fp32.
"""

import functools
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch

from torchaccel.failures import contained
from torchaccel.fused.choice import graph_ms
from torchaccel.fused.cudnn_graphs import ACTIVATIONS, BIAS, DTYPES, RESIDUAL, WEIGHT, Problem, X, Y, operations
from torchaccel.fused.notes import note, recall
from torchaccel.fused.tensors import aligned
from torchaccel.probes import import_problem

MAX_WORKSPACE_BYTES = 256 << 20
# Those with ReLU or none take less than a second in all. With other activations cuDNN compiles them, most of a second
# each: what its heuristic proposes first has to do.
ENOUGH_BUILDING_S = 2.0
# One run that takes this much longer than the best so far is not looked at any further.
_HOPELESS, _LAUNCH_MS = 2.0, 0.05

_handles: dict[torch.device, int] = {}
_plans: dict[Hashable, "Plan | None"] = {}
_lock = threading.RLock()


@functools.cache
def problem() -> str | None:
    """Why plans cannot be chosen here; None where they can."""
    if reason := import_problem("cudnn"):
        return f"{reason} (pip install nvidia-cudnn-frontend)" if "not installed" in reason else reason
    import cudnn

    if not hasattr(cudnn, "pygraph"):
        return "`import cudnn` gives another package than nvidia-cudnn-frontend's"
    theirs, own = cudnn.backend_version(), torch.backends.cudnn.version()
    return None if theirs == own else f"nvidia-cudnn-frontend has loaded cuDNN {theirs}, and PyTorch has {own}"


class Plan:
    """One execution plan; called with the tensors of its problem, it can be captured in a CUDA graph."""

    def __init__(self, problem: Problem, graph: Any, index: int) -> None:
        self._problem, self._graph, self.index = problem, graph, index
        self._workspace_bytes = max(1, graph.get_workspace_size_plan_at_index(index))
        self.name = graph.get_plan_name_at_index(index)

    def __call__(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None
    ) -> torch.Tensor:
        """The convolution's result, a new channels-last tensor."""
        y = torch.empty(self._problem.y, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        workspace = torch.empty(self._workspace_bytes, dtype=torch.uint8, device=x.device)
        if not torch.cuda.is_current_stream_capturing():
            workspace[:1].fill_(0)  # a kernel for this one to overlap with, as some do (edges.py), which does no harm
        given = {X: x, WEIGHT: weight, BIAS: bias, RESIDUAL: residual, Y: y}
        tensors = {uid: aligned(tensor) for uid, tensor in given.items() if tensor is not None}
        pointers = {uid: tensor.data_ptr() for uid, tensor in tensors.items()}
        with _lock:
            handle = _handle(x.device)
            self._graph.execute_plan_at_index(pointers, workspace.data_ptr(), self.index, handle)
        return y


Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]


def run(problem_: Problem, tensors: Tensors, expected: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The result by the fastest plan; raises `RuntimeError` where cuDNN has none."""
    plan = best_plan(problem_, lambda plan: plan(*tensors), expected)
    if plan is None:
        raise RuntimeError(f"cuDNN has no plan for {problem_}")
    return plan(*tensors)


def best_plan(
    problem_: Problem, example: Callable[[Plan], torch.Tensor], expected: Callable[[], torch.Tensor]
) -> Plan | None:
    """The fastest plan for a problem, remembered for the process; None where cuDNN has none.

    `example` runs a plan on tensors of the problem, for which it must give what `expected` does. A plan that the notes
    of an earlier process have is built and run alone; where cuDNN has it no longer, all are searched.
    """
    with _lock:
        if problem_ not in _plans:
            _plans[problem_] = _recalled(problem_, example) or _search(problem_, example, expected())
        plan = _plans[problem_]
    if plan is not None:
        note(problem_, [plan.index, plan.name])
    return plan


def possible(x: torch.Tensor) -> bool:
    """Whether cuDNN can take any epilogue into what reads `x`: its graph API is there, for the GPU and the dtype."""
    return x.device.type == "cuda" and x.dtype in DTYPES and problem() is None


def takes(x: torch.Tensor, activation: str) -> bool:
    """Whether there may be plans for such an input and activation."""
    return x.dtype in DTYPES and activation in ACTIVATIONS and x.numel() > 0 and problem() is None


def _recalled(problem_: Problem, example: Callable[[Plan], torch.Tensor]) -> Plan | None:
    """The plan that an earlier process chose, once it has run; None where that is not known, or it is not to be had."""
    known = recall(problem_, _plans)
    if known is None:
        return None
    with contained():
        plan = _only(problem_, *known)
        if plan is not None:
            example(plan)
        return plan
    return None


def _search(problem_: Problem, example: Callable[[Plan], torch.Tensor], expected: torch.Tensor) -> Plan | None:
    best: tuple[float, int, str] | None = None
    graph = None
    with contained():
        graph = _graph(problem_)
    if graph is None:
        return None
    for plan in _built(problem_, graph):
        with contained():
            plan_ms = _plan_ms(functools.partial(example, plan), expected, best[0] if best else None)
            if plan_ms is not None and (best is None or plan_ms < best[0]):
                best = plan_ms, plan.index, plan.name
    if best is None:
        return None
    return _alone(problem_, graph, best)


def _plan_ms(run: Callable[[], torch.Tensor], expected: torch.Tensor, best_ms: float | None) -> float | None:
    """Milliseconds of a plan; None where it is wrong, or so slow that two runs are enough to tell."""
    device = expected.device
    roughly = min(_one_run_ms(run, device), _one_run_ms(run, device))
    if best_ms is not None and roughly > _HOPELESS * best_ms + _LAUNCH_MS:
        return None
    return graph_ms(run, device) if _close(run(), expected) else None


def _alone(problem_: Problem, graph: Any, best: tuple[float, int, str]) -> Plan:
    """The best plan in a graph of its own, so that the others' kernels can be unloaded."""
    _, index, name = best
    plan = None
    with contained():
        plan = _only(problem_, index, name)
    return plan or Plan(problem_, graph, index)


def _only(problem_: Problem, index: int, name: str) -> Plan | None:
    """The plan of that number, built in a new graph; None where cuDNN has another one there."""
    graph = _graph(problem_)
    if index >= graph.get_execution_plan_count() or graph.get_plan_name_at_index(index) != name:
        return None
    graph.build_plan_at_index(index)
    return Plan(problem_, graph, index)


def _built(problem_: Problem, graph: Any) -> Iterator[Plan]:
    """The plans that cuDNN can build, each once, within the bounds on workspace and on the time that building takes."""
    seen, spent_s = set(), 0.0
    for index in range(graph.get_execution_plan_count()):
        if spent_s > ENOUGH_BUILDING_S:
            return
        plan = None
        with contained():
            name = graph.get_plan_name_at_index(index)
            if name in seen:
                continue
            seen.add(name)
            begun_s = time.perf_counter()
            try:
                graph.build_plan_at_index(index)
            finally:
                spent_s += time.perf_counter() - begun_s
            if graph.get_workspace_size_plan_at_index(index) <= MAX_WORKSPACE_BYTES:
                plan = Plan(problem_, graph, index)
        if plan is not None:
            yield plan


def _graph(problem_: Problem) -> Any:
    """cuDNN's graph of the problem, with the plans that its heuristics propose, none of them built yet."""
    import cudnn

    graph = operations(problem_, _handle(problem_.device))
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.B, cudnn.heur_mode.FALLBACK])
    graph.deselect_numeric_notes([getattr(cudnn.numerical_note, name) for name in _UNWANTED])
    return graph


# What would make results depend on the run, or less exact than sums in fp32.
_UNWANTED = ("NONDETERMINISTIC", "DOWN_CONVERT_INPUTS", "REDUCED_PRECISION_REDUCTION", "FFT", "WINOGRAD")


def _handle(device: torch.device) -> int:
    """A handle for the device, on the current stream; hold the lock until what is enqueued with it is."""
    import cudnn

    with torch.cuda.device(device):
        handle = _handles.get(device)
        if handle is None:
            handle = _handles[device] = cudnn.create_handle()
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(device).cuda_stream)
    return handle


def _one_run_ms(run: Callable[[], object], device: torch.device) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    stream = torch.cuda.current_stream(device)
    start.record(stream)
    run()
    end.record(stream)
    end.synchronize()
    return start.elapsed_time(end)


def _close(y: torch.Tensor, expected: torch.Tensor) -> bool:
    bound = 1e-2 if y.dtype is torch.float16 else 5e-2
    return bool((y.float() - expected.float()).norm() <= bound * expected.float().norm())
