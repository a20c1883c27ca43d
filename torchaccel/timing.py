"""Measure and compare callables, always in milliseconds: CUDA events on a GPU, a monotonic clock on a CPU."""

from __future__ import annotations

import gc
import random
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils import _pytree

from torchaccel.errors import MeasurementWarning, OptionError

if TYPE_CHECKING:
    from rich.table import Table

P95_SAMPLES, P99_SAMPLES, INTERVAL_ROUNDS = 20, 100, 10  # below these a tail or an interval is a guess
_DRIFT = 0.05  # the change from the first third of the samples to the last that is called wandering
_STEADY, _WARMUP_MIN_S, _WARMUP_MAX_S, _WARMUP_MAX_CALLS, _WINDOW = 0.03, 0.1, 5.0, 5000, 32
_RESAMPLES = 2000


@dataclass(frozen=True)
class Timing:
    """What one callable took, call by call, in milliseconds, in the order of the calls.

    `device` is where the clock ran, `warmup` how many calls went before the first sample, and `launch_bound` says
    that the GPU waited for the host's launches. Percentiles interpolate linearly between samples.

    >>> timing = Timing((2.0, 1.0, 3.0, 2.0))
    >>> timing.count, timing.min_ms, timing.mean_ms, timing.median_ms, round(timing.p95_ms, 2), round(timing.cv, 3)
    (4, 1.0, 2.0, 2.0, 2.85, 0.408)
    >>> print(timing)
    2 ms median (mean 2, min 1, cv 40.8 %, 4 samples on cpu)
    """

    samples: tuple[float, ...]
    device: str = "cpu"
    warmup: int = 0
    launch_bound: bool = False

    def percentile_ms(self, percent: float) -> float:
        """The time in ms that `percent` of the calls did not exceed."""
        return float(np.percentile(self.samples, percent))

    @property
    def count(self) -> int:
        """How many samples there are."""
        return len(self.samples)

    @property
    def min_ms(self) -> float:
        """The fastest call in ms."""
        return min(self.samples)

    @property
    def mean_ms(self) -> float:
        """The mean in ms; `1000 * batch / mean_ms` is the throughput in items per second."""
        return float(np.mean(self.samples))

    @property
    def median_ms(self) -> float:
        """The median in ms."""
        return self.percentile_ms(50)

    @property
    def p95_ms(self) -> float:
        """The 95th percentile in ms; a guess below 20 samples."""
        return self.percentile_ms(95)

    @property
    def p99_ms(self) -> float:
        """The 99th percentile in ms; a guess below 100 samples."""
        return self.percentile_ms(99)

    @property
    def cv(self) -> float:
        """The coefficient of variation: standard deviation (n - 1) over mean; 0 for a single sample."""
        return float(np.std(self.samples, ddof=1)) / self.mean_ms if self.count > 1 and self.mean_ms else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The figures, ready for JSON; a percentile for which the samples are too few is None."""
        figures: dict[str, Any] = {name: getattr(self, name) for name in ("min_ms", "mean_ms", "median_ms", "cv")}
        figures["p95_ms"] = self.p95_ms if self.count >= P95_SAMPLES else None
        figures["p99_ms"] = self.p99_ms if self.count >= P99_SAMPLES else None
        return figures | {
            "samples": self.count,
            "warmup": self.warmup,
            "device": self.device,
            "launch_bound": self.launch_bound,
        }

    def __str__(self) -> str:
        tails = f", p95 {self.p95_ms:.4g}" if self.count >= P95_SAMPLES else ""
        tails += f", p99 {self.p99_ms:.4g}" if self.count >= P99_SAMPLES else ""
        bound = ", launch-bound" if self.launch_bound else ""
        return (
            f"{self.median_ms:.4g} ms median (mean {self.mean_ms:.4g}, min {self.min_ms:.4g}{tails}, "
            f"cv {100 * self.cv:.1f} %, {self.count} samples on {self.device}{bound})"
        )

    def __rich__(self) -> Table:
        return _table({"": self}, {})


@dataclass(frozen=True)
class Ratio:
    """A ratio of two times with its 95 % confidence interval; one round gives none, and its ends are NaN.

    >>> print(Ratio(0.5, 0.4, 0.8))
    0.500 (95 % interval 0.400 to 0.800)
    >>> print(Ratio(0.5, 0.4, 0.8).inverse())
    2.000 (95 % interval 1.250 to 2.500)
    """

    value: float
    low: float
    high: float

    def inverse(self) -> Ratio:
        """The gain in speed that belongs to this ratio of times."""
        return Ratio(1 / self.value, 1 / self.high, 1 / self.low)

    def to_dict(self) -> dict[str, float | None]:
        """The three figures, ready for JSON; an interval that is not known is None."""
        known = self.low == self.low
        return {"value": self.value, "low": self.low if known else None, "high": self.high if known else None}

    def __str__(self) -> str:
        if self.low != self.low:
            return f"{self.value:.3f} (one round: no interval)"
        return f"{self.value:.3f} (95 % interval {self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True)
class Comparison:
    """Timings taken in interleaved rounds; `round_ms` holds each candidate's median of each round.

    >>> result = Comparison({"a": Timing((2.0, 2.2)), "b": Timing((1.0, 1.1))}, {"a": (2.0, 2.2), "b": (1.0, 1.1)})
    >>> result.baseline, result.fastest, result.ratio("b").value, result.ratio("a", to="b").value
    ('a', 'b', 0.5, 2.0)
    """

    timings: Mapping[str, Timing]
    round_ms: Mapping[str, tuple[float, ...]]

    @property
    def baseline(self) -> str:
        """The first candidate: what `ratio` compares with unless told otherwise."""
        return next(iter(self.timings))

    @property
    def fastest(self) -> str:
        """The name of the candidate with the lowest median."""
        return min(self.timings, key=lambda name: self.timings[name].median_ms)

    def ratio(self, name: str, to: str | None = None) -> Ratio:
        """The time of `name` over the time of `to` (the baseline): 0.5 is half the time, twice the speed.

        The value is the median, over the rounds that both were in, of the ratio of the two medians of that round, so
        that what slows a whole round cancels out. The interval is the percentile bootstrap over those rounds (Efron
        1979), its seed fixed.
        """
        to = self.baseline if to is None else to
        for given in (name, to):
            if given not in self.timings:
                raise OptionError(f"ratio of {given!r}: no such candidate; there are {', '.join(self.timings)}.")
        common = min(len(self.round_ms[name]), len(self.round_ms[to]))
        ratios = np.asarray(self.round_ms[name][:common]) / np.asarray(self.round_ms[to][:common])
        if common == 1:
            return Ratio(float(ratios[0]), float("nan"), float("nan"))
        picks = np.random.default_rng(0).integers(0, len(ratios), (_RESAMPLES, len(ratios)))
        low, high = np.percentile(np.median(ratios[picks], axis=1), (2.5, 97.5))
        return Ratio(float(np.median(ratios)), float(low), float(high))

    def to_dict(self) -> dict[str, Any]:
        """Each candidate's figures with its `ratio` to the baseline, ready for JSON."""
        rows = {name: timing.to_dict() | {"ratio": self.ratio(name).to_dict()} for name, timing in self.timings.items()}
        return {"baseline": self.baseline, "rounds": max(map(len, self.round_ms.values())), "candidates": rows}

    def __str__(self) -> str:
        return "\n".join(f"{name}: {timing}, ratio {self.ratio(name)}" for name, timing in self.timings.items())

    def __rich__(self) -> Table:
        return _table(self.timings, {name: self.ratio(name) for name in self.timings})


