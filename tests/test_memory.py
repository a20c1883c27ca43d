"""Out of memory: recognised, released, and said with what to do; the module goes on being usable."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers import Lambda, on_cpu, relative_error, same_values, state_of
from tests.models import small_conv_net
from tests.test_build import build
from torchaccel.backends.base import Engine, Plan
from torchaccel.backends.eager import Eager
from torchaccel.compiler import BACKENDS
from torchaccel.errors import AccuracyError, BuildError, DeviceMemoryError
from torchaccel.memory import is_out_of_memory, release_on_exhaustion
from torchaccel.options import Options
from torchaccel.weights import WeightStore

CPU = torch.device("cpu")
TOO_MUCH = 1 << 50


class Greedy(Eager):
    """A backend whose engine needs more memory than there is, after it has taken some."""

    name = "greedy"

    def __init__(self) -> None:
        self.taken: list[weakref.ref[torch.Tensor]] = []

    def load(self, plan: Plan, device: torch.device) -> Engine:
        workspace = torch.zeros(1 << 20)
        self.taken.append(weakref.ref(workspace))
        self.taken += map(weakref.ref, plan.payload.exported.state_dict.values())
        self.taken += map(weakref.ref, plan.payload.inputs)
        try:
            torch.empty(TOO_MUCH)
        except RuntimeError as error:
            raise BuildError("the engine could not be loaded") from error
        return super().load(plan, device)


def cpu_error() -> RuntimeError:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(TOO_MUCH)
    return caught.value


def test_lack_of_memory_is_recognised_in_whatever_it_is_wrapped() -> None:
    wrapped = BuildError("could not run")
    wrapped.__cause__ = ValueError("inner")
    wrapped.__cause__.__context__ = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    for error in (
        cpu_error(),
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        wrapped,
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        BuildError(
            "TensorRT could not build the engine: [defaultAllocator.cpp] Error Code 1: Cuda Runtime (out of memory)"
        ),
    ):
        assert is_out_of_memory(error)
    for other in (RuntimeError("shapes differ"), BuildError("Sort ×2"), KeyboardInterrupt()):
        assert not is_out_of_memory(other)


def test_a_circle_of_causes_ends() -> None:
    one, two = ValueError("a"), ValueError("b")
    one.__cause__, two.__cause__ = two, one
    assert not is_out_of_memory(one)


def test_other_errors_and_results_come_through_as_they_are() -> None:
    assert release_on_exhaustion(lambda: 3, "x", CPU, 8) == 3
    error = AccuracyError("wrong")

    def fail() -> None:
        raise error

    with pytest.raises(AccuracyError) as caught:
        release_on_exhaustion(fail, "x", CPU, 8)
    assert caught.value is error


def test_what_refers_to_itself_is_released_too() -> None:
    taken: list[weakref.ref[Any]] = []

    def fail() -> None:
        program = nn.Module()
        program.__dict__["itself"] = program
        taken.append(weakref.ref(program))
        raise MemoryError

    gc.disable()
    try:
        with pytest.raises(DeviceMemoryError, match="MemoryError"):
            release_on_exhaustion(fail, "x", CPU, 8)
        assert taken[0]() is None
    finally:
        gc.enable()


def test_lack_of_memory_within_another_step_is_said_once() -> None:
    def fail() -> None:
        raise MemoryError

    with pytest.raises(DeviceMemoryError) as caught:
        release_on_exhaustion(lambda: release_on_exhaustion(fail, "the inner", CPU, 8), "the outer", CPU, 8)
    assert str(caught.value).count("What was begun is released") == 1
    assert "the inner" in str(caught.value)
    assert "the outer" not in str(caught.value)


def test_a_build_that_runs_out_of_memory_keeps_nothing_alive_while_its_error_is_held(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, greedy = small_conv_net(), Greedy()
    state = state_of(module)
    monkeypatch.setitem(BACKENDS, "eager", greedy)
    model = on_cpu(module)
    store = model._state.build.store
    gc.disable()  # what is released is released by the error's own path
    try:
        with pytest.raises(DeviceMemoryError) as caught, torch.no_grad():
            model(torch.randn(2, 3, 8, 8))
        alive = [taken for taken in greedy.taken if taken() is not None]
    finally:
        gc.enable()
    assert len(greedy.taken) > 2
    assert not alive
    assert store.size_bytes() == 0
    error: BaseException | None = caught.value
    message = str(error)
    for said in ("out of memory on cpu", "float32[2, 3, 8, 8]", "allocate", "smaller batch", "max_runners (it is 8)"):
        assert said in message
    assert error is not None
    assert error.__cause__ is None
    assert error.__context__ is None
    assert isinstance(error, BuildError)
    assert same_values(module, state)


def test_what_other_engines_hold_stays() -> None:
    module, store = small_conv_net(), WeightStore()
    build(module, torch.randn(2, 3, 8, 8), store=store)
    before = store.size_bytes()
    with pytest.raises(DeviceMemoryError):
        build(module, torch.randn(3, 3, 8, 8), Greedy(), store=store, options=Options("fp16", device=CPU))
    assert store.size_bytes() == before > 0


def test_a_fallback_is_tried_after_memory_was_released() -> None:
    greedy = Greedy()

    class Checks(Eager):
        name = "checks"

        def load(self, plan: Plan, device: torch.device) -> Engine:
            kept = {id(example) for example in plan.payload.inputs}  # what was captured is the next backend's too
            assert not [taken for taken in greedy.taken if taken() is not None and id(taken()) not in kept]
            return super().load(plan, device)

    built, _, _ = build(small_conv_net(), torch.randn(2, 3, 8, 8), greedy, Checks())
    assert built.record.backend == "checks"
    assert "greedy failed: out of memory on cpu" in built.record.fell_back_because


def test_a_model_that_ran_out_of_memory_serves_what_fits() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = self.fc(x)
        return y.unsqueeze(1).expand(-1, TOO_MUCH if len(x) > 2 else 4, -1).contiguous().mean(1)

    module = Lambda(forward, fc=nn.Linear(4, 4))
    model = on_cpu(module)
    with torch.no_grad():
        for _ in range(2):
            with pytest.raises(DeviceMemoryError, match="out of memory on cpu"):
                model(torch.ones(3, 4))
            assert model.report().builds == 0
            assert not model.report().runners
        assert relative_error(model(torch.ones(2, 4)), module(torch.ones(2, 4))) < 1e-6
        with pytest.raises(DeviceMemoryError):
            model(torch.ones(3, 4))
        assert relative_error(model(torch.ones(2, 4)), module(torch.ones(2, 4))) < 1e-6
    assert model.report().builds == 1
