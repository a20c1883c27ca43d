"""The course of a benchmark: build every candidate, check it, time all of them interleaved, gather the results."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import torchaccel
from benchmarks import peers
from benchmarks.candidates import Candidate, baseline, check, noting, ours, refusal, relate, row, strict
from benchmarks.peers import COMPILE_MODES
from benchmarks.results_file import document
from benchmarks.table import conclusion, label, number
from torchaccel.figures import Comparison
from torchaccel.precision import PRECISIONS
from torchaccel.provenance import gpu_state
from torchaccel.timing import compare, measure

SEED = 0
CPU_TOTAL_S, CPU_SAMPLING_S = 75.0, 15.0  # so that two slow cores are done within two minutes


@dataclass(frozen=True)
class Plan:
    """What to measure, and where; `runs` is the number of timed calls per row, fewer on a CPU that is too slow.

    The inputs are at random: normal, or token ids below `vocabulary`. With `alike`, torchaccel too is given module and
    inputs in the precision's dtype, in the layout that it is fastest in, as the peers are; else FP32 ones.
    """

    model: str
    shape: tuple[int, ...]
    weights: str
    device: torch.device
    precisions: tuple[str, ...]
    batches: tuple[int, ...]
    runs: int
    backend: str = "auto"
    peers: tuple[str, ...] = ()
    compile_modes: tuple[str, ...] = COMPILE_MODES
    dynamic_batch: tuple[int, int, int] | None = None
    vocabulary: int | None = None
    alike: bool = False
    race_budget_s: float | None = None


@dataclass(frozen=True)
class Measured:
    """What a plan gave: the rows, the timings behind them, the GPU's state before and after, what was warned of."""

    rows: list[dict[str, Any]]
    timed: Comparison | None
    gpu: dict[str, Any]
    warnings: list[str]


def run(plan: Plan, module: nn.Module, progress_on: Console) -> dict[str, Any]:
    """Measure `module`, which is on the plan's device and in eval mode; returns the content of the result file."""
    done = carry_out(plan, module, progress_on)
    settings = settings_of(plan, done.timed)
    content = document(plan.model, done.rows, settings=settings, gpu=done.gpu, warnings=done.warnings)
    return content | {"conclusion": [*_measured(plan, content), *conclusion(done.rows)]}


def carry_out(plan: Plan, module: nn.Module, progress_on: Console) -> Measured:
    """Build every candidate of a plan, check it, time all of them interleaved."""
    notes: list[str] = []
    started = time.monotonic()
    inputs = dict(_inputs(plan))
    with torch.no_grad(), ExitStack() as stay, _progress(progress_on) as progress:
        steps = len(plan.precisions) * len(plan.batches) * (1 + len(plan.peers))
        task = progress.add_task("", total=steps + 1)
        references = {batch: tree_map(torch.clone, strict(module, inputs[batch])()) for batch in plan.batches}
        candidates = []
        for label, built in _built(plan, module, inputs, stay):
            progress.update(task, description=label)
            candidates += built()
            progress.advance(task)
        check(candidates, references)
        progress.update(task, description="measuring")
        before = gpu_state() if plan.device.type == "cuda" else {}
        with noting(notes):
            timed = _timed(plan, candidates, max(CPU_SAMPLING_S, CPU_TOTAL_S - (time.monotonic() - started)))
        after = gpu_state() if plan.device.type == "cuda" else {}
        copies = {batch: _copies(inputs[batch], references[batch], plan.runs) for batch in plan.batches}
        progress.update(task, advance=1, description="done")
    rows = [_row(plan, candidate, timed, copies[candidate.batch]) for candidate in candidates]
    if timed is not None:
        relate(candidates, rows, timed)
    return Measured(rows, timed, {"before": before, "after": after}, notes)


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


def _inputs(plan: Plan) -> Iterator[tuple[int, Tensor]]:
    generator = torch.Generator().manual_seed(SEED)
    for batch in plan.batches:
        shape = (batch, *plan.shape)
        if plan.vocabulary is None:
            yield batch, torch.randn(shape, generator=generator).to(plan.device)
        else:
            yield batch, torch.randint(plan.vocabulary, shape, generator=generator).to(plan.device)


def _built(plan: Plan, module: nn.Module, inputs: dict[int, Tensor], stay: ExitStack) -> Iterator[tuple[str, Any]]:
    """The steps of building, each with its label; torchaccel's own first, so that no peer's state reaches them."""
    for precision in plan.precisions:
        compiled = cache(lambda precision=precision: _compile(plan, module, precision))
        for batch in plan.batches:
            label = f"building {precision}, batch {batch}"
            yield label, lambda p=precision, c=compiled, x=inputs[batch]: _own(plan, module, p, c, x)
    for peer in plan.peers:
        make = partial(peers.build, peer, module, stay=stay, modes=plan.compile_modes)
        for precision in plan.precisions:
            for batch in plan.batches:
                label = f"building {peers.NAMES[peer]}, {precision}, batch {batch}"
                yield label, lambda make=make, p=precision, x=inputs[batch]: [make(p, x)]


def _compile(plan: Plan, module: nn.Module, precision: str) -> nn.Module:
    batches = plan.dynamic_batch
    if plan.alike:
        module = copy.deepcopy(module).to(PRECISIONS[precision].dtype)
    options: dict[str, Any] = {"dynamic_batch": batches, "race_budget_s": plan.race_budget_s}
    return torchaccel.compile(module, precision, backend=plan.backend, cache_dir=False, **options)