def measure(
    fn: Callable[..., object],
    *args: object,
    samples: int = 100,
    warmup: int | None = None,
    device: torch.device | str | None = None,
) -> Timing:
    """Time `fn(*args)`, in milliseconds per call.

    `warmup` is a number of calls; None warms up until the medians of successive windows (1, 2, 4 ... 32 calls) agree
    within 3 %: for at least 63 calls and 0.1 s, but no longer than until the window in which 5 s or 5000 calls pass.
    `device` None is the GPU where a tensor in `args` is on one, or where this process has initialised CUDA already;
    else the CPU. On a GPU each call lies between two events on the current stream, one untimed call goes ahead, and
    the host waits once, at the end. On a CPU `time.perf_counter_ns` goes around each call. Python's garbage
    collector is off meanwhile.

    Raises OptionError for a wrong argument; what `fn` raises passes through. Gives a MeasurementWarning where the
    samples are too few for their percentiles, where they drift, and where the host's launches bound the GPU.

    >>> import time
    >>> timing = measure(time.sleep, 0.002)
    >>> timing.count, timing.device, 2 <= timing.min_ms <= timing.median_ms <= timing.p99_ms
    (100, 'cpu', True)
    """
    _check_call("fn", fn)
    _check_count("samples", samples, 1)
    where, call = _check_place(device, args, warmup), partial(fn, *args)
    with _on(where):
        recorder = _recorder(where, samples, _warm_up(where, call, warmup))
        recorder.turn(call, samples)
        timing = recorder.timing()
    _warn({"fn": timing}, None)
    return timing


