"""The race, on the CPU: real engines that are made slower, wrong or impossible."""

import itertools
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

import torchaccel
from tests.helpers import relative_error
from tests.models import small_conv_net
from torchaccel import compiler
from torchaccel.backends.base import Backend, Engine, Plan
from torchaccel.backends.eager import Eager
from torchaccel.compiled import CompiledModule
from torchaccel.errors import BuildError, OptionError
from torchaccel.figures import Comparison, Timing
from torchaccel.precision import Precision
from torchaccel.program import Program
from torchaccel.race import Racer
from torchaccel.report import RaceRecord
from torchaccel.weights import WeightRule


class _Changed(Engine):
    """An engine with something done to its results."""

    shares_store = True

    def __init__(self, engine: Engine, change: Callable[[Any], Any], mib: int) -> None:
        self._engine, self._change, self._mib = engine, change, mib

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(map(self._change, self._engine(*inputs)))

    def device_bytes(self) -> int:
        return self._mib << 20


class Changed(Eager):
    def __init__(self, name: str, change: Callable[[Any], Any] = lambda result: result, mib: int = 0) -> None:
        self.name, self._change, self._mib = name, change, mib
        self.built = 0

    def load(self, plan: Plan, device: torch.device) -> Engine:
        self.built += 1
        return _Changed(super().load(plan, device), self._change, self._mib)


def slower(milliseconds: float) -> Callable[[Any], Any]:
    def change(result: torch.Tensor) -> torch.Tensor:
        time.sleep(milliseconds / 1e3)
        return result

    return change


class Failing(Eager):
    name = "failing"

    def load(self, plan: Plan, device: torch.device) -> Engine:
        raise BuildError("it cannot be built.")


class Absent(Eager):
    name = "absent"

    def unavailable(self) -> str | None:
        return "it is not installed"


@pytest.fixture
def compete(monkeypatch: pytest.MonkeyPatch) -> Callable[..., CompiledModule]:
    def compiled(*field: Backend, module: nn.Module | None = None, **options: Any) -> CompiledModule:
        monkeypatch.setattr(compiler, "FIELD", field)
        monkeypatch.setattr(sys.modules[Racer.__module__], "SAMPLES", (40, 80))
        module = small_conv_net() if module is None else module
        options = {"cache_dir": False, **options}
        return torchaccel.compile(module, "fp32", backend="fastest", device="cpu", **options)

    return compiled


def outcomes(record: RaceRecord) -> dict[str, str]:
    return {entry.name: entry.outcome for entry in record.entries}


def images(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 8, 8)


class Breaking(Eager):
    """A candidate that raises at a step what Triton does: no RuntimeError."""

    def __init__(self, step: str) -> None:
        self.name = self._step = step

    def _reach(self, step: str) -> None:
        if step == self._step:
            raise TritonError("out of resource: shared memory")

    def lower(self, program: Program) -> None:
        self._reach("lower")

    def build(self, program: Program, precision: Precision, device: torch.device, *, partial: bool = False) -> Plan:
        self._reach("build")
        return super().build(program, precision, device, partial=partial)

    def load(self, plan: Plan, device: torch.device) -> Engine:
        self._reach("load")
        runs = itertools.count()

        def change(result: torch.Tensor) -> torch.Tensor:
            self._reach("time" if next(runs) else "run")
            return result

        return _Changed(super().load(plan, device), change, 0)


class TritonError(Exception):
    pass


def rules(model: CompiledModule) -> Sequence[WeightRule]:
    return sorted(model._state.build.store.rules(), key=str)


@pytest.fixture(autouse=True)
def _without_gradients() -> Any:
    with torch.no_grad():
        yield


def test_the_fastest_that_is_right_serves_and_the_report_has_the_whole_field(compete: Any) -> None:
    wrong = Changed("wrong", lambda result: result * 1.1)
    field = (
        Changed("slow", slower(30)),
        Failing(),
        wrong,
        Absent(),
        Changed("fast", slower(1)),
        Changed("mid", slower(12)),
    )
    model = compete(*field)
    x = images()
    result = model(x)
    assert relative_error(result, model.module(x)) < 1e-5
    report = model.report()
    (race,) = report.races
    assert outcomes(race) == {
        "fast": "won", "mid": "lost", "slow": "lost", "absent": "out", "failing": "out", "wrong": "out",
    }  # fmt: skip
    assert [entry.name for entry in race.entries][:3] == ["fast", "mid", "slow"]
    by_name = {entry.name: entry for entry in race.entries}
    assert by_name["absent"].reason == "it is not installed"
    assert "cannot be built" in by_name["failing"].reason
    assert "relative error 0.1" in by_name["wrong"].reason
    assert by_name["slow"].ratio is not None
    assert by_name["mid"].ratio is not None
    assert by_name["slow"].ratio > by_name["mid"].ratio > 1
    assert "of the winner's time" in by_name["slow"].reason
    assert by_name["fast"].relative_error is not None
    assert by_name["fast"].build_ms is not None
    assert race.winner.name == report.backend == report.engines[0].backend == "fast"
    assert report.builds == len(report.engines) == len(report.runners) == 1
    assert report.calls_by_engine == report.runners[0].calls == 1
    assert report.to_dict()["races"][0]["entries"][0]["outcome"] == "won"
    for said in ("race for latency", "fast", "not installed"):
        assert said in str(report)
        assert said in str(race)


