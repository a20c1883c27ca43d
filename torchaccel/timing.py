"""Measure and compare callables, always in milliseconds: CUDA events on a GPU, a monotonic clock on a CPU."""

from __future__ import annotations

import gc
import random
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree

from torchaccel.errors import MeasurementWarning, OptionError
from torchaccel.figures import INTERVAL_ROUNDS, P95_SAMPLES, P99_SAMPLES, Comparison, Timing

_DRIFT = 0.05  # the change from the first third of the samples to the last that is called wandering
_STEADY, _WARMUP_MIN_S, _WARMUP_MAX_S, _WARMUP_MAX_CALLS, _WINDOW = 0.03, 0.1, 5.0, 5000, 32


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
