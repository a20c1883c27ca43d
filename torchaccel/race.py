"""The race: build with every backend of a field, gate each, time the survivors side by side, keep the fastest."""

import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from typing import Any

import torch

from torchaccel.backends.base import Backend
from torchaccel.build import Builder, Built, Captured, describe
from torchaccel.cache.program_key import NoKeyError
from torchaccel.cache.results import race_key, remember, remembered
from torchaccel.cache.store import Cache
from torchaccel.errors import AccuracyError, BuildError, CacheWarning, DeviceMemoryError, MeasurementWarning
from torchaccel.failures import as_build_error
from torchaccel.figures import Comparison, Ratio
from torchaccel.memory import is_out_of_memory, release
from torchaccel.options import RACE_BUDGET_S
from torchaccel.pool import Pool
from torchaccel.program import Program
from torchaccel.report import RaceEntry, RaceRecord
from torchaccel.runner import Runner
from torchaccel.signature import Call
from torchaccel.streaming import Ring
from torchaccel.timing import compare
from torchaccel.weights import WeightRule

SAMPLES = (100, 200, 400)  # of each survivor: more, for as long as the lead of the fastest may be noise
WARM_UP = 20  # calls; the gate has run each of them before
FEWEST, TIMED_MS = 5, 20_000  # samples of slow candidates: as many as fit into that time, or the fewest
SLACK = 1.02  # what the smallest of those that noise does not tell apart may take of the time of the fastest
STREAMED = 8  # batches in a sample of the objective "stream"


