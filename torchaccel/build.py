"""From a call to a gated engine: reference, capture, build, load, CUDA graph, gate."""

import functools
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import nn

from torchaccel.backends.base import Backend, Engine, Plan
from torchaccel.cache.plans import serve
from torchaccel.cache.store import Cache
from torchaccel.capture import capture, engine_input, resize_batch
from torchaccel.diagnosis import Overflow
from torchaccel.errors import AccuracyError, BackendWarning, BuildError, DeviceMemoryError
from torchaccel.failures import as_build_error
from torchaccel.gate import Reference, compare_outputs, reference, reproduced, require, run_module
from torchaccel.interrupts import interruption_point
from torchaccel.memory import release_on_exhaustion
from torchaccel.options import Options
from torchaccel.pool import Pool
from torchaccel.precision import PRECISIONS
from torchaccel.program import Program
from torchaccel.report import EngineRecord
from torchaccel.runner import Runner
from torchaccel.signature import Call, OutputSpec, flatten
from torchaccel.weights import WeightStore

Result = TypeVar("Result")

_NOT_REPRODUCED = (
    "The module does not reproduce its own result: for the same inputs it returned another one at a second run. It "
    "depends on something besides its inputs and weights, such as a global variable, which an engine cannot follow."
)

_RACES = (
    "It passed a moment before, on the same inputs: the engine does not repeat itself, as kernels that race do not. "
    "Another precision or backend has other kernels."
)
_OVERLAPS = (
    "TensorRT-RTX's kernels overlap on this GPU where they must not, unless a CUDA graph keeps them apart. There is "
    "none ({}), and one result in some thousand is wrong, beside other processes one in a hundred. Leave "
    "cuda_graph=True, or take another backend."
)
REPEATS = 8  # further runs in the gate of what runs on a GPU


@dataclass
class Built:
    """A plan, and what a runner needs besides: where the outputs go, and in which dtypes."""

    backend: Backend
    plan: Plan
    dtypes: tuple[torch.dtype, ...]
    outputs: OutputSpec
    record: EngineRecord
    dynamic: bool
    program: Program | None = None  # without weights: what an engine that has its own weights is built again from
    engine: Engine | None = None
    stale: bool = False

    def is_fresh_in_place(self) -> bool:
        """Whether its weights are the store's own tensors, so that refreshing those refreshes it."""
        return self.engine is not None and self.engine.shares_store

    def runner(self, tensors: Sequence[torch.Tensor], pool: Pool, cuda_graph: bool) -> Runner:
        """A runner for the shapes of `tensors`, on an engine that is loaded already or is loaded now.

        Raises `BuildError`, whatever the backend, PyTorch or a kernel raises.
        """
        with as_build_error(self.backend.name, "run"):
            if self.engine is not None:
                engine = self.engine.another()
            else:
                engine = self.backend.load(self.plan, pool.device)
                # A static TensorRT engine has weights of its own, which go when its runner goes; the plan stays.
                self.engine = engine if self.dynamic or engine.shares_store else None
            with torch.inference_mode(False):
                examples = [engine_input(tensor, self.plan.precision.dtype) for tensor in tensors]
            runner = Runner(engine, examples, self.dtypes, self.outputs, pool, describe(tensors), cuda_graph)
        if runner.overlaps:
            warnings.warn(_OVERLAPS.format(runner.record.why_no_graph), BackendWarning, stacklevel=2)
        return runner


@dataclass
class Captured:
    """What the builds of all backends for one call begin with: the program, and what the module itself returns."""

    program: Program  # without weights
    expected: Reference
    dtypes: tuple[torch.dtype, ...]
    outputs: OutputSpec
    export_ms: float

    def copy(self) -> "Captured":
        """The same with a program of its own: a backend rewrites it."""
        return replace(self, program=self.program.copy())


