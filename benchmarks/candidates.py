"""What a benchmark measures: candidates, the rows that they become, and torchaccel's own."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

import torchaccel
from benchmarks.results_file import FIGURES
from torchaccel.compiler import AUTO, BACKENDS
from torchaccel.figures import Comparison
from torchaccel.memory import release
from torchaccel.precision import PRECISIONS, tf32_state
from torchaccel.timing import measure

TIMES = ("min_ms", "mean_ms", "median_ms", "p95_ms", "p99_ms", "cv", "samples", "warmup", "device", "launch_bound")


@dataclass
class Candidate:
    """One row to be: `call` runs it once, as its user would; `replay` replays its CUDA graph alone.

    `reason` says why there is nothing to run. The route is "torchaccel", "baseline" (the module itself in strict
    FP32, where the backend cannot honour it) or "peer". `variant` is a peer's best one, or the winner of `race`.
    """

    route: str
    backend: str
    precision: str
    batch: int
    call: Callable[[], Any] | None = None
    replay: Callable[[], object] | None = None
    input_dtype: str = "float32"
    layout: str = "contiguous"
    graph: bool | str = False
    variant: str | None = None
    reason: str | None = None
    notes: list[str] = field(default_factory=list)
    build_ms: float | None = None
    relative_error: float | None = None
    first_ms: float = 0.0
    race: dict[str, Any] | None = None
    library: str | None = None  # what computes in torchaccel's engine, and the choices that it made

    @property
    def name(self) -> str:
        """Unlike any other candidate's."""
        return f"{self.route} {self.backend} {self.precision} batch {self.batch}"


def relative_error(output: Any, reference: Any) -> float:
    """‖y − r‖ / ‖r‖ in float64; the largest, where there are several outputs. NaN where one is not finite.

    >>> relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0]))
    0.1
    >>> relative_error((torch.ones(1), torch.tensor([3.0, 4.5])), (torch.ones(1), torch.tensor([3.0, 4.0])))
    0.1
    """
    pairs = zip(_pytree.tree_leaves(output), _pytree.tree_leaves(reference), strict=True)
    errors = [_error(found, expected.double()) for found, expected in pairs]
    return max(errors) if all(map(math.isfinite, errors)) else math.nan


def _error(output: Tensor, expected: Tensor) -> float:
    return float((output.to(expected) - expected).norm() / expected.norm())


def quick_ms(call: Callable[[], object], device: torch.device) -> float:
    """The median of a few calls, to choose between variants of one candidate."""
    few = {"samples": 20, "warmup": 3} if device.type == "cuda" else {"samples": 3, "warmup": 1}
    with noting([]):
        return measure(call, device=device, **few).median_ms


def named(error: BaseException) -> str:
    """The kind of an error and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


@contextmanager
def noting(notes: list[str]) -> Iterator[None]:
    """Keep what torchaccel warns about as notes of the row; other libraries' warnings are dropped."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    kinds = (torchaccel.BackendWarning, torchaccel.MeasurementWarning)
    notes += dict.fromkeys(str(warning.message) for warning in caught if issubclass(warning.category, kinds))


def strict(module: nn.Module, inputs: Tensor) -> Callable[[], Any]:
    """The module itself, in FP32 with TF32 off."""

    def call() -> Any:
        with tf32_state(False):
            return module(inputs)

    return call


def baseline(module: nn.Module, inputs: Tensor) -> Candidate:
    """Strict FP32 PyTorch, for want of an engine that computes in FP32."""
    return Candidate("baseline", "eager", "fp32", len(inputs), strict(module, inputs))


def refusal(backend: str, precision: str, device: torch.device) -> tuple[str, str] | None:
    """The backend that would be used, and why it cannot compute in `precision`; None where it can.

    For "auto" it is the first backend that is available, the one that the other rows are of. One that is named and is
    not available is left to `compile`, whose error has the reason, and so is the whole field of "fastest".
    """
    if backend == "fastest":
        return None
    order = AUTO if backend == "auto" else (backend,)
    chosen = next((BACKENDS[name] for name in order if BACKENDS[name].unavailable() is None), None)
    reason = chosen.honours(PRECISIONS[precision], device) if chosen else None
    return (chosen.name, reason) if chosen and reason else None


def ours(compiled: Callable[[], Any], backend: str, precision: str, inputs: Tensor, *others: Tensor) -> Candidate:
    """What `compiled` gives, on `inputs`, its engine built and checked; an error becomes its reason.

    `others` are the same inputs in other layouts, which need no other engine: the row is of the quickest.
    """
    candidate = Candidate("torchaccel", backend, precision, len(inputs))
    candidate.input_dtype = str(inputs.dtype).removeprefix("torch.")
    try:
        with noting(candidate.notes):
            _make_ready(candidate, compiled, inputs, *others)
    # A fault of ours is no reason to leave the rivals out.
    except Exception as error:  # noqa: BLE001
        candidate.reason = str(error) if isinstance(error, torchaccel.TorchAccelError) else named(error)
    else:
        return candidate
    release(inputs.device)  # only here is the error gone, and with it what its frames hold
    return candidate


