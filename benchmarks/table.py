"""Rows of a result file as a person reads them: tables, and a conclusion computed from the figures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

Row = dict[str, Any]
_COLUMNS = ("preci-\nsion", "batch", "mean\nms", "FPS", "gain", "median\nms", "p95\nms", "error", "H2D\nms", "D2H\nms")
_CAPTION = (
    "gain: speed over FP32 at the same batch, the median of interleaved rounds. error: relative L2 error against the "
    "module in strict FP32. H2D, D2H: copying the batch from and the output to pinned memory, on their own."
)


def number(value: float | None) -> str:
    """Four significant digits, at most three decimals (microseconds, of a time in ms); "-" where there is no figure.

    >>> number(0.21534), number(12.3456), number(152345.6), number(0.001234), number(None)
    ('0.215', '12.35', '152346', '0.0012', '-')
    """
    if value is None:
        return "-"
    digits = ".0f" if value >= 1000 else ".4g" if value >= 1 else ".3f" if value >= 0.01 else ".2g"
    return f"{value:{digits}}"


def tables(rows: list[Row], notes: list[str]) -> RenderableType:
    """Everything that was measured: torchaccel's rows, the peers' if there are any, and what to know about them."""
    peers = [row for row in rows if row["route"] == "peer"]
    parts: list[RenderableType] = [_table("", [row for row in rows if row["route"] != "peer"])]
    if peers:
        parts.append(_table("Peers, in the same interleaved rounds", peers))
    parts.append(Text(_CAPTION, style="dim"))
    refused = [f"{label(row)}: {row['reason']}" for row in rows if row["reason"]]
    told = [note for row in rows for note in row["notes"]]
    parts += [Text(f"- {line}") for line in dict.fromkeys((*refused, *told, *notes))]
    return Group(*parts)


def _table(title: str, rows: list[Row]) -> Table:
    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in _COLUMNS:
        table.add_column(
            heading, justify="left" if heading == _COLUMNS[0] else "right", vertical="bottom", no_wrap=True
        )
    table.add_column("backend", vertical="bottom", overflow="fold")
    for row in rows:
        table.add_row(row["precision"], str(row["batch"]), *_figures(row), _route(row))
    return table


def _figures(row: Row) -> Iterator[str]:
    gain, error = row["gain"], row["relative_error"]
    yield number(row["mean_ms"])
    yield number(row["throughput_fps"])
    yield f"{gain['value']:.2f}x" if gain else "-"
    yield from (number(row[name]) for name in ("median_ms", "p95_ms"))
    yield "-" if error is None else f"{error:.0e}" if error else "0"
    yield from (number(row.get(name)) for name in ("h2d_ms", "d2h_ms"))


def _route(row: Row) -> str:
    if row["reason"]:
        return f"{row['backend']}: not run"
    return row["backend"] + (" (the module)" if row["route"] == "baseline" else "")


def label(row: Row) -> str:
    """What a row is called in a sentence."""
    return f"{row['precision']} at batch {row['batch']} ({row['backend']})"


def conclusion(rows: list[Row]) -> list[str]:
    """What the figures say, one sentence each: the gain over FP32, the gain from batching, the fastest peer."""
    ran = [row for row in rows if row["median_ms"] is not None]
    own = [row for row in ran if row["route"] != "peer"]
    if not own:
        return ["Nothing could be measured: see the reasons above."]
    lines = [_gain(row) for row in own if row["precision"] != "fp32"]
    lines = lines or [f"{label(row)} takes {number(row['median_ms'])} ms, the median." for row in own]
    lines += [_batching(row) for row in own if row.get("batching")]
    lines += filter(None, (_fastest_peer(row, ran) for row in own if row["route"] == "torchaccel"))
    return lines


def _gain(row: Row) -> str:
    what = f"{row['precision']} at batch {row['batch']}"
    if not row["gain"]:
        return f"{what} takes {number(row['median_ms'])} ms; there is no FP32 row to compare it with."
    return f"{what} is {_speed(row['gain'])} FP32 ({row['gain']['over']})."


def _batching(row: Row) -> str:
    gain = row["batching"]
    return (
        f"{row['precision']}: batch {row['batch']} instead of {gain['over_batch']} gives {gain['value']:.2f} times "
        f"the FPS ({_interval(gain)}), {number(row['throughput_fps'])} FPS."
    )


def _fastest_peer(row: Row, ran: list[Row]) -> str | None:
    peers = [
        other
        for other in ran
        if other.get("versus") and (other["precision"], other["batch"]) == (row["precision"], row["batch"])
    ]
    if not peers:
        return None
    best = min(peers, key=lambda other: other["median_ms"])
    return f"{label(row)} is {_speed(best['versus'])} the fastest peer, {best['backend']}."


def _speed(ratio: dict[str, Any]) -> str:
    value, interval = ratio["value"], _interval(ratio)
    if ratio["low"] is not None and ratio["low"] <= 1 <= ratio["high"]:
        return f"not measurably faster or slower ({value:.2f} times the speed, {interval}) than"
    if value > 1:
        return f"{value:.2f} times as fast ({interval}) as"
    return f"slower, at {value:.2f} times the speed ({interval}), than"


def _interval(ratio: dict[str, Any]) -> str:
    if ratio["low"] is None:
        return "one round: no interval"
    return f"95 % interval {ratio['low']:.2f} to {ratio['high']:.2f}"
