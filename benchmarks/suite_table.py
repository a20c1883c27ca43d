"""The suite's rows as a person reads them: each cell's best rival beside torchaccel, and what follows from them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from benchmarks import models
from benchmarks.table import number
from torchaccel.precision import PRECISIONS

Row = dict[str, Any]
_HEADINGS = ("model", "preci-\nsion", "batch", "{own}\nms", "replay\nms", "error", "best rival", "ms", "replay\nms")
_CAPTION = (
    "ms: the median of whole calls on device inputs; replay: the CUDA graph alone. ratio: the best rival's call over "
    "{own}'s, the median of interleaved rounds. A rival whose error is beyond the precision's bound is no best one."
)


@dataclass
class Summary:
    """A cell's row of torchaccel, its best rival, and the faster rivals that are beyond the precision's bound."""

    name: str
    own: Row | None = None
    best: Row | None = None
    wrong: list[Row] = field(default_factory=list)

    @property
    def ratio(self) -> dict[str, float | None] | None:
        """The best rival's time over torchaccel's, with its interval; None where either could not be measured."""
        return self.best["versus"] if self.best and self.own and self.own["median_ms"] is not None else None


def summaries(rows: list[Row]) -> list[Summary]:
    """One for each cell, in the order of the rows."""
    cells: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        cells.setdefault((row["model"], row["precision"], row["batch"]), []).append(row)
    return [_summary(_name(*cell), own) for cell, own in cells.items()]


def _name(model: str, precision: str, batch: int) -> str:
    return f"{model} {precision} batch {batch}"


def _summary(name: str, rows: list[Row]) -> Summary:
    peers = [row for row in rows if row["route"] == "peer" and row["median_ms"] is not None]
    right = [row for row in peers if row["relative_error"] <= PRECISIONS[row["precision"]].bound]
    found = Summary(name, next((row for row in rows if row["route"] == "torchaccel"), None))
    found.best = min(right, key=lambda row: row["median_ms"], default=None)
    limit = found.best["median_ms"] if found.best else math.inf
    found.wrong = [row for row in peers if row not in right and row["median_ms"] < limit]
    return found


def geometric_mean(values: Iterable[float]) -> float:
    """The root of a product.

    >>> round(geometric_mean([1.0, 4.0]), 6)
    2.0
    """
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms))


def conclusion(rows: list[Row]) -> list[str]:
    """What the figures say, one sentence each."""
    return [*_conclusion(summaries(rows), _backend(rows)), *_rivals(rows)]


def _backend(rows: list[Row]) -> str:
    """The backend of torchaccel that the rows are of."""
    return next((str(row["backend"]) for row in rows if row["route"] == "torchaccel"), "torchaccel")


def _rivals(rows: list[Row]) -> Iterator[str]:
    """Who was to be measured beside it, and where not all of them were."""
    beside: dict[str, set[str]] = {}
    for row in rows:
        cell = beside.setdefault(_name(row["model"], row["precision"], row["batch"]), set())
        if row["route"] == "peer":
            cell.add(row["backend"])
    every = dict.fromkeys(row["backend"] for row in rows if row["route"] == "peer")
    fewer = [name for name, there in beside.items() if there != set(every)]
    if every:
        yield f"Rivals: {', '.join(every)}{'; not all of them in: ' if fewer else ''}{'; '.join(fewer)}."


def _conclusion(cells: list[Summary], name: str) -> Iterator[str]:
    compared = [(cell, cell.ratio) for cell in cells if cell.ratio]
    if not compared:
        yield "No cell has figures of both torchaccel and a rival: see the reasons in the rows."
        return
    slower = [cell.name for cell, ratio in compared if _at_most(ratio) < 1]
    kept = len(compared) - len(slower)
    yield f"{name} is not slower than the best rival, beyond noise, in {kept} of {len(compared)} cells compared."
    if slower:
        yield f"It is slower in: {'; '.join(slower)}."
    if missing := [cell.name for cell in cells if not cell.ratio]:
        yield f"Not compared, for want of a figure: {'; '.join(missing)}."
    yield from _means(compared, name)
    replays = [f"{c.name} {number(c.own['replay_median_ms'])}" for c in cells if c.own and c.own["replay_median_ms"]]
    if name != "fastest" and replays:
        yield f"Median of a replay of {name}'s graph, ms: {'; '.join(replays)}."
    won = Counter(cell.own["variant"] for cell, _ in compared if cell.own and cell.own["variant"])
    if won:
        yield f"Races won: {', '.join(f'{name} {count}' for name, count in won.most_common())}."


def _means(compared: list[tuple[Summary, dict[str, Any]]], name: str) -> Iterator[str]:
    """The geometric mean over the suite's convolutional models, and over how many of their cells it is."""
    every = {_name(*cell) for cell in product(models.CONVOLUTIONAL, models.PRECISIONS, models.BATCHES)}
    ratios = [ratio["value"] for cell, ratio in compared if cell.name in every]
    names = ", ".join(models.CONVOLUTIONAL)
    if not ratios:
        yield f"No cell of {names} was compared: there is no geometric mean."
        return
    count = f"{len(ratios)} cells" if len(ratios) == len(every) else f"no more than {len(ratios)} of {len(every)} cells"
    yield f"Best rival over {name}, geometric mean over {count} of {names}: {geometric_mean(ratios):.3f}."


