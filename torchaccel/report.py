"""The records that a build and a gate leave, and the report that shows them."""

import dataclasses
import io
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # rich takes longer to import than all of torchaccel; only who prints a report pays for it
    from rich.console import Group
    from rich.table import Table

MAX_OPERATORS_SHOWN = 12


@dataclass(frozen=True)
class OutputError:
    """How one output of an engine differs from the module's.

    Floating outputs have `relative_error` = ‖y−r‖/‖r‖ and `max_abs_error`; for integers and booleans `relative_error`
    is the fraction of elements that differ. `not_finite` says where only one of the two is finite, and `is_zero` that
    the module's output is finite and so near zero that the comparison says little.
    """

    name: str
    shape: tuple[int, ...]
    relative_error: float
    max_abs_error: float
    not_finite: str
    bound: float
    is_zero: bool = False

    @property
    def passed(self) -> bool:
        """Whether the output is within its bound and finite where the module's is."""
        return not self.not_finite and self.relative_error <= self.bound

    def __str__(self) -> str:
        text = (
            f"{self.name} {list(self.shape)}: relative error {self.relative_error:.3g} (bound {self.bound:.3g}), "
            f"largest absolute error {self.max_abs_error:.3g}"
        )
        return f"{text}, {self.not_finite}" if self.not_finite else text


@dataclass(frozen=True)
class GateRecord:
    """One check of an engine: every output, at one batch size where the batch is dynamic."""

    outputs: tuple[OutputError, ...]
    batch: int | None = None

    @property
    def passed(self) -> bool:
        """Whether every output passed."""
        return all(output.passed for output in self.outputs)

    @property
    def not_finite(self) -> bool:
        """Whether any output has values that are finite in only one of engine and module."""
        return any(output.not_finite for output in self.outputs)

    @property
    def relative_error(self) -> float:
        """The largest relative error of any output."""
        return max((output.relative_error for output in self.outputs), default=0.0)


@dataclass
class Coverage:
    """Which operators run inside TensorRT engines and which outside, with how often each stands in the graph.

    `outside_time_share` is the share of a run's time, 0 to 1, that passes outside engines, and `outside_time_shares`
    that of each operator; None and empty where everything is inside or nothing was measured.
    """

    inside: Counter[str] = field(default_factory=Counter)
    outside: Counter[str] = field(default_factory=Counter)
    engines: int = 0
    outside_time_share: float | None = None
    outside_time_shares: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        total = sum(self.inside.values()) + sum(self.outside.values())
        text = f"{sum(self.inside.values())} of {total} operators in {self.engines} engine(s)"
        if not self.outside:
            return text
        text = f"{text}; outside: {_counted(self.outside, self.outside_time_shares)}"
        return text if self.outside_time_share is None else f"{text}; {self.outside_time_share:.1%} of the time"


@dataclass
class EngineRecord:
    """One engine that was built: what for, by whom, how long it took, how it was checked.

    `from_cache` says that it was built before, mostly by another process: `build_ms` is then the time of the look-up.
    `first_call_ms` is the whole of the first call, and `refresh_ms` of taking new weights the last time (0: never).
    """

    signature: str
    backend: str
    precision: str
    library: str = ""
    export_ms: float = 0.0
    build_ms: float = 0.0
    load_ms: float = 0.0
    gate_ms: float = 0.0
    first_call_ms: float = 0.0
    refresh_ms: float = 0.0
    folded_batch_norms: int = 0
    gates: tuple[GateRecord, ...] = ()
    coverage: Coverage | None = None
    plan_mib: float = 0.0
    fell_back_because: str = ""
    from_cache: bool = False
    not_cached_because: str = ""


