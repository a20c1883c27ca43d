"""`fastest` beside the best rival, over models, precisions and batches: `python -m benchmarks.suite`.

Every cell (a model, a precision, a batch) is written to the result file, under benchmarks/results/<gpu>/, as soon as
it is measured; one that the file has, of the same code, GPU and versions, is not measured again. Without a GPU a small
part of it measures the CPU, and says so.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from benchmarks import peers, results_file
from benchmarks.arguments import choices, count, listed
from benchmarks.candidates import Candidate, named, row
from benchmarks.models import MODELS
from benchmarks.run import Plan, carry_out, settings_of
from benchmarks.suite_file import Cell, SuiteFile
from benchmarks.suite_table import conclusion, tables
from torchaccel.memory import release

PRECISIONS = ("fp16", "bf16")
BATCHES = (1, 8, 32, 128)
AUTOTUNED = (1, 32)  # the batches at which torch.compile's max-autotune runs unless told otherwise: it takes minutes
# Of a machine without a GPU. Many cores take seconds for one image of full size in BF16, and a race hundreds of calls.
SMALL_PART = {"model": ("resnet18",), "precision": ("bf16",), "batch": (1,)}
CPU_PIXELS = 32
WIDTH = 160  # of the table, in characters, where there is no terminal to ask


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the file lacks, print its table; returns 1 where the GPU was lost on the way."""
    started = time.monotonic()
    parser = _parser()
    given = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        file = SuiteFile(given.json or results_file.default_path("suite"))
    except ValueError as error:
        parser.error(str(error))
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    say = lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True)  # noqa: E731
    if device.type == "cpu":
        small = " ".join(str(value) for (value,) in SMALL_PART.values())
        say(f"No GPU was found: this measures the CPU, on images of {CPU_PIXELS} pixels, and by default only {small}.")
    if file.foreign:
        say(f"{file.path} is of other code, device or versions: {file.foreign}. The first cell moves it aside.")
    left = [cell for cell in _wanted(given, device) if given.again or cell not in file]
    alive = True
    while left and alive and not _spent(started, given.limit_s):
        cell = left.pop(0)
        say(f"{cell} ...")
        file.add(cell, *_measure(cell, device, given))
        alive = _freed(device)
    if file.rows:
        console.print(tables(file.rows))
        for line in conclusion(file.rows):
            say(line)
        say(f"Written: {file.path}")
    if not alive:
        say("The GPU is lost to this process since the last cell, whose row has the reason.")
    say(f"Cells left: {len(left)}." + (" Run the same command again to go on." if left else ""))
    return 0 if alive else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.suite", description=(__doc__ or "").partition("\n")[0])
    add, several = parser.add_argument, "; several: repeat it, or separate them by commas"
    add("--model", type=listed(choices(MODELS)), action="extend", help=", ".join(MODELS) + several)
    add("--precision", type=listed(choices(PRECISIONS)), action="extend", help=", ".join(PRECISIONS) + several)
    add("--batch", type=listed(count), action="extend", help=f"{', '.join(map(str, BATCHES))}, or any other{several}")
    add("--runs", type=count, default=100, help="timed calls per row (100)")
    add("--limit-s", type=_seconds, metavar="SECONDS", help="begin no cell later than this after the start")
    modes = f"torch.compile's modes at every batch; left out, max-autotune is for batches {AUTOTUNED[0]} and 32 alone"
    add("--compile-modes", nargs="+", choices=peers.COMPILE_MODES, help=modes)
    add("--again", action="store_true", help="measure the selected cells also where the file has them")
    add("--json", type=Path, metavar="PATH", help="where the result file is, or goes")
    return parser


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not seconds >= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds, 0 or more")
    return seconds


def _spent(started: float, limit_s: float | None) -> bool:
    return limit_s is not None and time.monotonic() - started >= limit_s


def _wanted(given: argparse.Namespace, device: torch.device) -> list[Cell]:
    """The cells selected, a model at a time: its weights are drawn once."""
    every: dict[str, Sequence[Any]] = {"model": tuple(MODELS), "precision": PRECISIONS, "batch": BATCHES}
    default = every if device.type == "cuda" else SMALL_PART
    models, batches, precisions = (
        tuple(dict.fromkeys(getattr(given, name) or default[name])) for name in ("model", "batch", "precision")
    )
    return [Cell(model, precision, batch) for model, batch, precision in product(models, batches, precisions)]


def _measure(
    cell: Cell, device: torch.device, given: argparse.Namespace
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of a cell, and what else is to be known of it; where it fails, one row has the reason."""
    started, model = time.monotonic(), MODELS[cell.model]
    plan = Plan(
        model=cell.model,
        shape=model.shape if device.type == "cuda" or model.vocabulary else (3, CPU_PIXELS, CPU_PIXELS),
        weights="random, seeded, statistics as of a trained model",
        device=device,
        precisions=(cell.precision,),
        batches=(cell.batch,),
        runs=given.runs,
        backend="fastest",
        peers=peers.names_for(device, tuple(peers.NAMES)),
        compile_modes=tuple(given.compile_modes or peers.COMPILE_MODES[: 1 + (cell.batch in AUTOTUNED)]),
        vocabulary=model.vocabulary,
        alike=True,
    )
    shared = {"convolutional": model.convolutional}
    try:
        done = carry_out(plan, _module(cell.model, device), Console(stderr=True))
    # Out of memory, a library that is missing, a bug of a rival or of ours: the run goes on, and the row says it.
    except Exception as error:  # noqa: BLE001
        failed = Candidate(
            "torchaccel", "fastest", cell.precision, cell.batch, reason=f"the cell failed: {named(error)}"
        )
        return [row(failed, None, model=cell.model, **shared)], {"wall_s": time.monotonic() - started}
    record = {"settings": settings_of(plan, done.timed), "gpu": done.gpu, "warnings": done.warnings}
    return [line | shared for line in done.rows], record | {"wall_s": time.monotonic() - started}


@lru_cache(maxsize=1)
def _module(name: str, device: torch.device) -> nn.Module:
    return MODELS[name].module().to(device)


def _freed(device: torch.device) -> bool:
    """Let go of what a cell left behind; says whether the device can go on."""
    torch.compiler.reset()
    try:
        release(device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError:  # an error that sticks: every later call in this process raises it again
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
