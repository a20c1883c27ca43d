"""From a call to a gated engine, and what happens when a step fails."""

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers import Lambda, relative_error
from tests.models import small_conv_net
from torchaccel.backends.base import Backend, Engine, NativeEngine, Plan
from torchaccel.backends.eager import Eager
from torchaccel.build import Builder, Built, describe
from torchaccel.errors import AccuracyError, BackendWarning, BuildError, DeviceMemoryError
from torchaccel.options import Options
from torchaccel.pool import Pool
from torchaccel.precision import Precision
from torchaccel.program import Program
from torchaccel.runner import Runner
from torchaccel.signature import read_call
from torchaccel.weights import WeightStore

CPU = torch.device("cpu")


class Refuses(Eager):
    """A backend whose build fails."""

    name = "refuses"

    def build(self, program: Program, precision: Precision, device: torch.device, *, partial: bool = False) -> Plan:
        raise BuildError("Sort ×2 is too hard")


class Wrong(Eager):
    """A backend whose engine is wrong for batches from `wrong_from` on."""

    name = "wrong"

    def __init__(self, wrong_from: int = 0) -> None:
        self.wrong_from = wrong_from

    def load(self, plan: Plan, device: torch.device) -> Engine:
        module = plan.payload.exported.module(check_guards=False)

        def run(*inputs: torch.Tensor) -> list[torch.Tensor]:
            scale = 2.0 if len(inputs[0]) >= self.wrong_from else 1.0
            return [result * scale for result in module(*inputs)]

        return NativeEngine(run, plan.precision)


class OutOfResources(Exception):
    """What Triton raises where a kernel does not fit a GPU, which is no RuntimeError either."""


class Broken(Eager):
    """A backend that raises an error of another library's at a step."""

    name = "broken"

    def __init__(self, step: str, error: BaseException | None = None) -> None:
        self.step, self.error = step, error or OutOfResources("out of resource: shared memory")

    def _reach(self, step: str) -> None:
        if step == self.step:
            raise self.error

    def lower(self, program: Program) -> None:
        self._reach("lower")
        super().lower(program)

    def build(self, program: Program, precision: Precision, device: torch.device, *, partial: bool = False) -> Plan:
        self._reach("build")
        return super().build(program, precision, device, partial=partial)

    def load(self, plan: Plan, device: torch.device) -> Engine:
        self._reach("load")
        engine: Any = super().load(plan, device)
        real, runs = engine._run, itertools.count(1)

        def run(*inputs: torch.Tensor) -> Any:
            self._reach(f"run {next(runs)}")
            return real(*inputs)

        engine._run = run
        return engine


STEPS = ("lower", "build", "load", "run 1")


def build(
    module: nn.Module, x: Any, *backends: Backend, options: Options | None = None, store: WeightStore | None = None
) -> tuple[Built, Runner, Builder]:
    builder = Builder(module, options or Options("fp32", device=CPU), backends or (Eager(),), store or WeightStore())
    call = read_call((x,), {})
    built, runner = builder(call, call.tensors, Pool(CPU))
    return built, runner, builder


def test_a_built_engine_has_a_runner_a_record_and_a_gate() -> None:
    module, x = small_conv_net(), torch.randn(2, 3, 8, 8)
    built, runner, builder = build(module, x)
    with torch.no_grad():
        assert relative_error(runner([x])[0], module(x)) < 1e-6
    record = built.record
    assert (record.backend, record.precision, record.signature) == ("eager", "fp32", "float32[2, 3, 8, 8]")
    assert record.folded_batch_norms == 2
    assert record.fell_back_because == ""
    (gate,) = record.gates
    assert gate.passed
    assert gate.batch is None
    assert record.export_ms > 0
    assert record.gate_ms > 0
    assert not built.dynamic
    assert built.is_fresh_in_place()
    assert builder.store.size_bytes() > 0
    assert runner.record.calls == 1, "the gate's run is no call"
    assert all(example.is_meta for example in built.plan.payload.inputs), "what it was captured on is let go"


def test_a_failed_build_is_raised_where_no_fallback_is_given() -> None:
    with pytest.raises(BuildError, match="Sort ×2 is too hard"):
        build(small_conv_net(), torch.randn(2, 3, 8, 8), Refuses())