def compare(
    candidates: Mapping[str, Callable[..., object]],
    *args: object,
    samples: int | Mapping[str, int] = 100,
    rounds: int | None = None,
    warmup: int | None = None,
    device: torch.device | str | None = None,
) -> Comparison:
    """Time several callables on the same arguments in interleaved rounds; the first is the baseline of the ratios.

    Each round calls every candidate, in an order shuffled anew with a fixed seed, so that none always follows the
    same one and a wandering clock meets all of them. `samples` is per candidate, a mapping where they differ, and is
    spread over `rounds` (20, or fewer where there are fewer samples); a candidate with fewer samples than that is in
    the first rounds only. On a GPU the host waits between candidates, so that none hides its launches behind the work
    of another. The rest, errors and warnings are `measure`'s.

    >>> import time
    >>> result = compare({"nap": lambda: time.sleep(0.002), "sleep": lambda: time.sleep(0.006)}, warmup=5)
    >>> result.fastest, 2 < result.ratio("sleep").value < 3.1
    ('nap', True)
    """
    counts = _check_candidates(candidates, samples)
    most = max(counts.values())
    rounds = min(20, most) if rounds is None else rounds
    _check_count("rounds", rounds, 1, most)
    where = _check_place(device, args, warmup)
    calls = {name: partial(fn, *args) for name, fn in candidates.items()}
    with _on(where):
        recorders = {name: _recorder(where, counts[name], _warm_up(where, calls[name], warmup)) for name in calls}
        for name, count in _schedule(counts, rounds):
            recorders[name].turn(calls[name], count)
        timings = {name: recorder.timing() for name, recorder in recorders.items()}
    _warn(timings, rounds)
    return Comparison(timings, {name: _round_medians(timing.samples, rounds) for name, timing in timings.items()})