@dataclass
class Racer(Builder):
    """A builder whose engine is the fastest of those that its backends can build, and that pass the gate.

    `out` has, by name, why a backend does not take part; `races` gets the record of each race.
    """

    out: Mapping[str, str] = field(default_factory=dict)
    races: list[RaceRecord] = field(default_factory=list)

    def __call__(
        self, call: Call, tensors: Sequence[torch.Tensor], pool: Pool, captured: Captured | None = None
    ) -> tuple[Built, Runner]:
        """The winner's plan and first runner for a call whose tensors, on the device, are `tensors`.

        Where the cache has the race already, its winner alone is built. Of several processes that want one race, one
        runs it: two at once would disturb each other's times.
        """
        captured = captured or self.capture(call, tensors, pool)
        cache, key = self.cache, None
        if cache is not None:
            with suppress(NoKeyError):  # then each process has a race of its own
                key = race_key(self.backends, captured.program, tensors, self.options)
        if cache is None or key is None:
            return self._race(call, tensors, pool, captured)
        tried: list[RaceRecord] = []
        found = self._remembered(cache, key, tried, call, tensors, pool, captured)
        if found is None:
            with cache.lock(key, longer_s=self.options.race_budget_s or RACE_BUDGET_S):
                found = self._remembered(cache, key, tried, call, tensors, pool, captured)
                if found is None:
                    found = self._race(call, tensors, pool, captured)
                    what = f"{type(self.module).__name__} {describe(tensors)} {self.options.precision}"
                    remember(cache, key, self.races[-1], self.module, what)
        return found

    def _remembered(  # noqa: PLR0917
        self,
        cache: Cache,
        key: dict[str, Any],
        tried: list[RaceRecord],
        call: Call,
        tensors: Sequence[torch.Tensor],
        pool: Pool,
        captured: Captured,
    ) -> tuple[Built, Runner] | None:
        """What the winner of an earlier race builds now; None where there was no such race, or it no longer serves.

        A winner that misses the gate may pass it with other weights, so its race stays; none is `tried` twice.
        """
        for kept_under, race in remembered(cache, key, self.module):
            if race in tried:
                continue
            tried.append(race)
            winner = next(backend for backend in self.backends if backend.name == race.winner.name)
            try:
                found = self._alone(winner)(call, tensors, pool, captured.copy())
            except DeviceMemoryError:
                raise
            except AccuracyError as error:
                reason = str(error)
            except BuildError as error:
                cache.discard(kept_under)
                reason = str(error)
            else:
                self.races.append(race)
                return found
            warnings.warn(f"{winner.name}, a race's winner in the cache, does not serve: {reason}", CacheWarning, 2)
        return None

    def _alone(self, backend: Backend) -> Builder:
        return Builder(self.module, self.options, (backend,), self.store, self.cache)

    def _race(
        self, call: Call, tensors: Sequence[torch.Tensor], pool: Pool, captured: Captured
    ) -> tuple[Built, Runner]:
        """Build them all, and keep the winner; what the others built is released.

        Raises `BuildError` with every reason where nobody is left, and before anything is built where the objective
        cannot be timed on such a call.
        """
        if self.options.objective == "stream":
            self._batch(call, tensors)
        held, kept = self.store.rules(), frozenset[WeightRule]()
        try:
            best, runner = self._won(call, tensors, pool, captured)
            kept = frozenset(best.plan.payload.rules.values() if isinstance(best.plan.payload, Program) else ())
        finally:
            self.store.keep(held | kept)
            release(pool.device)
        return best, runner

    def _won(self, call: Call, tensors: Sequence[torch.Tensor], pool: Pool, captured: Captured) -> tuple[Built, Runner]:
        started = time.perf_counter()
        entries = {name: RaceEntry(name, reason=reason) for name, reason in self.out.items()}
        built = self._build_all(call, tensors, pool, captured, entries)
        trials = self._trials(call, tensors, entries, {name: runner for name, (_, runner) in built.items()})
        if not trials:
            said = "; ".join(f"{entry.name}: {entry.reason}" for entry in entries.values())
            raise BuildError(f"no backend could serve {describe(tensors)}. {said}")
        winner = _decide(trials, entries, pool.device)
        best, runner = built[winner]
        pool.turn(partial(_uncount, pool, [runner for _, runner in built.values()]))
        ordered = sorted(entries.values(), key=lambda entry: (entry.median_ms is None, entry.median_ms or 0.0))
        race_ms = (time.perf_counter() - started) * 1e3
        self.races.append(RaceRecord(describe(tensors), self.options.objective, tuple(ordered), race_ms))
        return best, runner

    def _build_all(
        self,
        call: Call,
        tensors: Sequence[torch.Tensor],
        pool: Pool,
        captured: Captured,
        entries: dict[str, RaceEntry],
    ) -> dict[str, tuple[Built, Runner]]:
        """Who could be built and passed the gate; the entries have the figures, or the reason."""
        built: dict[str, tuple[Built, Runner]] = {}
        budget_s = self.options.race_budget_s or RACE_BUDGET_S
        started = time.perf_counter()
        with _progress(len(self.backends), budget_s) as show:
            for backend in self.backends:
                entry = entries[backend.name] = RaceEntry(backend.name)
                if built and time.perf_counter() - started > budget_s:
                    entry.reason = f"not built: race_budget_s={budget_s:g} was spent"
                    continue
                show(backend.name)
                try:
                    found = self._alone(backend)(call, tensors, pool, captured.copy())
                except (BuildError, AccuracyError) as error:
                    entry.reason, entry.out_of_memory = str(error), isinstance(error, DeviceMemoryError)
                    entry.missed_gate = isinstance(error, AccuracyError)
                    continue
                built[backend.name] = found
                _describe(entry, *found)
        return built

    def _trials(
        self,
        call: Call,
        tensors: Sequence[torch.Tensor],
        entries: dict[str, RaceEntry],
        runners: Mapping[str, Runner],
    ) -> dict[str, Callable[[], object]]:
        """What is timed of each, run once; who fails at it, as for want of memory for a stream, is out."""
        trials = {}
        for name, runner in runners.items():
            try:
                with as_build_error(name, "timed"):
                    trial = self._trial(call, tensors, runner)
                    with torch.inference_mode():
                        trial()
            except BuildError as error:
                entries[name].reason, entries[name].out_of_memory = str(error), is_out_of_memory(error)
                continue
            trials[name] = trial
        return trials

    def _trial(self, call: Call, tensors: Sequence[torch.Tensor], runner: Runner) -> Callable[[], object]:
        """What is timed: a call on the device or, for the objective "stream", some batches from pinned memory."""
        if self.options.objective != "stream" or runner.pool.device.type == "cpu":
            return partial(runner.compute, tensors)
        batch = self._batch(call, [tensor.cpu().pin_memory() for tensor in tensors])
        ring = Ring(runner.pool.device, lambda _: runner, None, frozenset(batch if isinstance(batch, dict) else ()))
        return lambda: deque(ring.serve(repeat(batch, STREAMED)), maxlen=0)

    def _batch(self, call: Call, tensors: Sequence[torch.Tensor]) -> Any:
        """A call as a batch of `stream()`: a tuple of its arguments, or a dict of them."""
        args, kwargs = call.arguments(tensors)
        if args and kwargs:
            raise BuildError("objective='stream' times stream(), whose batches are all positional or all by keyword.")
        return kwargs or tuple(args)