def test_a_fallback_is_tried_after_a_failed_build_and_the_record_says_why() -> None:
    built, _, _ = build(small_conv_net(), torch.randn(2, 3, 8, 8), Refuses(), Eager())
    assert built.backend.name == "eager"
    assert built.record.backend == "eager"
    assert built.record.fell_back_because == "refuses failed: Sort ×2 is too hard"


def test_a_fallback_is_tried_after_a_failed_gate_with_its_figures() -> None:
    built, _, _ = build(small_conv_net(), torch.randn(2, 3, 8, 8), Wrong(), Eager())
    assert built.record.backend == "eager"
    assert "wrong failed" in built.record.fell_back_because
    assert "relative error 1 (bound 1e-05)" in built.record.fell_back_because


class Rewrites(Refuses):
    """A backend that rewrites the program before its build fails."""

    def lower(self, program: Program) -> None:
        for node in program.exported.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default):
            node.replace_all_uses_with(node.args[0])

    def build(self, program: Program, precision: Precision, device: torch.device, *, partial: bool = False) -> Plan:
        self.program = program
        return super().build(program, precision, device, partial=partial)


def test_a_fallback_has_the_program_as_it_was_captured() -> None:
    built, _, _ = build(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(2, 4), Rewrites(), Eager())
    assert built.record.gates[0].passed


def test_a_failed_build_leaves_the_weights_of_its_program_to_nobody() -> None:
    backend = Rewrites()
    with pytest.raises(BuildError):
        build(nn.Linear(4, 4), torch.randn(2, 4), backend)
    assert backend.program.rules
    held = {**backend.program.exported.state_dict, **backend.program.exported.constants}
    assert all(held[name].is_meta for name in backend.program.rules)


def test_the_error_of_the_last_backend_is_raised() -> None:
    with pytest.raises(AccuracyError, match="wrong engine"):
        build(small_conv_net(), torch.randn(2, 3, 8, 8), Refuses(), Wrong())


@pytest.mark.parametrize("step", STEPS)
def test_whatever_a_backend_raises_at_any_step_is_a_failed_build(step: str) -> None:
    broken = Broken(step)
    with pytest.raises(BuildError, match=r"the broken engine could not be .*\(OutOfResources\): out of res") as caught:
        build(small_conv_net(), torch.randn(2, 3, 8, 8), broken)
    assert caught.value.__cause__ is broken.error
    built, _, _ = build(small_conv_net(), torch.randn(2, 3, 8, 8), broken, Eager())
    assert built.record.backend == "eager"
    assert "broken failed: the broken engine could not be" in built.record.fell_back_because


def test_what_an_engine_raises_at_another_size_of_its_batch_is_a_failed_build() -> None:
    with pytest.raises(BuildError, match=r"broken engine could not be run \(OutOfResources\)"):
        build(small_conv_net(), torch.randn(2, 3, 8, 8), Broken("run 3"), options=dynamic(1, 2, 8))


@pytest.mark.parametrize("step", STEPS)
def test_neither_want_of_memory_nor_an_interrupt_is_a_failed_build(step: str) -> None:
    module, x = small_conv_net(), torch.randn(2, 3, 8, 8)
    with pytest.raises(DeviceMemoryError, match="out of memory on cpu"):
        build(module, x, Broken(step, MemoryError()))
    with pytest.raises(KeyboardInterrupt):
        build(module, x, Broken(step, KeyboardInterrupt()), Eager())


def test_an_engine_that_cannot_be_run_for_another_signature_is_a_build_error() -> None:
    module = small_conv_net()
    built, runner, _ = build(module, torch.randn(2, 3, 8, 8), options=dynamic(1, 2, 8))

    def another() -> Engine:
        raise OutOfResources("out of resource: shared memory")

    built.engine.another = another  # type: ignore[union-attr, method-assign]
    with pytest.raises(BuildError, match="the eager engine could not be run"):
        built.runner([torch.randn(5, 3, 8, 8)], runner.pool, cuda_graph=False)


def test_where_the_fallback_fails_too_the_error_has_both_reasons() -> None:
    with pytest.raises(AccuracyError, match=r"(?s)the wrong engine.*fallback, since refuses failed: Sort ×2 is too"):
        build(small_conv_net(), torch.randn(2, 3, 8, 8), Refuses(), Wrong())