def test_a_candidate_that_raises_whatever_at_whichever_step_is_out_and_the_race_goes_on(compete: Any) -> None:
    steps = ("lower", "build", "load", "run", "time")
    model = compete(*map(Breaking, steps), Changed("sound"))
    x = images()
    assert relative_error(model(x), model.module(x)) < 1e-5
    (race,) = model.report().races
    assert outcomes(race) == {"sound": "won"} | dict.fromkeys(steps, "out")
    assert all("(TritonError): out of resource" in entry.reason for entry in race.entries[1:])
    assert rules(model) == rules(_served(compete(Eager())))


@pytest.mark.parametrize("objective", ["latency", "stream"])
def test_a_candidate_that_has_no_memory_to_be_timed_is_out(
    compete: Any, objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = Racer._trial

    def without_memory(self: Racer, call: Any, tensors: Any, runner: Any) -> Any:
        if runner.engine_bytes():
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return trial(self, call, tensors, runner)

    monkeypatch.setattr(Racer, "_trial", without_memory)
    model = compete(Changed("large", mib=1), Changed("small"), objective=objective)
    model(images())
    small, large = model.report().races[0].entries
    assert (small.outcome, large.outcome, large.out_of_memory) == ("won", "out", True)
    with pytest.raises(BuildError, match="large engine could not be timed"):
        compete(Changed("large", mib=1))(images())


def _served(model: CompiledModule) -> CompiledModule:
    model(images())
    return model


def test_what_the_losers_built_is_released(compete: Any) -> None:
    alone, among = compete(Eager()), compete(Changed("slow", slower(12)), Eager())
    x = images()
    alone(x)
    among(x)
    assert rules(among) == rules(alone)
    assert [len(model._state.runners) for model in (alone, among)] == [1, 1]


def test_each_signature_has_its_race_once(compete: Any) -> None:
    model = compete(Changed("slow", slower(12)), Changed("fast"))
    for batch in (2, 4, 2, 4, 2):
        model(images(batch))
    races = model.report().races
    assert [race.signature for race in races] == ["float32[2, 3, 8, 8]", "float32[4, 3, 8, 8]"]
    assert all(race.winner.name == "fast" for race in races)
    assert model.report().calls_by_engine == 5


def test_the_winner_takes_new_weights_in_place(compete: Any) -> None:
    model = compete(Changed("slow", slower(12)), Changed("fast"))
    x = images()
    model(x)
    model.module.fc.weight.add_(1)
    assert relative_error(model(x), model.module(x)) < 1e-5
    assert len(model.report().races) == 1
    assert model.report().refreshes == 1


def test_of_those_that_are_as_fast_the_smallest_wins(compete: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = {"large": (1.0, 1.02, 1.0, 1.02), "small": (1.02, 1.01, 1.02, 1.0), "slow": (4.0, 4.1, 4.0, 4.1)}
    timed = Comparison({name: Timing(times) for name, times in rounds.items()}, rounds)
    assert timed.fastest == "large"
    monkeypatch.setattr(sys.modules[Racer.__module__], "_compare", lambda *_: timed)
    model = compete(Changed("large", mib=3), Changed("small", mib=2), Changed("slow", mib=1))
    model(images())
    (race,) = model.report().races
    assert outcomes(race) == {"large": "lost", "small": "won", "slow": "lost"}
    large = next(entry for entry in race.entries if entry.name == "large")
    assert large.device_mib > race.winner.device_mib
    assert "noise" in large.reason


def test_one_that_seems_slower_by_more_than_a_little_does_not_win_by_noise(
    compete: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = {"large": (1.0, 1.1, 1.0, 1.1), "small": (1.1, 1.05, 1.15, 1.05)}
    timed = Comparison({name: Timing(times) for name, times in rounds.items()}, rounds)
    assert timed.ratio("small", "large").low < 1 < timed.ratio("small", "large").value
    monkeypatch.setattr(sys.modules[Racer.__module__], "_compare", lambda *_: timed)
    model = compete(Changed("large", mib=3), Changed("small", mib=2))
    model(images())
    assert outcomes(model.report().races[0]) == {"large": "won", "small": "lost"}


def test_a_lead_that_is_small_and_no_noise_wins(compete: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = {"large": (1.0,) * 20, "small": (1.01,) * 20}
    timed = Comparison({name: Timing(times) for name, times in rounds.items()}, rounds)
    monkeypatch.setattr(sys.modules[Racer.__module__], "_compare", lambda *_: timed)
    model = compete(Changed("large", mib=3), Changed("small", mib=2))
    model(images())
    (race,) = model.report().races
    assert outcomes(race) == {"large": "won", "small": "lost"}
    assert (race.entries[1].ratio, race.winner.ratio) == (1.01, 1.0)


@pytest.mark.parametrize(
    ("times_ms", "taken"),
    [
        ({"a": 1.0, "b": 2.0, "c": 3.0}, [1, 100]),
        ({"a": 1.0, "b": 1.0, "c": 3.0}, [1, 100, 200, 400]),  # one lead of two is no lead
        ({"a": 50.0, "b": 50.0}, [1, 100, 200]),  # as many as 20 s have room for
        ({"a": 9000.0, "b": 9000.0}, [1, 5]),
    ],
)
def test_samples_are_taken_until_the_lead_is_clear_or_the_time_is_spent(
    times_ms: dict[str, float], taken: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []

    def compare(trials: Any, samples: int, warmup: int, device: torch.device) -> Comparison:
        counts.append(samples)
        assert warmup == (1 if len(counts) == 1 else min(20, samples))
        rounds = {name: (times_ms[name],) * 5 for name in trials}
        return Comparison({name: Timing(times) for name, times in rounds.items()}, rounds)

    module: Any = sys.modules[Racer.__module__]
    monkeypatch.setattr(module, "compare", compare)
    module._compare(dict.fromkeys(times_ms, lambda: None), torch.device("cpu"))
    assert counts == taken


def test_nobody_left_is_an_error_with_every_reason(compete: Any) -> None:
    model = compete(Failing(), Changed("wrong", lambda result: result * 2), Absent())
    with pytest.raises(BuildError, match=r"(?s)float32\[2, 3, 8, 8\].*absent: it is not.*failing: it cannot.*wrong: "):
        model(images())
    assert not model.report().engines
    assert not rules(model)


def test_nothing_further_is_built_when_the_budget_is_spent(compete: Any) -> None:
    first, second = Changed("first", slower(2)), Changed("second")
    model = compete(first, second, race_budget_s=1e-6)
    model(images())
    assert (first.built, second.built) == (1, 0)
    (race,) = model.report().races
    assert outcomes(race) == {"first": "won", "second": "out"}
    assert "race_budget_s=1e-06 was spent" in race.entries[1].reason


def test_a_race_can_be_had_without_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "FIELD", (Changed("slow", slower(12)), Changed("fast")))
    for objective in ("latency", "throughput", "stream"):
        record = torchaccel.race(small_conv_net(), images(), "fp32", device="cpu", objective=objective, cache_dir=False)
        assert record.winner.name == "fast"
        assert record.objective == objective


def test_what_stream_cannot_take_is_refused_before_anything_is_built(compete: Any) -> None:
    class Sum(nn.Module):
        def forward(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
            return x + other

    first = Changed("first")
    model = compete(first, module=Sum(), objective="stream")
    with pytest.raises(BuildError, match="all positional or all by keyword"):
        model(images(), other=images())
    assert first.built == 0
    assert model(x=images(), other=images()).shape == (2, 3, 8, 8)


def test_a_race_that_nobody_survives_keeps_no_weights(compete: Any) -> None:
    model = compete(Changed("wrong", lambda result: result * 1.1), Failing())
    with pytest.raises(BuildError, match="no backend could serve"):
        model(images())
    assert not rules(model)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"backend": "eager", "race_budget_s": 1.0}, "race_budget_s belongs to backend='fastest'"),
        ({"backend": "fastest", "race_budget_s": 0}, "race_budget_s=0: allowed is"),
        ({"backend": "fastest", "fallback": "eager"}, "fallback='eager': backend='fastest' tries every backend"),
        ({"backend": "eager", "objective": "stream"}, "objective='stream' is what backend='fastest' decides by"),
        (
            {"backend": "fastest", "objective": "size"},
            "objective='size': allowed are 'latency', 'thr",
        ),
    ],
)
def test_options_of_the_race_that_make_no_sense_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        torchaccel.compile(small_conv_net(), "fp32", device="cpu", **options)


@pytest.mark.parametrize(("options", "said"), [({"backend": "eager"}, "every backend races"), ({}, "needs a batch")])
def test_a_race_without_a_batch_or_with_a_backend_is_refused(options: dict[str, Any], said: str) -> None:
    inputs = images() if options else None
    with pytest.raises(OptionError, match=said):
        torchaccel.race(small_conv_net(), inputs, "fp32", device="cpu", **options)
