"""The program rewritten for cuDNN's fused convolutions and kernels of our own; Inductor for the rest, if it is faster.

Its weights are the store's own tensors: where one has another form than the module's (a padded first layer, merged
biases), a rule says so, and a refresh writes it in place.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from torchaccel.backends.base import Engine, NativeBackend, NativeEngine, Plan
from torchaccel.errors import BuildError
from torchaccel.failures import contained
from torchaccel.fused.notes import begun, note, recall
from torchaccel.precision import Precision
from torchaccel.probes import triton_problem
from torchaccel.program import Program
from torchaccel.quiet import quiet


class Fused(NativeBackend):
    """The rewritten program, operator by operator or through Inductor, whichever is faster on the GPU.

    `passes` are those of `torchaccel.fused.passes` to run, all by default; `routes` the ways to run what they leave.
    """

    name = "fused"
    compiles = True

    def __init__(self, passes: Sequence[Any] | None = None, routes: Sequence[str] = ("plain", "inductor")) -> None:
        self._passes = passes
        self._routes = tuple(routes)

    def unavailable(self) -> str | None:
        """Its kernels on a GPU are compiled by Triton; on a CPU it is PyTorch's own operators."""
        problem = triton_problem()
        return f"the fused backend's kernels need Triton on a GPU: {problem}" if problem else None

    def lower(self, program: Program) -> None:
        """Run the passes."""
        from torchaccel.fused.passes import PASSES, rewrite

        rewrite(program, PASSES if self._passes is None else self._passes)

    def chooses(self, device: torch.device) -> bool:
        """On a GPU: its kernels and the route."""
        return device.type == "cuda"

    def load(self, plan: Plan, device: torch.device) -> Engine:
        """Choose every kernel by a first run on the program's own examples, then the route that is faster.

        The route of an earlier process is the only one that is run, unless it fails.
        """
        program: Program = plan.payload
        routes = _tried(self._routes, program, device)
        known = _known(routes, program, plan.precision)
        if device.type == "cuda" and not begun():
            _compile_kernels(program, plan.precision)
        engine, found = known or _fastest(routes, program, plan.precision, device)
        if len(routes) > 1:
            note(("route", routes), found)
        plan.manifest |= found
        plan.library = f"PyTorch {torch.__version__} ({_story(found, device, from_cache=known is not None)})"
        return engine


class FusedEngine(NativeEngine):
    """Runs the rewritten program, whose inputs may have more channels than the module's.

    A runner's buffer then is a view of a wider one, in which the rest is zero: nothing is padded at a call.
    """

    def __init__(self, run: Any, precision: Precision, program: Program) -> None:
        super().__init__(run, precision, program)
        self._channels = _widened_inputs(program)

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run it on buffers of its own, or on any other tensors, which are padded first."""
        given = list(inputs)
        for index, channels in self._channels.items():
            wide = getattr(given[index], _WIDE, None)
            given[index] = _pad(given[index], channels) if wide is None else wide
        return super().__call__(*given)

    def input_buffer(self, index: int, example: torch.Tensor) -> torch.Tensor:
        """A buffer for an input; a view of a wider one where the program wants more channels."""
        if index not in self._channels:
            return super().input_buffer(index, example)
        wide = _pad(example.detach(), self._channels[index])
        buffer = wide[:, : example.shape[1]]
        setattr(buffer, _WIDE, wide)
        return buffer


_WIDE = "_torchaccel_wide"


def _pad(tensor: torch.Tensor, channels: int) -> torch.Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return torch.ops.torchaccel.pad_channels(tensor, channels)


def _widened_inputs(program: Program) -> dict[int, int]:
    """Which inputs have more channels in the rewritten program than the module's, and how many."""
    nodes = {node.name: node for node in program.exported.graph.nodes if node.op == "placeholder"}
    shapes = [nodes[name].meta["val"].shape for name in program.exported.graph_signature.user_inputs]
    pairs = enumerate(zip(shapes, program.inputs, strict=True))
    return {index: wanted[1] for index, (wanted, given) in pairs if given.dim() == 4 and given.shape[1] != wanted[1]}


def _known(routes: tuple[str, ...], program: Program, precision: Precision) -> tuple[Engine, dict[str, Any]] | None:
    """What `_fastest` gave an earlier process, once the engine has run; None where there is none that runs."""
    found = recall(("route", routes)) if len(routes) > 1 else None
    if found is None or found["route"] not in routes:
        return None
    with contained():
        return _first_run(found["route"], program, precision)[0], found
    return None