def test_where_the_fallback_of_one_that_had_no_memory_fails_too_the_error_is_for_want_of_memory() -> None:
    said = r"(?s)the wrong engine.*relative error.*fallback, since broken failed: out of memory on cpu"
    with pytest.raises(DeviceMemoryError, match=said):
        build(small_conv_net(), torch.randn(2, 3, 8, 8), Broken("load", MemoryError()), Wrong())


def test_a_wrong_engine_passes_if_the_tolerance_says_so() -> None:
    options = Options("fp32", device=CPU, tolerance=1.5)
    built, _, _ = build(small_conv_net(), torch.randn(2, 3, 8, 8), Wrong(), options=options)
    assert built.record.gates[0].relative_error == pytest.approx(1)


def test_a_finer_engine_than_the_module_is_compared_by_the_module_s_own_error() -> None:
    torch.manual_seed(0)
    module, x = nn.Linear(64, 64).half(), torch.randn(2, 64).half()
    built, _, _ = build(module, x)
    assert 1e-5 < built.record.gates[0].relative_error < 1e-2
    with pytest.raises(AccuracyError):
        build(module, x, options=Options("fp32", device=CPU, tolerance=1e-5))


def test_a_wrong_second_output_is_found() -> None:
    class WrongSecond(Wrong):
        def load(self, plan: Plan, device: torch.device) -> Engine:
            module = plan.payload.exported.module(check_guards=False)
            return NativeEngine(lambda x: (module(x)[0], module(x)[1] + 1), plan.precision)

    with pytest.raises(AccuracyError) as caught:
        build(Lambda(lambda self, x: {"a": x * 2, "b": x * 3}), torch.ones(4), WrongSecond())
    assert "ok   output 0" in str(caught.value)
    assert "FAIL output 1" in str(caught.value)


def test_what_cannot_be_run_at_a_precision_is_a_build_error_and_a_reason_to_fall_back() -> None:
    module = Lambda(lambda self, x: x.masked_fill(x > 0, -1e9).softmax(-1))
    options = Options("fp16", device=CPU)
    with pytest.raises(BuildError, match="without overflow"):
        build(module, torch.randn(2, 4), options=options)

    class Stays(Eager):
        """A backend that computes in bfloat16 whatever it is asked for."""

        name = "stays"

        def load(self, plan: Plan, device: torch.device) -> Engine:
            return NativeEngine(lambda x: (module(x.bfloat16()).half(),), plan.precision)

    built, _, _ = build(module, torch.randn(2, 4), Eager(), Stays(), options=options)
    assert built.record.backend == "stays"
    assert "without overflow" in built.record.fell_back_because


# --- a dynamic batch ---


def dynamic(*sizes: int) -> Options:
    return Options("fp32", device=CPU, dynamic_batch=sizes)  # type: ignore[arg-type]


def test_a_dynamic_engine_is_checked_at_its_minimum_optimum_and_maximum() -> None:
    module = small_conv_net()
    built, runner, _ = build(module, torch.randn(3, 3, 8, 8), options=dynamic(1, 2, 8))
    assert [gate.batch for gate in built.record.gates] == [1, 2, 8]
    assert [gate.outputs[0].shape[0] for gate in built.record.gates] == [1, 2, 8]
    assert built.dynamic
    x = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        assert relative_error(runner([x])[0], module(x)) < 1e-6


class Unsteady(Eager):
    """An engine whose third run is off in its last output, as that of kernels that race."""

    name = "unsteady"

    def __init__(self, native: bool) -> None:
        self.native = native

    def load(self, plan: Plan, device: torch.device) -> Engine:
        engine, runs = super().load(plan, device), itertools.count(1)
        real = engine.__call__

        class Raced(type(engine)):  # type: ignore[misc]
            def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
                *others, last = real(*inputs)
                return (*others, last * (1.05 if next(runs) == 3 else 1.0))

        engine.__class__ = Raced
        return engine


def test_an_engine_that_does_not_repeat_itself_is_refused() -> None:
    module, x = Lambda(lambda self, x: (x + 1, self.net(x)), net=small_conv_net()), torch.randn(1, 3, 8, 8)
    with pytest.raises(AccuracyError, match="does not repeat itself"):
        build(module, x, Unsteady(native=False))
    build(module, x, Unsteady(native=True))  # PyTorch's own kernels on a CPU are run once