def _own(plan: Plan, module: nn.Module, precision: str, compiled: Any, inputs: Tensor) -> list[Candidate]:
    """The row of torchaccel and, for want of an FP32 engine, the baseline that stands in for it."""
    if refused := refusal(plan.backend, precision, plan.device):
        found = Candidate("torchaccel", refused[0], precision, len(inputs), reason=refused[1])
    else:
        found = ours(compiled, plan.backend, precision, *_layouts(plan, precision, inputs))
    if precision != "fp32" or found.call is not None:
        return [found]
    return [found, baseline(module, inputs)]


def _layouts(plan: Plan, precision: str, inputs: Tensor) -> tuple[Tensor, ...]:
    if not plan.alike:
        return (inputs,)
    layouts = (torch.contiguous_format, torch.channels_last) if inputs.dim() == 4 else (torch.contiguous_format,)
    return tuple(peers.cast(inputs, precision, layout) for layout in layouts)


def _timed(plan: Plan, candidates: list[Candidate], budget_s: float) -> Comparison | None:
    ready = [candidate for candidate in candidates if candidate.call is not None]
    if not ready:
        return None
    calls: dict[str, Any] = {candidate.name: candidate.call for candidate in ready}
    calls |= {f"{candidate.name} replay": candidate.replay for candidate in ready if candidate.replay is not None}
    if plan.device.type == "cuda":
        return compare(calls, samples=plan.runs, device=plan.device)
    first_ms = {candidate.name: candidate.first_ms for candidate in ready}
    samples = affordable(first_ms, plan.runs, 1000 * budget_s)
    return compare(calls, samples=samples, device=plan.device, warmup=0)  # building and checking have called it


def affordable(first_ms: dict[str, float], runs: int, budget_ms: float) -> dict[str, int]:
    """How many calls of each fit the budget: up to `runs` and at least 1; what the quick ones leave, the slow get.

    >>> affordable({"slow": 100.0, "quick": 1.0}, 100, 1000.0)
    {'quick': 100, 'slow': 9}
    """
    samples: dict[str, int] = {}
    for name, cost_ms in sorted(first_ms.items(), key=lambda item: item[1]):
        share = budget_ms / (len(first_ms) - len(samples))
        samples[name] = max(1, min(runs, int(share / cost_ms)))
        budget_ms = max(0.0, budget_ms - samples[name] * cost_ms)
    return samples


def _copies(inputs: Tensor, output: Any, runs: int) -> dict[str, float | None]:
    """What it takes to copy a batch from pinned memory to the GPU, and its output, where it is one tensor, back."""
    found: dict[str, float | None] = {"h2d_ms": None, "d2h_ms": None}
    if not inputs.is_cuda:
        return found
    ends = {"h2d_ms": (inputs.clone(), inputs.cpu().pin_memory())}
    if isinstance(output, Tensor):
        ends["d2h_ms"] = (output.cpu().pin_memory(), output.clone())
    with noting([]):  # a copy of a few KiB is all launch, and that is what it takes
        for name, (target, source) in ends.items():
            found[name] = measure(target.copy_, source, True, samples=runs, device=inputs.device).median_ms
    return found


def _row(plan: Plan, candidate: Candidate, timed: Comparison | None, copies: dict[str, float | None]) -> dict[str, Any]:
    shared = {"model": plan.model, "input_shape": [candidate.batch, *plan.shape], "dynamic_batch": plan.dynamic_batch}
    return row(candidate, timed, **shared) | copies


def settings_of(plan: Plan, timed: Comparison | None) -> dict[str, Any]:
    """How it was measured, for the result file."""
    gpu = plan.device.type == "cuda"
    return asdict(plan) | {
        "device": str(plan.device),
        "seed": SEED,
        "cpu_threads": torch.get_num_threads(),
        "rounds": max(map(len, timed.round_ms.values())) if timed else None,
        "warmup": "until steady" if gpu else "the calls that built and checked it",
        "clock": "CUDA events, one pair per call" if gpu else "time.perf_counter_ns around each call",
        "reference": "the module in FP32 with TF32 off",
    }


def _measured(plan: Plan, content: dict[str, Any]) -> Iterator[str]:
    """What was measured, and on what: the first lines of the conclusion."""
    rows = [line for line in content["rows"] if line["median_ms"] is not None]
    environment = content["environment"]
    if plan.device.type == "cpu":
        through = ", ".join(dict.fromkeys(line["backend"] for line in rows)) or "nothing"
        yield f"No GPU was found: this measured the CPU ({environment['cpu']}) through {through}."
        yield "Nothing here is a GPU figure."
    else:
        yield f"Measured on {torch.cuda.get_device_name(plan.device)}, weights: {plan.weights}, seed {SEED}."
    counts = {line["samples"] for line in rows}
    if len(counts) == 1:
        yield f"Timed calls per row: {counts.pop()}."
    elif counts:
        each = ", ".join(f"{label(line)} {line['samples']}" for line in rows)
        yield f"Timed calls, of {plan.runs} as far as the time allows: {each}."
    for line in rows:
        if line["replay_median_ms"] is not None:
            replay, call = number(line["replay_median_ms"]), number(line["median_ms"])
            yield f"{label(line)}: replaying its graph alone takes {replay} ms, a whole call {call} ms."