def _fastest(
    routes: tuple[str, ...], program: Program, precision: Precision, device: torch.device
) -> tuple[Engine, dict[str, Any]]:
    """The engine of the fastest route, and what a manifest says of all; raises `BuildError` where none can be run."""
    engines: dict[str, Engine] = {}
    times_ms: dict[str, float] = {}
    failures: dict[str, str] = {}
    for route in routes:
        with contained(functools.partial(_fail, failures, route)):
            engine, inputs = _first_run(route, program, precision)
            times_ms[route] = _time_ms(engine, inputs, device) if len(routes) > 1 else 0.0
            engines[route] = engine
    if not engines:
        reasons = "; ".join(f"{route}: {reason}" for route, reason in failures.items())
        raise BuildError(f"the rewritten program could not be run ({reasons})")
    chosen = min(engines, key=lambda route: times_ms[route])
    return engines[chosen], {"route": chosen, "routes_ms": times_ms, "routes_failed": failures}


def _fail(failures: dict[str, str], route: str, error: Exception) -> None:
    failures[route] = f"{type(error).__name__}: {error}"


def _compile_kernels(program: Program, precision: Precision) -> None:
    """Have Triton compile, many at once, all kernels that will be timed: by a run of the program on PyTorch's own."""
    from torchaccel.fused.ahead import compiling

    with contained(), compiling():  # where the routes fail too, they say so
        _first_run("plain", program, precision)


def _first_run(route: str, program: Program, precision: Precision) -> tuple[Engine, list[torch.Tensor]]:
    """An engine that has run once, in which its kernels are chosen; and the inputs of that run."""
    engine = FusedEngine(_ROUTES[route](program), precision, program)
    inputs = [engine.input_buffer(index, tensor) for index, tensor in enumerate(program.inputs)]
    with quiet():
        engine(*inputs)
    return engine, inputs


def _story(found: dict[str, Any], device: torch.device, *, from_cache: bool) -> str:
    """Which route serves, what became of the others, and why cuDNN's plans were not timed, if they were not."""
    from torchaccel.fused import cudnn_plans

    times_ms, failures = found["routes_ms"], found["routes_failed"]
    others = ["chosen by an earlier process"] if from_cache else []
    others += [f"{route} {time:.3f} ms" for route, time in times_ms.items() if len(times_ms) > 1]
    others += [f"{route} failed: {reason.splitlines()[0]}" for route, reason in failures.items()]
    if device.type == "cuda" and (reason := cudnn_plans.problem()):
        others.append(f"without cuDNN's own plans: {reason}")
    return "; ".join([f"{found['route']} route", *others])


def _plain(program: Program) -> Any:
    return program.exported.module(check_guards=False)


def _inductor(program: Program) -> Any:
    return torch.compile(_plain(program), fullgraph=True, dynamic=program.batch is not None)


def _inductor_gemm(program: Program) -> Any:
    options: dict[str, Any] = {"max_autotune_gemm": True, "coordinate_descent_tuning": True}
    return torch.compile(_plain(program), fullgraph=True, dynamic=program.batch is not None, options=options)


_ROUTES: dict[str, Callable[[Program], Any]] = {
    "plain": _plain,
    "inductor": _inductor,
    "inductor_gemm": _inductor_gemm,
}
# What Inductor has nothing to gain from: it calls the same kernels, or only changes the shape of what it is given.
_NO_WORK = {"linear", "flatten", "view", "reshape", "permute", "transpose", "squeeze", "unsqueeze", "dropout", "matmul"}


def _tried(routes: tuple[str, ...], program: Program, device: torch.device) -> tuple[str, ...]:
    """The routes to time: on a CPU, and where Inductor would find nothing to merge, the first alone.

    So also for a dynamic batch: the times at one size say little of the others.
    """
    can_gain = device.type == "cuda" and program.batch is None and _leaves_work(program)
    return routes if can_gain else routes[:1]


def _leaves_work(program: Program) -> bool:
    """Whether there are operators that Inductor could merge."""
    operators = [node.target for node in program.exported.graph.nodes if node.op == "call_function"]
    rest = [target for target in operators if getattr(target, "namespace", "aten") != "torchaccel"]
    return any(str(target).split(".")[1] not in _NO_WORK for target in rest)


def _time_ms(engine: Engine, inputs: Sequence[torch.Tensor], device: torch.device) -> float:
    from torchaccel.fused.choice import graph_ms

    return graph_ms(lambda: engine(*inputs), device)