class Overlapping(Eager):
    """An engine whose kernels a CUDA graph has to keep apart."""

    def load(self, plan: Plan, device: torch.device) -> Engine:
        engine = super().load(plan, device)
        engine.overlaps = True
        return engine


def test_an_engine_that_needs_a_graph_and_has_none_is_warned_of() -> None:
    with pytest.warns(
        BackendWarning, match=r"none \(CUDA graphs need a GPU\), and one result in some thousand is wrong"
    ):
        built, runner, _ = build(small_conv_net(), torch.randn(1, 3, 8, 8), Overlapping())
    with pytest.warns(BackendWarning, match="one result in some thousand is wrong"):  # so is a runner made later
        built.runner([torch.randn(1, 3, 8, 8)], runner.pool, cuda_graph=True)


@pytest.mark.parametrize("wrong_from", [1, 2, 8])
def test_an_engine_that_is_wrong_at_one_of_them_is_refused(wrong_from: int) -> None:
    with pytest.raises(AccuracyError, match=f"at batch {wrong_from}"):
        build(small_conv_net(), torch.randn(1, 3, 8, 8), Wrong(wrong_from), options=dynamic(1, 2, 8))


# --- precision and dtypes ---


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_outputs_have_the_dtypes_that_the_module_returns(precision: str, dtype: torch.dtype) -> None:
    module = small_conv_net().to(dtype)
    x = torch.randn(2, 3, 8, 8, dtype=dtype)
    options = Options(precision, device=CPU, tolerance=5e-2)
    built, runner, _ = build(module, x, options=options)
    (result,) = runner([x])
    assert result.dtype is dtype
    assert built.dtypes == (dtype,)
    with torch.no_grad():
        assert relative_error(result, module(x)) < 5e-2


def test_under_autocast_the_dtypes_are_those_that_autocast_gives_and_the_values_still_the_engine_s() -> None:
    module = small_conv_net()
    x = torch.randn(2, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        built, runner, _ = build(module, x)
        assert module(x).dtype is torch.bfloat16
        (result,) = runner([x])
    assert result.dtype is torch.bfloat16
    with torch.no_grad():
        assert torch.equal(result, runner.check([x])[0].bfloat16())
        assert built.record.gates[0].relative_error < 1e-6


def test_a_module_that_writes_to_its_input_is_refused_before_anything_is_captured() -> None:
    with pytest.raises(BuildError, match="writes to its input 0"):
        build(Lambda(lambda self, x: x.add_(1) * 2), torch.ones(3))


def test_an_output_of_zeros_warns_that_the_check_proves_little() -> None:
    module = nn.Linear(3, 2)
    nn.init.zeros_(module.weight)
    nn.init.zeros_(module.bias)
    with pytest.warns(BackendWarning, match="Linear returns next to nothing but zeros"):
        build(module, torch.randn(2, 3))


# --- weights ---


def test_native_engines_share_the_store_and_others_have_weights_of_their_own() -> None:
    class Foreign(Eager):
        name = "foreign"
        native = False

    module, x = small_conv_net(), torch.randn(2, 3, 8, 8)
    shared, own = WeightStore(), WeightStore()
    build(module, x, store=shared)
    build(module, x, Foreign(), store=own)
    assert shared.size_bytes() > 0
    assert own.size_bytes() == 0


def test_a_second_runner_of_a_plan_shares_its_engine_s_weights() -> None:
    module = small_conv_net()
    built, runner, builder = build(module, torch.randn(2, 3, 8, 8), options=dynamic(1, 2, 8))
    size = builder.store.size_bytes()
    x = torch.randn(5, 3, 8, 8)
    other = built.runner([x], runner.pool, cuda_graph=False)
    assert other.record.signature == "float32[5, 3, 8, 8]"
    assert builder.store.size_bytes() == size
    with torch.no_grad():
        assert relative_error(other([x])[0], module(x)) < 1e-6


def test_tensors_are_described_by_dtype_and_shape() -> None:
    assert describe([torch.zeros(2, 3), torch.zeros((), dtype=torch.int64)]) == "float32[2, 3], int64[]"
