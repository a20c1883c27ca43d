"""measure and compare: milliseconds that are right, rounds that interleave, warnings exactly when they should."""

import gc
import io
import json
import random
import statistics
import time
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from torchaccel import timing
from torchaccel.errors import MeasurementWarning, OptionError
from torchaccel.figures import Comparison, Ratio, Timing
from torchaccel.timing import compare, measure

TIMES = st.lists(st.floats(1e-4, 1e4), min_size=1, max_size=300)


class Clock:
    """Stands in for the module `time`: it moves only when a measured function says so."""

    def __init__(self):
        self.now_ms = 0.0

    def perf_counter_ns(self):
        return round(self.now_ms * 1e6)

    def monotonic(self):
        return self.now_ms / 1000

    def work(self, ms):
        self.now_ms += ms


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    return clock


def scripted(clock, times):
    """A function that takes one after another of `times`, in ms."""
    script = iter(times)
    return lambda: clock.work(next(script))


# --- what a Timing says ---


def test_a_known_sleep_gives_its_milliseconds():
    result = measure(time.sleep, 0.005, warmup=3)
    assert result.count == 100
    assert 5 <= result.min_ms <= result.median_ms < 7


def test_samples_are_the_calls_in_milliseconds_and_in_order(clock):
    times = [float(index) for index in range(1, 101)]
    with pytest.warns(MeasurementWarning, match="wandered"):
        result = measure(scripted(clock, times), warmup=0)
    assert result.samples == tuple(times)
    assert (result.min_ms, result.mean_ms, result.median_ms) == (1, 50.5, 50.5)
    assert result.p95_ms == pytest.approx(float(np.percentile(times, 95)))
    assert result.p99_ms == pytest.approx(float(np.percentile(times, 99)))
    assert result.cv == pytest.approx(statistics.stdev(times) / 50.5)


@given(TIMES)
def test_percentiles_agree_with_the_standard_library(times):
    if len(times) > 1:
        cuts = statistics.quantiles(times, n=100, method="inclusive")
        assert Timing(tuple(times)).p95_ms == pytest.approx(cuts[94])
        assert Timing(tuple(times)).p99_ms == pytest.approx(cuts[98])
    assert Timing(tuple(times)).median_ms == pytest.approx(statistics.median(times))


@given(TIMES, st.floats(0.01, 100))
def test_invariants_of_a_timing(times, factor):
    result, scaled = Timing(tuple(times)), Timing(tuple(factor * one for one in times))
    assert result.min_ms <= result.median_ms <= result.p95_ms <= result.p99_ms <= max(times)
    assert result.min_ms <= result.mean_ms * (1 + 1e-12) <= max(times) * (1 + 1e-9)
    assert result.cv >= 0
    assert scaled.median_ms == pytest.approx(factor * result.median_ms)
    assert scaled.cv == pytest.approx(result.cv, abs=1e-9)
    assert Timing(tuple(sorted(times))).to_dict() == pytest.approx(result.to_dict())


def test_a_timing_leaves_out_the_tails_that_its_samples_cannot_bear():
    full, some, least, few = (Timing((1.0,) * count).to_dict() for count in (100, 99, 20, 19))
    assert full["p99_ms"] == full["p95_ms"] == 1
    assert (some["p99_ms"], some["p95_ms"]) == (least["p99_ms"], least["p95_ms"]) == (None, 1)
    assert (few["p99_ms"], few["p95_ms"]) == (None, None)
    assert json.loads(json.dumps(full)) == full
    assert "p99" in str(Timing((1.0,) * 100))
    assert "p99" not in str(Timing((1.0,) * 99))
    assert "1 ms median" in str(Timing((1.0,) * 19))


def test_a_timing_is_frozen():
    with pytest.raises(AttributeError):
        Timing((1.0,)).warmup = 3


@pytest.mark.parametrize("width", [80, 120])
def test_tables_hold_every_figure(width):
    fast, slow = Timing((1.5,) * 100), Timing((3.0,) * 50)
    for shown, words in (
        (fast, ["1.5", "100", "median ms"]),
        (Comparison({"fast": fast, "slow": slow}, {"fast": (1.5, 1.5), "slow": (3.0, 3.0)}), ["fast", "slow", "2.000"]),
    ):
        console = Console(file=io.StringIO(), width=width)
        console.print(shown)
        text = console.file.getvalue()
        assert all(word in text for word in words)
        assert "…" not in text