@dataclass
class RaceEntry:
    """One backend in a race: `outcome` is "won", "lost" or, with the reason, "out" (not built, or stopped by the gate).

    `median_ms` is of a call, or of some batches through `stream()`; `ratio` is over the winner's; `build_ms` is the
    whole build, gate included; `device_mib` weights, buffers and graph. `out_of_memory` says that it is out for want of
    device memory, of which there may be more another time; `missed_gate` that its outputs were off, with these weights.
    """

    name: str
    outcome: str = "out"
    reason: str = ""
    median_ms: float | None = None
    ratio: float | None = None
    relative_error: float | None = None
    device_mib: float = 0.0
    build_ms: float | None = None
    out_of_memory: bool = False
    missed_gate: bool = False


@dataclass(frozen=True)
class RaceRecord:
    """One race: the field at one signature, fastest first. Printed, it is a table.

    `from_cache` says that the race was run before, mostly by another process: the figures are of then, and this time
    the winner alone was built.
    """

    signature: str
    objective: str
    entries: tuple[RaceEntry, ...]
    race_ms: float = 0.0
    from_cache: bool = False

    @property
    def winner(self) -> RaceEntry:
        """Who won."""
        return next(entry for entry in self.entries if entry.outcome == "won")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return dataclasses.asdict(self)

    def __rich__(self) -> "Table":
        title = f"race for {self.objective}, {self.signature}: {self.race_ms / 1e3:.1f} s"
        title += ", from the cache: the figures of an earlier race" if self.from_cache else ""
        return _table(title, _RACE_COLUMNS, [_race_row(entry) for entry in self.entries])

    def __str__(self) -> str:
        return _printed(self)


@dataclass
class RunnerRecord:
    """One runner: its signature, whether its graph is in use or why not, and its memory."""

    signature: str
    graph: bool
    why_no_graph: str = ""
    device_mib: float = 0.0
    calls: int = 0