def _decide(trials: Mapping[str, Callable[[], object]], entries: dict[str, RaceEntry], device: torch.device) -> str:
    """The name of the winner: the fastest or, among those that it leads by no more than noise, the smallest."""
    comparison = _compare(trials, device)
    fastest = comparison.fastest
    close = [name for name in trials if name == fastest or _is_close(comparison.ratio(name, fastest))]
    winner = min(close, key=lambda name: (entries[name].device_mib, comparison.timings[name].median_ms))
    for name in trials:
        ratio, entry = comparison.ratio(name, winner), entries[name]
        entry.median_ms, entry.ratio = comparison.timings[name].median_ms, ratio.value
        if name == winner:
            entry.outcome = "won"
        elif name in close:
            entry.outcome, entry.reason = "lost", "as fast, within noise; the winner takes no more memory"
        else:
            entry.outcome, entry.reason = "lost", f"takes {ratio} of the winner's time"
    return winner


def _is_close(ratio: Ratio) -> bool:
    """Whether noise may be all of a lead; a large one is no less likely to be real because much noise is in it."""
    return not ratio.low > 1 and ratio.value <= SLACK


def _uncount(pool: Pool, runners: Sequence[Runner]) -> None:
    """Take back the calls that timing by `stream()` counted; other runners of the pool may serve meanwhile."""
    for runner in runners:
        pool.calls -= runner.record.calls
        runner.record.calls = 0


def _compare(trials: Mapping[str, Callable[[], object]], device: torch.device) -> Comparison:
    """Interleaved timings, until the lead of the fastest is outside noise, or the samples or the time at their most."""
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore", MeasurementWarning)
        once = compare(trials, samples=1, warmup=1, device=device)
        most = max(FEWEST, int(TIMED_MS / sum(timing.median_ms for timing in once.timings.values())))
        for samples in SAMPLES:
            count = min(samples, most)
            comparison = compare(trials, samples=count, warmup=min(WARM_UP, count), device=device)
            others = [name for name in trials if name != comparison.fastest]
            if count == most or all(comparison.ratio(name, comparison.fastest).low > 1 for name in others):
                break
    return comparison


def _describe(entry: RaceEntry, built: Built, runner: Runner) -> None:
    """What a candidate took to build, how far its outputs are off, what it holds on the device."""
    record = built.record
    entry.build_ms = record.export_ms + record.build_ms + record.load_ms + record.gate_ms
    entry.relative_error = max((gate.relative_error for gate in record.gates), default=None)
    weights = built.plan.payload.size_bytes() if isinstance(built.plan.payload, Program) else 0
    entry.device_mib = (runner.engine_bytes() + weights) / 2**20 + runner.record.device_mib


@contextmanager
def _progress(count: int, budget_s: float) -> Iterator[Callable[[str], None]]:
    """Show, on a terminal, who is being built and the time so far."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns: tuple[Any, ...] = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("race", total=count)
        number = iter(range(count))

        def show(name: str) -> None:
            progress.update(task, completed=next(number), description=f"race (at most {budget_s:g} s): {name}")

        yield show
