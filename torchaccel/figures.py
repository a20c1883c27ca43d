"""What was timed: the samples of one callable or of several, and the figures that follow from them, in milliseconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from torchaccel.errors import OptionError

if TYPE_CHECKING:
    from rich.table import Table

P95_SAMPLES, P99_SAMPLES, INTERVAL_ROUNDS = 20, 100, 10  # below these a tail or an interval is a guess
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