# --- warming up ---


def test_warm_up_ends_when_the_time_is_steady(clock):
    assert measure(lambda: clock.work(1)).warmup == 127  # windows of 1, 2, 4 ... 32 calls, up to 0.1 s


def test_warm_up_waits_until_the_time_is_steady(clock):
    times = [10.0 + 10 * 0.99**index for index in range(1000)]
    result = measure(scripted(clock, times), warmup=None)
    assert result.warmup > 200
    assert result.median_ms < 11


def test_warm_up_is_bounded_in_time_and_in_calls(clock):
    with pytest.warns(MeasurementWarning):
        slow = measure(lambda: clock.work(2000), samples=1)
    assert slow.warmup == 3  # 2 s and 4 s
    with pytest.warns(MeasurementWarning, match="wandered"):
        never = measure(scripted(clock, (0.9 * 0.998**index for index in range(10**4))))
    assert 5000 <= never.warmup < 5000 + 32


@pytest.mark.parametrize("count", [0, 7])
def test_warm_up_of_a_given_number_of_calls(clock, count):
    calls = []
    result = measure(lambda: calls.append(clock.work(1)), warmup=count)
    assert result.warmup == count
    assert len(calls) == count + 100


# --- comparing ---


def test_rounds_interleave_and_no_candidate_always_follows_the_same_one(clock):
    calls = []
    candidates = {name: lambda name=name: calls.append(name) or clock.work(1) for name in "abc"}
    compare(candidates, samples=100, rounds=20, warmup=0)
    assert Counter(calls) == {"a": 100, "b": 100, "c": 100}
    rounds = [calls[start : start + 15] for start in range(0, 300, 15)]
    orders = [tuple(turn[::5]) for turn in rounds]
    assert all(turn == [name for name in order for _ in range(5)] for turn, order in zip(rounds, orders, strict=True))
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert len(set(orders)) >= 5
    before = {name: {order[order.index(name) - 1] for order in orders if order[0] != name} for name in "abc"}
    assert all(len(others) == 2 for others in before.values())
    again, calls = calls, []
    candidates = {name: lambda name=name: calls.append(name) or clock.work(1) for name in "abc"}
    compare(candidates, samples=100, rounds=20, warmup=0)
    assert calls == again


def test_samples_that_the_rounds_do_not_divide_are_all_taken(clock):
    counts = {"quick": 107, "slow": 23}
    with pytest.warns(MeasurementWarning, match="p99"):
        result = compare({name: lambda: clock.work(1) for name in counts}, samples=counts, rounds=10, warmup=0)
    assert {name: one.count for name, one in result.timings.items()} == counts
    assert {name: len(medians) for name, medians in result.round_ms.items()} == {"quick": 10, "slow": 10}


def test_a_slow_candidate_is_in_the_first_rounds_and_compared_over_those(clock):
    calls = []
    quick, slow = (lambda name=name: calls.append(name) or clock.work(len(calls)) for name in ("quick", "slow"))
    with pytest.warns(MeasurementWarning) as caught:
        result = compare({"quick": quick, "slow": slow}, samples={"quick": 40, "slow": 3}, rounds=20, warmup=0)
    assert "(slow: 3):" in str(caught[0].message)
    assert "an interval needs 10 rounds, not 3" in str(caught[0].message)
    assert (calls.count("quick"), calls.count("slow")) == (40, 3)
    assert "slow" not in calls[9:]
    medians = result.round_ms
    assert (len(medians["quick"]), len(medians["slow"])) == (20, 3)
    expected = [slow / quick for slow, quick in zip(medians["slow"], medians["quick"], strict=False)]
    assert result.ratio("slow").value == pytest.approx(statistics.median(expected))