@dataclass
class Report:
    """What a compiled module did: printed, it is a table; `to_dict()` is for machines.

    `calls_by_engine` and `calls_by_module` count the calls served by an engine and by the module itself;
    `device_memory_mib` is what engines, buffers and graphs hold. `refresh_ms` is the host's time for the last refresh;
    what an engine took, one that is built again included, is in `engines`.
    """

    module: str
    precision: str
    device: str
    backend_asked: str
    backend: str = ""
    backend_reason: str = ""
    calls_by_engine: int = 0
    calls_by_module: int = 0
    builds: int = 0
    refreshes: int = 0
    refresh_ms: float = 0.0
    device_memory_mib: float = 0.0
    engines: list[EngineRecord] = field(default_factory=list)
    runners: list[RunnerRecord] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    races: list[RaceRecord] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The whole report as plain dictionaries, lists, numbers and strings, ready for JSON.

        Beside the fields it has the figures of the newest engine and runner at the top level: `graph`,
        `build_ms` (export, build and load), `first_call_ms` and `relative_error`.
        """
        plain = dataclasses.asdict(self)
        for engine, record in zip(plain["engines"], self.engines, strict=True):
            if record.coverage is not None:  # asdict counts a Counter's items anew
                engine["coverage"]["inside"] = dict(record.coverage.inside)
                engine["coverage"]["outside"] = dict(record.coverage.outside)
        newest = self.engines[-1] if self.engines else None
        plain["build_ms"] = newest.export_ms + newest.build_ms + newest.load_ms if newest else None
        plain["first_call_ms"] = newest.first_call_ms if newest else None
        plain["relative_error"] = max((gate.relative_error for gate in newest.gates), default=None) if newest else None
        plain["graph"] = (self.runners[-1].graph or self.runners[-1].why_no_graph) if self.runners else None
        return plain

    def __rich__(self) -> "Group":
        from rich.console import Group

        parts: list[Any] = [_table(f"torchaccel: {self.module}", (), self._summary())]
        if self.engines:
            parts.append(_table("engines", _ENGINE_COLUMNS, [_engine_row(engine) for engine in self.engines]))
        if self.runners:
            parts.append(_table("runners", _RUNNER_COLUMNS, [_runner_row(runner) for runner in self.runners]))
        parts += self.races
        for engine in self.engines:
            if engine.fell_back_because:
                parts.append(f"• {engine.backend} is the fallback: {engine.fell_back_because}".replace("[", "\\["))
            if engine.from_cache:
                parts.append(f"• the engine for {engine.signature} came from the cache".replace("[", "\\["))
            if engine.not_cached_because:
                parts.append(f"• not kept in the cache, since {engine.not_cached_because}".replace("[", "\\["))
        parts += [f"• {event}".replace("[", "\\[") for event in self.events]
        return Group(*parts)

    def __str__(self) -> str:
        return _printed(self)

    def _summary(self) -> list[tuple[str, ...]]:
        backend = self.backend or "none yet: it is built at the first call"
        return [
            ("backend", f"{backend} (asked: {self.backend_asked}) {self.backend_reason}".strip()),
            ("precision", self.precision),
            ("device", self.device),
            ("calls", f"{self.calls_by_engine} by an engine, {self.calls_by_module} by the module itself"),
            ("builds", str(self.builds)),
            ("refreshes", f"{self.refreshes}, the last in {self.refresh_ms:.1f} ms" if self.refreshes else "0"),
            ("device memory", f"{self.device_memory_mib:.1f} MiB"),
        ]


_TIMES = ("export ms", "build ms", "load ms", "first call ms", "refresh ms")
_ENGINE_COLUMNS = ("inputs", "backend", *_TIMES, "error", "bound", "coverage")
_RUNNER_COLUMNS = ("inputs", "CUDA graph", "device MiB", "calls")


_RACE_COLUMNS = ("backend", "outcome", "median ms", "ratio", "error", "device MiB", "build ms", "why")


def _race_row(entry: RaceEntry) -> tuple[str, ...]:
    figures = ((entry.median_ms, ".4g"), (entry.ratio, ".3f"), (entry.relative_error, ".2g"))
    shown = ["-" if value is None else format(value, shape) for value, shape in figures]
    built = ("-", "-") if entry.build_ms is None else (f"{entry.device_mib:.1f}", f"{entry.build_ms:.0f}")
    return (entry.name, entry.outcome, *shown, *built, entry.reason)


def _printed(shown: Any) -> str:
    from rich.console import Console

    buffer = io.StringIO()
    Console(file=buffer, width=120).print(shown)
    return buffer.getvalue()


def _engine_row(engine: EngineRecord) -> tuple[str, ...]:
    error = max((gate.relative_error for gate in engine.gates), default=float("nan"))
    bound = max((output.bound for gate in engine.gates for output in gate.outputs), default=float("nan"))
    times = (engine.export_ms, engine.build_ms, engine.load_ms, engine.first_call_ms, engine.refresh_ms)
    backend = f"{engine.backend} {engine.library}".strip()
    covered = str(engine.coverage or "-")
    return (engine.signature, backend, *(f"{time:.0f}" for time in times), f"{error:.2g}", f"{bound:.2g}", covered)


def _runner_row(runner: RunnerRecord) -> tuple[str, ...]:
    graph = "in use" if runner.graph else f"no: {runner.why_no_graph}"
    return (runner.signature, graph, f"{runner.device_mib:.1f}", str(runner.calls))


def _table(title: str, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", show_header=bool(header))
    for name in header:
        table.add_column(name, justify="right" if "ms" in name.split() else "left", overflow="fold")
    for row in rows:  # as Text, since rich would read the shape in `float32[8, 3]` as markup
        table.add_row(*map(Text, row))
    return table


def _counted(operators: Counter[str], shares: dict[str, float]) -> str:
    shown = [
        f"{name} ×{count}" + (f" ({shares[name]:.1%})" if name in shares else "")
        for name, count in operators.most_common(MAX_OPERATORS_SHOWN)
    ]
    hidden = len(operators) - len(shown)
    return ", ".join(shown) + (f" and {hidden} more" if hidden > 0 else "")