@dataclass
class Builder:
    """Builds the engines of one compiled module, with the first of its backends that can."""

    module: nn.Module
    options: Options
    backends: tuple[Backend, ...]
    store: WeightStore
    cache: Cache | None = None

    def __call__(
        self, call: Call, tensors: Sequence[torch.Tensor], pool: Pool, captured: Captured | None = None
    ) -> tuple[Built, Runner]:
        """A gated plan and its first runner for a call whose tensors, on the device, are `tensors`.

        A failed build or gate, whatever was raised, moves on to the next backend, which only `fallback=` adds, and the
        record says why; where the last one fails too, its error does.
        """
        if captured is None:
            captured = self.capture(call, tensors, pool)
        reason, ran_out = "", False
        for backend in self.backends[:-1]:
            attempt = functools.partial(self._attempt, backend, captured.copy(), call, tensors, pool, reason)
            try:
                return self._or_release(attempt, tensors, pool)
            except (BuildError, AccuracyError) as error:
                reason, ran_out = f"{backend.name} failed: {error}", isinstance(error, DeviceMemoryError)
        attempt = functools.partial(self._attempt, self.backends[-1], captured, call, tensors, pool, reason)
        try:
            return self._or_release(attempt, tensors, pool)
        except (BuildError, AccuracyError) as error:
            if reason:
                error.args = (f"{error}\nIt is the fallback, since {reason}",)
            if ran_out:  # with more of it there would have been an engine
                raise DeviceMemoryError(str(error)) from None
            raise

    def capture(self, call: Call, tensors: Sequence[torch.Tensor], pool: Pool) -> Captured:
        """The module captured for a call, which takes most of the time that a build from the cache does."""
        return self._or_release(functools.partial(self._capture, call, tensors), tensors, pool)

    def _or_release(self, work: Callable[[], Result], tensors: Sequence[torch.Tensor], pool: Pool) -> Result:
        return release_on_exhaustion(work, describe(tensors), pool.device, self.options.max_runners)

    def _capture(self, call: Call, tensors: Sequence[torch.Tensor]) -> Captured:
        options, expected = self.options, reference(self.module, call, tensors)
        started = time.perf_counter()
        program = capture(
            self.module,
            call,
            tensors,
            PRECISIONS[options.precision],
            keep_fp32=options.keep_fp32,
            dynamic_batch=options.dynamic_batch,
        )
        export_ms = (time.perf_counter() - started) * 1e3
        interruption_point()
        dtypes = self._dtypes(call, tensors, program.outputs.computed(expected.leaves), program.outputs)
        return Captured(program, expected, dtypes, expected.output_spec(program.outputs), export_ms)

    def _attempt(  # noqa: PLR0917
        self, backend: Backend, captured: Captured, call: Call, tensors: Sequence[torch.Tensor], pool: Pool, reason: str
    ) -> tuple[Built, Runner]:
        """Build; whatever stops it, the store keeps no weights of an engine that did not come to be."""
        held = self.store.rules()
        try:
            return self._build(backend, captured, call, tensors, pool, reason)
        except BaseException:
            self.store.keep(held)
            raise

    def _build(  # noqa: PLR0917
        self, backend: Backend, captured: Captured, call: Call, tensors: Sequence[torch.Tensor], pool: Pool, reason: str
    ) -> tuple[Built, Runner]:
        options, program = self.options, captured.program
        signature, sizes = describe(tensors), options.dynamic_batch
        signature += f", batch {sizes[0]} to {sizes[2]}" if sizes else ""
        record = EngineRecord(signature, backend.name, options.precision, fell_back_because=reason)
        record.export_ms, record.folded_batch_norms = captured.export_ms, program.folded
        with as_build_error(backend.name, "built"):
            backend.lower(program)

        def load(plan: Plan) -> tuple[Built, Runner]:
            dynamic = options.dynamic_batch is not None
            built = Built(backend, plan, captured.dtypes, captured.outputs, record, dynamic)
            return built, self._load(built, program, call, tensors, captured.expected, pool)

        what = f"{type(self.module).__name__} {record.signature}"
        try:
            self._take_weights(backend, program)
            return serve(backend, program, options, pool.device, cache=self.cache, what=what, record=record, load=load)
        except BaseException:
            program.drop_weights()  # whoever holds the error may hold the program
            raise

    def rebuild(self, built: Built, call: Call, tensors: Sequence[torch.Tensor], pool: Pool) -> Runner:
        """Build a stale plan again, for the weights of now, from the program that it left; returns its first runner.

        Nothing is captured anew, and what PyTorch specialises is in the kernel cache. It is gated like any other, and
        fails like any other: with `BuildError` or `AccuracyError`.
        """
        assert built.program is not None
        program = built.program
        expected = reference(self.module, call, tensors)
        program.inputs = tuple(engine_input(tensor, built.plan.precision.dtype) for tensor in tensors)
        try:
            self._take_weights(built.backend, program)
            with as_build_error(built.backend.name, "built again"):
                built.plan = built.backend.rebuild(built.plan, program, pool.device, partial=self.options.partial)
            built.engine, built.record.gates = None, ()
            runner = self._load(built, program, call, tensors, expected, pool)
        except BaseException:
            program.drop_weights()
            raise
        built.stale = False
        return runner

    def _take_weights(self, backend: Backend, program: Program) -> None:
        store = self.store if backend.native else WeightStore()  # a TensorRT engine has weights of its own
        program.take_weights(store, self.module, channels_last=backend.channels_last)

    def _load(  # noqa: PLR0917
        self,
        built: Built,
        program: Program,
        call: Call,
        tensors: Sequence[torch.Tensor],
        expected: Reference,
        pool: Pool,
    ) -> Runner:
        """Load a plan into its first runner, and gate it; then the program rests without weights."""
        options, record = self.options, built.record
        with _timed(record, "load_ms"):
            runner = built.runner(tensors, pool, options.cuda_graph)
        record.library = built.plan.library
        _measure_outside(record, runner)
        with _timed(record, "gate_ms"):
            if options.dynamic_batch is None:
                self._gate(built, runner, call, tensors, expected.leaves)
            for size in sorted(set(options.dynamic_batch or ())):
                resized = resize_batch(tensors, program.batched, size)
                again = reference(self.module, call, resized).leaves
                sized = built.runner(resized, pool, options.cuda_graph)
                self._gate(built, sized, call, resized, again, batch=size)
        if built.is_fresh_in_place():
            program.drop_examples()
        else:
            program.drop_weights()
            built.program = program
        return runner

    def _gate(
        self,
        built: Built,
        runner: Runner,
        call: Call,
        tensors: Sequence[torch.Tensor],
        leaves: Sequence[object],
        *,
        batch: int | None = None,
    ) -> None:
        """Compare what a runner returns, its graph and casts included, with the leaves of the module's own result."""
        outputs = _checked(built.backend, runner, tensors)
        dtypes = [tensor.dtype for tensor in (*tensors, *self.module.parameters(), *self.module.buffers())]
        bound = self.options.bound_beside(dtypes)
        expected = built.outputs.computed(leaves)
        gate = compare_outputs(outputs, expected, bound, batch)
        built.record.gates += (gate,)
        advice = "" if gate.passed else self._advice(built, call, tensors, leaves, gate.not_finite)
        require(gate, built.backend.name, self.options.precision, advice)
        on_cpu = built.backend.native and tensors[0].is_cpu
        for _ in range(0 if on_cpu else REPEATS):
            again = _checked(built.backend, runner, tensors)
            if not all(map(torch.equal, again, outputs)):
                require(
                    compare_outputs(again, expected, bound, batch), built.backend.name, self.options.precision, _RACES
                )
        if any(output.is_zero for output in gate.outputs):
            warnings.warn(
                f"{type(self.module).__name__} returns next to nothing but zeros for these inputs, so comparing them "
                f"with the engine's outputs proves little: build with real weights and real inputs.",
                BackendWarning,
                stacklevel=2,
            )

    def _advice(
        self, built: Built, call: Call, tensors: Sequence[torch.Tensor], leaves: Sequence[object], not_finite: bool
    ) -> str:
        """What running the module in PyTorch tells of a failed check; "" where it tells nothing."""
        options, is_half = self.options, self.options.precision == "fp16"
        with suppress(RuntimeError):  # PyTorch may lack a kernel at this precision, or memory: then the figures must do
            if not reproduced(leaves, reference(self.module, call, tensors).leaves):
                return _NOT_REPRODUCED + _training_modes(self.module)
            if not_finite or is_half:
                wider = PRECISIONS["bf16"] if is_half else None
                if wider and built.backend.honours(wider, tensors[0].device):
                    wider = None
                overflow = Overflow(self.module, call, tensors, leaves, built.outputs, seen=not_finite)
                return overflow.advice(PRECISIONS[options.precision], options.tolerance, options.keep_fp32, wider)
        return ""

    def _dtypes(
        self,
        call: Call,
        tensors: Sequence[torch.Tensor],
        expected: Sequence[torch.Tensor],
        program: OutputSpec,
    ) -> tuple[torch.dtype, ...]:
        """The dtypes that the module would return: under the caller's autocast, if it is on."""
        if call.autocast is None:
            return tuple(output.dtype for output in expected)
        leaves, _ = flatten(run_module(self.module, call, tensors, tf32=False, autocast=True))
        return tuple(output.dtype for output in program.computed(leaves))