def test_one_round_gives_a_ratio_without_an_interval(clock):
    with pytest.warns(MeasurementWarning, match="an interval needs 10 rounds, not 1"):
        result = compare({"one": lambda: clock.work(1), "two": lambda: clock.work(2)}, rounds=1, warmup=0)
    ratio = result.ratio("two")
    assert ratio.to_dict() == {"value": 2, "low": None, "high": None}
    assert ratio.inverse().to_dict() == {"value": 0.5, "low": None, "high": None}
    assert str(ratio) == "2.000 (one round: no interval)"
    assert json.dumps(result.to_dict(), allow_nan=False)


def test_the_interval_covers_a_known_ratio_and_a_common_wander_cancels(clock):
    noise = random.Random(1)

    def wandering(ms):
        # the clock of the device swings by a third, slowly, for everybody
        return lambda: clock.work(ms * (1 + 0.3 * np.sin(clock.now_ms / 400)) * noise.uniform(0.99, 1.01))

    with pytest.warns(MeasurementWarning, match="wandered"):
        result = compare({"base": wandering(4), "third": wandering(4 / 3)}, samples=100, rounds=25, warmup=0)
    ratio = result.ratio("third")
    assert ratio.low <= 1 / 3 <= ratio.high
    assert ratio.high - ratio.low < 0.1
    inverse = result.ratio("base", to="third")
    assert inverse.value == pytest.approx(ratio.inverse().value, rel=1e-3)
    assert ratio.inverse().low < ratio.inverse().value < ratio.inverse().high
    assert (result.baseline, result.fastest) == ("base", "third")


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    noise = random.Random(2)
    covered = 0
    for _ in range(200):
        rounds = {
            name: tuple(ms * noise.lognormvariate(0, 0.05) for _ in range(20)) for name, ms in (("a", 3), ("b", 2))
        }
        ratio = Comparison({name: Timing(times) for name, times in rounds.items()}, rounds).ratio("b")
        covered += ratio.low <= 2 / 3 <= ratio.high
    assert 180 <= covered <= 200


def test_a_ratio_is_that_of_each_round(clock):
    rounds = {"a": (1.0, 10.0, 100.0), "b": (2.0, 20.0, 200.0)}
    result = Comparison({name: Timing(times) for name, times in rounds.items()}, rounds)
    assert result.ratio("b") == Ratio(2, 2, 2)
    assert result.ratio("b").inverse() == Ratio(0.5, 0.5, 0.5)
    assert result.ratio("a") == Ratio(1, 1, 1)
    content = result.to_dict()
    assert json.loads(json.dumps(content)) == content
    assert (content["baseline"], content["rounds"]) == ("a", 3)
    assert content["candidates"]["b"]["ratio"] == {"value": 2, "low": 2, "high": 2}
    assert "b: 20 ms median" in str(result)
    with pytest.raises(OptionError, match=r"'c'.*a, b"):
        result.ratio("c")


def test_the_fastest_has_the_lowest_median():
    rounds = {"even": (2.0, 2.0, 2.0), "lucky": (1.0, 3.0, 3.0)}
    assert Comparison({name: Timing(times) for name, times in rounds.items()}, rounds).fastest == "even"


def test_the_interval_is_the_same_each_time():
    noise = random.Random(5)
    for _ in range(20):
        rounds = {name: tuple(noise.uniform(1, 2) for _ in range(20)) for name in "ab"}
        result = Comparison({name: Timing(times) for name, times in rounds.items()}, rounds)
        assert result.ratio("b") == result.ratio("b")


def test_the_rounds_are_those_of_who_was_in_most():
    rounds = {"quick": (1.0,) * 20, "slow": (9.0,) * 3}
    result = Comparison({name: Timing(times) for name, times in rounds.items()}, rounds)
    assert result.to_dict()["rounds"] == 20


# --- warnings ---


@pytest.mark.parametrize(
    ("samples", "needs"),
    [(99, ["p99 needs 100"]), (20, ["p99 needs 100"]), (19, ["p95 needs 20", "p99 needs 100"])],
)
def test_too_few_samples_are_said(clock, samples, needs):
    with pytest.warns(MeasurementWarning) as caught:
        measure(lambda: clock.work(1), samples=samples, warmup=0)
    assert [str(one.message).count("needs") for one in caught] == [len(needs)]
    assert all(need in str(caught[0].message) for need in needs)
    assert f"(fn: {samples}):" in str(caught[0].message)
    assert caught[0].filename == __file__