def _at_most(ratio: dict[str, Any]) -> float:
    """The upper end of the interval; the value itself, where one round gave none."""
    return float(ratio["value"] if ratio["high"] is None else ratio["high"])


def tables(rows: list[Row]) -> RenderableType:
    """The table of all cells, and under it why what is missing is missing."""
    cells, name = summaries(rows), _backend(rows)
    raced = any(row["variant"] for row in rows if row["route"] == "torchaccel")
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in _HEADINGS:
        words = heading in ("model", "best rival")
        table.add_column(
            heading.format(own=name),
            justify="left" if words else "right",
            vertical="bottom",
            no_wrap=not words,
            overflow="fold",
            min_width=10 if words else None,
        )
    table.add_column("ratio\n(95 % interval)", vertical="bottom", no_wrap=True)
    if raced:
        table.add_column("race won by", vertical="bottom", overflow="fold")
    for cell in cells:
        table.add_row(*_cells(cell), *([cell.own["variant"] or "-" if cell.own else "-"] if raced else []))
    reasons = [f"{_label(row)}: {row['reason']}" for row in rows if row["reason"]]
    wrong = [
        f"{_label(row)}: {number(row['median_ms'])} ms, and wrong: its error is {row['relative_error']:.0e}"
        for cell in cells
        for row in cell.wrong
    ]
    return Group(
        table, Text(_CAPTION.format(own=name), style="dim"), *(Text(f"- {line}") for line in (*wrong, *reasons))
    )


def _cells(cell: Summary) -> Iterator[str]:
    own, best = cell.own, cell.best
    first = own or best
    yield from (first["model"], first["precision"], str(first["batch"])) if first else (cell.name, "", "")
    yield from _figures(own)
    yield "-" if not own or own["relative_error"] is None else f"{own['relative_error']:.0e}"
    yield f"{best['backend']} ({best['variant']})" if best else "-"
    yield from _figures(best)
    yield "-" if not cell.ratio else _ratio(cell.ratio)


def _figures(row: Row | None) -> tuple[str, str]:
    return (number(row["median_ms"]), number(row["replay_median_ms"])) if row else ("-", "-")


def _ratio(ratio: dict[str, Any]) -> str:
    interval = "one round" if ratio["low"] is None else f"{ratio['low']:.2f} to {ratio['high']:.2f}"
    return f"{ratio['value']:.2f} ({interval})"


def _label(row: Row) -> str:
    return f"{_name(row['model'], row['precision'], row['batch'])}, {row['backend']}"