def _turns(count: int, rounds: int) -> list[int]:
    """How many of `count` samples each round takes: equal, the remainder going to the first rounds."""
    return [count // rounds + (index < count % rounds) for index in range(rounds)]


def _schedule(counts: Mapping[str, int], rounds: int) -> Iterator[tuple[str, int]]:
    """Who is called, and how often in a row."""
    shuffled, order = random.Random(0), list(counts)
    for index in range(rounds):
        shuffled.shuffle(order)
        for name in order:
            if turns := _turns(counts[name], rounds)[index]:
                yield name, turns


def _round_medians(samples: tuple[float, ...], rounds: int) -> tuple[float, ...]:
    ends = np.cumsum(_turns(len(samples), rounds))[:-1]
    return tuple(float(np.median(part)) for part in np.split(np.asarray(samples), ends) if len(part))


class _HostRecorder:
    """Times calls with the monotonic clock of the host."""

    def __init__(self, warmup: int) -> None:
        self.samples: list[float] = []
        self.warmup = warmup

    def turn(self, call: Callable[[], object], count: int) -> None:
        with _collector_off():
            for _ in range(count):
                start = time.perf_counter_ns()
                call()
                self.samples.append((time.perf_counter_ns() - start) / 1e6)

    def timing(self) -> Timing:
        return Timing(tuple(self.samples), "cpu", self.warmup)


class _EventRecorder:
    """Times calls on the current stream of a GPU, with a pair of events each and no wait inside a turn."""

    def __init__(self, device: torch.device, count: int, warmup: int) -> None:
        self.stream, self.warmup = torch.cuda.current_stream(device), warmup
        self.lead, *self.ends = (torch.cuda.Event(enable_timing=True) for _ in range(count + 1))
        self.starts = [torch.cuda.Event(enable_timing=True) for _ in range(count)]
        for event in (self.lead, *self.starts, *self.ends):
            event.record(self.stream)  # creates it, so that no creation falls between a pair
        self.taken = self.waited = 0

    def turn(self, call: Callable[[], object], count: int) -> None:
        self.stream.synchronize()
        with _collector_off():
            call()  # untimed: the first sample, as the others, finds the GPU at work
            before = self.lead
            before.record(self.stream)
            for index in range(self.taken, self.taken + count):
                start, end = self.starts[index], self.ends[index]
                start.record(self.stream)
                call()
                end.record(self.stream)
                self.waited += before.query()  # done before this one was launched: the GPU waited for the host
                before = end
        self.taken += count

    def timing(self) -> Timing:
        self.stream.synchronize()
        samples = tuple(start.elapsed_time(end) for start, end in zip(self.starts, self.ends, strict=True))
        return Timing(samples, str(self.stream.device), self.warmup, launch_bound=2 * self.waited > len(samples))


def _recorder(where: torch.device, count: int, warmup: int) -> _HostRecorder | _EventRecorder:
    return _HostRecorder(warmup) if where.type == "cpu" else _EventRecorder(where, count, warmup)


def _on(where: torch.device) -> AbstractContextManager[object]:
    return nullcontext() if where.type == "cpu" else torch.cuda.device(where)


@contextmanager
def _collector_off() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _warm_up(where: torch.device, call: Callable[[], object], warmup: int | None) -> int:
    """Call `warmup` times, or until the time is steady; says how many calls that took."""
    if warmup is not None:
        for _ in range(warmup):
            call()
        return warmup
    started, calls, before, size = time.monotonic(), 0, 0.0, 1
    while True:
        recorder = _recorder(where, size, 0)
        recorder.turn(call, size)
        median, calls = recorder.timing().median_ms, calls + size
        steady = size == _WINDOW and abs(median - before) <= _STEADY * median  # short ones agree by chance
        spent = time.monotonic() - started
        if (steady and spent >= _WARMUP_MIN_S) or spent >= _WARMUP_MAX_S or calls >= _WARMUP_MAX_CALLS:
            return calls
        before, size = median, min(2 * size, _WINDOW)


def _drift(samples: tuple[float, ...]) -> tuple[float, float] | None:
    """The medians of the first and the last third, where they differ by more than noise and `_DRIFT` explain.

    The noise is four standard errors of the difference of two medians (1.2533 σ/√n each), σ from the median absolute
    deviation.
    """
    third = len(samples) // 3
    if third < 10:  # fewer say nothing: one in fifty would be called wandering by chance
        return None
    first, last = np.asarray(samples[:third]), np.asarray(samples[-third:])
    medians = float(np.median(first)), float(np.median(last))
    errors = [
        1.2533 * 1.4826 * float(np.median(np.abs(part - median))) / third**0.5
        for part, median in zip((first, last), medians, strict=True)
    ]
    change = abs(medians[1] - medians[0])
    return medians if change > _DRIFT * medians[0] + 4 * float(np.hypot(*errors)) else None


def _warn(timings: Mapping[str, Timing], rounds: int | None) -> None:
    """Say what makes these timings less certain than they look; `rounds` is None outside a comparison."""

    def say(message: str) -> None:
        warnings.warn(message, MeasurementWarning, stacklevel=4)

    fewest = min(timing.count for timing in timings.values())
    shared = min(rounds, fewest) if rounds is not None else INTERVAL_ROUNDS
    needs = [f"p95 needs {P95_SAMPLES} samples"] * (fewest < P95_SAMPLES)
    needs += [f"p99 needs {P99_SAMPLES} samples"] * (fewest < P99_SAMPLES)
    needs += [f"an interval needs {INTERVAL_ROUNDS} rounds, not {shared}"] * (shared < INTERVAL_ROUNDS)
    if needs:
        names = ", ".join(name for name, timing in timings.items() if timing.count == fewest)
        say(f"Too few samples ({names}: {fewest}): {', '.join(needs)}. Take more samples, or drop those figures.")
    drifts = {name: drift for name, timing in timings.items() if (drift := _drift(timing.samples))}
    if drifts:
        moved = "; ".join(f"{name}: {a:.4g} ms at first, {b:.4g} ms at last" for name, (a, b) in drifts.items())
        say(
            f"The time wandered while it was measured ({moved}). Raise warmup=, keep other work off the device, or "
            "lock its clocks (nvidia-smi --lock-gpu-clocks), then measure again."
        )
    bound = [f"{name}: {timing.median_ms:.4g} ms" for name, timing in timings.items() if timing.launch_bound]
    if bound:
        say(
            f"The GPU waited for the host ({'; '.join(bound)}): these times are the host's launches, not the GPU's "
            "work. Capture a CUDA graph, raise the batch, or report it as a host time."
        )


def _check_call(name: str, fn: object) -> None:
    if not callable(fn):
        raise OptionError(f"{name} is {fn!r}; it must be callable: measure(fn, *args) calls fn(*args).")


def _check_count(name: str, count: object, low: int, high: int | None = None) -> None:
    if not isinstance(count, int) or isinstance(count, bool) or count < low or (high is not None and count > high):
        allowed = (
            f"from {low} to {high} (the most samples of a candidate)" if high is not None else f"of at least {low}"
        )
        raise OptionError(f"{name} is {count!r}; it must be a whole number {allowed}.")


def _check_place(device: Any, args: tuple[object, ...], warmup: int | None) -> torch.device:
    if warmup is not None:
        _check_count("warmup", warmup, 0)
    if device is None:
        for leaf in _pytree.tree_leaves(args):
            if isinstance(leaf, torch.Tensor) and leaf.is_cuda:
                return leaf.device
        initialised = torch.cuda.is_initialized()
        return torch.device("cuda", torch.cuda.current_device()) if initialised else torch.device("cpu")
    try:
        where = torch.device(device)
    except (RuntimeError, TypeError, ValueError, OverflowError):
        where = torch.device("meta")
    if where.type == "cpu" or (where.type == "cuda" and (where.index or 0) < torch.cuda.device_count()):
        return where
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    raise OptionError(f"device is {device!r}; here it may be None, {', '.join(['cpu', *gpus])}.")


def _check_candidates(candidates: object, samples: Any) -> dict[str, int]:
    if not isinstance(candidates, Mapping) or not candidates:
        raise OptionError(f"candidates is {candidates!r}; it must be a mapping of names to callables: {{'name': fn}}.")
    for name, fn in candidates.items():
        if not isinstance(name, str):
            raise OptionError(f"candidates names one {name!r}; a name must be a string.")
        _check_call(f"candidates[{name!r}]", fn)
    counts = samples if isinstance(samples, Mapping) else dict.fromkeys(candidates, samples)
    if set(counts) != set(candidates):
        raise OptionError(f"samples has {', '.join(map(str, counts))}; it must name {', '.join(candidates)}.")
    for name in candidates:
        _check_count("samples" if counts is not samples else f"samples[{name!r}]", counts[name], 1)
    return {name: counts[name] for name in candidates}


def _table(timings: Mapping[str, Timing], ratios: Mapping[str, Ratio]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for heading in ("median ms", "mean ms", "min ms", "p95 ms", "p99 ms", "cv %", "samples", "ratio")[
        : 7 + bool(ratios)
    ]:
        table.add_column(heading, justify="right")
    for name, timing in timings.items():
        tails = [f"{value:.4g}" if value else "-" for value in map(timing.to_dict().get, ("p95_ms", "p99_ms"))]
        figures = [f"{value:.4g}" for value in (timing.median_ms, timing.mean_ms, timing.min_ms)]
        ratio = [f"{ratios[name].value:.3f}"] if ratios else []
        table.add_row(name or timing.device, *figures, *tails, f"{100 * timing.cv:.1f}", str(timing.count), *ratio)
    return table