def test_too_few_rounds_are_said(clock):
    with pytest.warns(MeasurementWarning, match=r"\(one: 100\): an interval needs 10 rounds, not 9"):
        compare({"one": lambda: clock.work(1)}, rounds=9, warmup=0)


def test_steady_times_warn_of_nothing(clock):
    noise = random.Random(3)
    measure(lambda: clock.work(noise.gauss(10, 1)), warmup=0)
    measure(lambda: clock.work(1), warmup=0)
    for _ in range(20):  # the medians of two thirds differ by far more than 5 %, and it is noise
        measure(lambda: clock.work(noise.uniform(1, 9)), warmup=0)
    measure(scripted(clock, np.linspace(1, 1.06, 100)), warmup=0)  # 4 % from the first third to the last
    compare({"one": lambda: clock.work(noise.gauss(10, 1)), "two": lambda: clock.work(5)}, warmup=0)


@pytest.mark.parametrize("last", [1.2, 0.8])
def test_a_wandering_clock_is_said_with_its_figures(clock, last):
    noise = random.Random(4)
    times = [slope * noise.uniform(0.99, 1.01) for slope in np.linspace(1, last, 100)]
    with pytest.warns(MeasurementWarning, match=r"wandered.*fn: 1\.03|fn: 0\.96.*lock-gpu-clocks") as caught:
        measure(scripted(clock, times), warmup=0)
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_a_comparison_says_which_candidate_wandered(clock):
    slowing = iter(np.linspace(1, 1.3, 100))
    with pytest.warns(MeasurementWarning, match=r"wandered while it was measured \(slows: 1\.\S+ ms .* ms at last\)"):
        compare({"steady": lambda: clock.work(1), "slows": lambda: clock.work(next(slowing))}, warmup=0)


# --- arguments and errors ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": 0}, "samples is 0.*at least 1"),
        ({"samples": 2.5}, "samples is 2.5"),
        ({"samples": True}, "samples is True"),
        ({"warmup": -1}, "warmup is -1.*at least 0"),
        ({"device": "cuda:99"}, "device is 'cuda:99'.*None, cpu"),
        ({"device": "tpu"}, "device is 'tpu'.*cpu"),
        ({"device": 1.5}, "device is 1.5"),
        ({"device": 10**30}, "device is 1000"),
        ({"fn": 3}, "fn is 3; it must be callable"),
    ],
)
def test_wrong_arguments_of_measure(arguments, message):
    arguments = {"fn": int} | arguments
    with pytest.raises(OptionError, match=message):
        measure(arguments.pop("fn"), **arguments)


@pytest.mark.parametrize(
    ("candidates", "arguments", "message"),
    [
        ({}, {}, "candidates is {}.*mapping"),
        (int, {}, "candidates is .*mapping"),
        ({"a": 3}, {}, r"candidates\['a'\] is 3"),
        ({1: int}, {}, "names one 1; a name must be a string"),
        ({"a": int}, {"rounds": 0}, "rounds is 0.*from 1 to 100"),
        ({"a": int}, {"rounds": 101}, "rounds is 101.*from 1 to 100"),
        ({"a": int}, {"samples": 0}, "samples is 0"),
        ({"a": int, "b": int}, {"samples": {"a": 3}}, "samples has a; it must name a, b"),
        ({"a": int}, {"samples": {"a": 0}}, r"samples\['a'\] is 0"),
    ],
)
def test_wrong_arguments_of_compare(candidates, arguments, message):
    with pytest.raises(OptionError, match=message):
        compare(candidates, **arguments)


def test_what_a_function_raises_passes_through_and_leaves_nothing_behind():
    error = RuntimeError("as it was")

    def fail():
        raise error

    for call in (lambda: measure(fail), lambda: measure(fail, warmup=0), lambda: compare({"a": fail})):
        with pytest.raises(RuntimeError) as caught:
            call()
        assert caught.value is error
        assert gc.isenabled()