def _make_ready(candidate: Candidate, compiled: Callable[[], Any], inputs: Tensor, *others: Tensor) -> None:
    """Build the engine, and let the candidate have what the row says of it; what is to be called comes last."""
    model = compiled()
    runner = model.runner_for(inputs)
    report = model.report().to_dict()
    candidate.graph, candidate.build_ms = report["graph"], report["build_ms"]
    candidate.library = report["engines"][-1]["library"]
    if report["races"]:
        candidate.race = race = report["races"][-1]
        candidate.variant = next(entry["name"] for entry in race["entries"] if entry["outcome"] == "won")
        candidate.build_ms = race["race_ms"]
    else:
        candidate.backend = report["backend"]
    if others:
        inputs = min((inputs, *others), key=lambda each: quick_ms(lambda: model(each), each.device))
    candidate.call, candidate.layout = (lambda: model(inputs)), layout_of(inputs)
    if candidate.graph is True:
        candidate.replay = runner.replay


def layout_of(inputs: Tensor) -> str:
    """As rows name it."""
    return "contiguous" if inputs.is_contiguous() else "channels_last"


def check(candidates: Iterable[Candidate], references: dict[int, Any]) -> None:
    """Run each once: its error against the reference of its batch, and how long the call took.

    One that fails, or whose outputs are not finite, has that for its reason and is not measured.
    """
    for candidate in candidates:
        if candidate.call is None:
            continue
        try:
            started = time.perf_counter()
            output = candidate.call()
            candidate.first_ms = 1000 * (time.perf_counter() - started)
            candidate.relative_error = relative_error(output, references[candidate.batch])
        # What a rival raises is up to the rival; what torchaccel raises here belongs in its row as well.
        except Exception as error:  # noqa: BLE001
            candidate.reason = f"its first call failed: {named(error)}"
        else:
            if math.isfinite(candidate.relative_error):
                continue
            candidate.reason = "its outputs are not finite"
        candidate.call = candidate.replay = candidate.relative_error = output = None
        release(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def row(candidate: Candidate, timed: Comparison | None, **shared: Any) -> dict[str, Any]:
    """The row of a candidate in the result file; `timed` has it under its name, its replay under "<name> replay"."""
    found: dict[str, Any] = shared | {
        name: getattr(candidate, name)
        for name in (
            "route",
            "backend",
            "precision",
            "batch",
            "input_dtype",
            "layout",
            "graph",
            "variant",
            "reason",
            "notes",
            "race",
            "library",
        )
    }
    found |= dict.fromkeys((*TIMES, *FIGURES, "throughput_fps", "replay_median_ms", "gain", "batching"))
    found |= {"build_ms": candidate.build_ms, "relative_error": candidate.relative_error}
    if timed is None or candidate.call is None:
        return found
    timing = timed.timings[candidate.name]
    found |= timing.to_dict() | {"throughput_fps": 1000 * candidate.batch / timing.mean_ms}
    if candidate.replay is not None:
        found["replay_median_ms"] = timed.timings[f"{candidate.name} replay"].median_ms
    return found


def relate(candidates: list[Candidate], rows: list[dict[str, Any]], timed: Comparison) -> None:
    """Fill in the ratios of the rows, each with its interval: `gain`, `batching` and, for peers, `versus`.

    `gain` is the speed over FP32 at the same batch, `batching` the throughput over the same route's smallest batch,
    `versus` the speed of torchaccel over this peer's.
    """
    ran = [(candidate, line) for candidate, line in zip(candidates, rows, strict=True) if candidate.call is not None]
    for candidate, line in ran:
        same = [other for other, _ in ran if other.batch == candidate.batch]
        fp32 = [other for other in same if other.precision == "fp32" and other.route != "peer"]
        if fp32:
            over = {"over": f"{fp32[0].backend} fp32"}
            line["gain"] = over | timed.ratio(candidate.name, to=fp32[0].name).inverse().to_dict()
        kin = [
            other
            for other, _ in ran
            if (other.route, other.backend, other.precision)
            == (candidate.route, candidate.backend, candidate.precision)
        ]
        least = min(kin, key=lambda other: other.batch)
        if least is not candidate:
            ratio = timed.ratio(candidate.name, to=least.name).inverse().to_dict()
            times = candidate.batch / least.batch
            scaled = {key: value if value is None else times * value for key, value in ratio.items()}
            line["batching"] = {"over_batch": least.batch} | scaled
        own = [o for o in same if o.route == "torchaccel" and o.precision == candidate.precision]
        if candidate.route == "peer" and own:
            line["versus"] = {"of": own[0].backend} | timed.ratio(candidate.name, to=own[0].name).to_dict()