def describe(tensors: Sequence[torch.Tensor]) -> str:
    """The shapes and dtypes of a call's tensors, such as `float32[8, 3, 224, 224]`."""
    return ", ".join(f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in tensors)


def _training_modes(module: nn.Module) -> str:
    """What to do about submodules that are in training mode while the module is not; "" where there are none."""
    names = [repr(name) for name, child in module.named_modules() if name and child.training]
    return f" Its submodules {', '.join(names)} are in training mode: call eval() on them." if names else ""


def _measure_outside(record: EngineRecord, runner: Runner) -> None:
    """Let the record say what the operators outside engines cost, if there are any."""
    coverage = record.coverage
    if coverage is None or not coverage.outside:
        return
    with suppress(Exception):  # what cannot be run node by node has no figures, and serves all the same
        coverage.outside_time_shares = runner.outside_time_shares()
        coverage.outside_time_share = sum(coverage.outside_time_shares.values())


def _checked(backend: Backend, runner: Runner, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What an engine computes at one of its first runs; what is raised there, memory included, makes it no engine."""
    with torch.inference_mode(False), torch.no_grad(), as_build_error(backend.name, "run"):
        return runner.check(tensors)


@contextmanager
def _timed(record: EngineRecord, name: str) -> Iterator[None]:
    """A step of a build: its time goes into the record, and an interrupt that came meanwhile is raised at its end."""
    started = time.perf_counter()
    yield
    setattr(record, name, (time.perf_counter() - started) * 1e3)
    interruption_point()