def test_the_collector_is_off_while_a_call_is_timed_and_as_it_was_afterwards(clock):
    seen = set()
    measure(lambda: seen.add(gc.isenabled()) or clock.work(1), warmup=0)
    assert seen == {False}
    assert gc.isenabled()
    gc.disable()
    try:
        measure(lambda: clock.work(1), warmup=0)
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_arguments_reach_the_function(clock):
    seen = []
    compare({"a": lambda *args: seen.append(args) or clock.work(1)}, 1, "two", warmup=0)
    measure(lambda *args: seen.append(args) or clock.work(1), 1, "two", warmup=0)
    assert set(seen) == {(1, "two")}


# --- the GPU's clock, on a GPU that is arithmetic ---


class Gpu:
    """A GPU and its host: `launch` takes the host `host_ms` and gives the GPU `gpu_ms` of work."""

    def __init__(self, monkeypatch):
        self.host_ms = self.busy_until_ms = 0.0
        self.waits = []
        self.stream = SimpleNamespace(device=torch.device("cuda:0"), synchronize=self.synchronize)
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(self))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.stream)
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)

    def launch(self, host_ms, gpu_ms):
        self.host_ms += host_ms
        self.busy_until_ms = max(self.busy_until_ms, self.host_ms) + gpu_ms

    def synchronize(self):
        self.waits.append(self.host_ms)
        self.host_ms = max(self.host_ms, self.busy_until_ms)


class Event:
    def __init__(self, gpu):
        self.gpu = gpu

    def record(self, stream):
        assert stream is self.gpu.stream
        self.at_ms = self.gpu.busy_until_ms = max(self.gpu.busy_until_ms, self.gpu.host_ms)

    def query(self):
        return self.gpu.host_ms >= self.at_ms

    def elapsed_time(self, other):
        return other.at_ms - self.at_ms


def test_events_give_the_work_of_the_gpu_where_the_host_runs_ahead(monkeypatch):
    gpu = Gpu(monkeypatch)
    result = measure(gpu.launch, 0.1, 1.0, warmup=0, device="cuda")
    assert result.samples == pytest.approx([1.0] * 100)  # the first too: it finds the GPU at work
    assert (result.device, result.launch_bound) == ("cuda:0", False)
    assert len(gpu.waits) == 2  # before the first call and after the last, none between


def test_launches_that_bound_the_gpu_are_said(monkeypatch):
    gpu = Gpu(monkeypatch)
    with pytest.warns(MeasurementWarning, match="GPU waited for the host .fn: 1 ms.*CUDA graph") as caught:
        result = measure(gpu.launch, 1.0, 0.1, warmup=0, device="cuda")
    assert len(caught) == 1
    assert result.launch_bound
    assert result.median_ms == pytest.approx(1.0)


def test_launches_bound_the_gpu_where_it_waited_for_most_of_them(monkeypatch):
    for late, bound in ((40, False), (60, True)):
        gpu = Gpu(monkeypatch)
        work = iter([(1.0, 0.1)] * late + [(0.1, 1.0)] * (101 - late))
        with pytest.warns(MeasurementWarning, match="GPU waited") if bound else nullcontext():
            result = measure(lambda gpu=gpu, work=work: gpu.launch(*next(work)), warmup=0, device="cuda")
        assert result.launch_bound is bound


def test_a_candidate_does_not_hide_its_launches_behind_the_work_of_another(monkeypatch):
    gpu = Gpu(monkeypatch)
    candidates = {"heavy": lambda: gpu.launch(0.1, 20.0), "launches": lambda: gpu.launch(1.0, 0.1)}
    with pytest.warns(MeasurementWarning, match="host .launches: 1 ms."):
        result = compare(candidates, warmup=0, device="cuda")
    assert result.timings["launches"].median_ms == pytest.approx(1.0)
    assert result.timings["heavy"].median_ms == pytest.approx(20.0)
    assert not result.timings["heavy"].launch_bound


def test_the_device_is_that_of_the_arguments_or_of_an_initialised_cuda(monkeypatch):
    class OnGpu(torch.Tensor):
        is_cuda, device = True, torch.device("cuda:2")

    place, nested = timing._check_place, ([3, {"x": torch.ones(1).as_subclass(OnGpu)}],)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert place(None, (torch.ones(1), 3), None) == torch.device("cpu")
    assert place(None, nested, None) == torch.device("cuda:2")
    assert place("cpu", nested, None) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert place(None, (torch.ones(1), 3), None) == torch.device("cuda:1")
