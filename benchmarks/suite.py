"""A backend of torchaccel beside the best rival, over models, precisions and batches: `python -m benchmarks.suite`.

Every cell (a model, a precision, a batch) is written to the result file, under benchmarks/results/<gpu>/, as soon as
it is measured; one that the file has, of the same code, GPU and versions, is not measured again. A cell that failed is
left, and the next run tries it once more. Cells of other code stay, each with its commit, until every cell is there,
and are then measured anew. Several processes, each on its own
GPU, may fill one file: `--gpus` starts them. Without a GPU a small part of it measures the CPU, and says so.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from benchmarks import peers, results_file
from benchmarks.candidates import Candidate, named, row
from benchmarks.models import named_model
from benchmarks.processes import on_each_gpu
from benchmarks.run import Plan, carry_out, settings_of
from benchmarks.suite_arguments import AUTOTUNED, SMALL_PART, complete, parser, wanted
from benchmarks.suite_file import Cell, SuiteFile, alone
from benchmarks.suite_table import tables
from torchaccel.memory import release

CPU_PIXELS = 32
LOST = 1  # the exit code of a process that has no GPU any more, or never had
WIDTH = 160  # of the table, in characters, where there is no terminal to ask


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the file lacks, print its table; returns 1 where a cell failed, or a GPU was lost or taken."""
    started = time.monotonic()
    command_line = parser((__doc__ or "").partition("\n")[0])
    given = command_line.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        complete(given, device)
        results_file.require_writable(given.json)
        file = SuiteFile(given.json, given.backend)
    except ValueError as error:
        command_line.error(str(error))
    if device.type == "cpu":
        small = " ".join(str(value) for (value,) in SMALL_PART.values())
        _say(f"No GPU was found: this measures the CPU, on images of {CPU_PIXELS} pixels, and by default only {small}.")
    if file.foreign:
        _say(f"{file.path} is of another backend, device or versions: {file.foreign}.")
        _say("The first cell moves it aside.")
    known = file.records if given.again else file.failed()
    work = (given, started, known)
    codes = on_each_gpu(given.gpus, _fill_and_exit, *work) if given.gpus > 1 else [_fill(*work)]
    for code in codes:
        if code not in (0, LOST):
            _say(f"A process ended with exit code {code}; what it was measuring is left.")
    file.reload()
    if file.rows:
        _console().print(tables(file.rows))
        for line in file.conclusion():
            _say(line)
        _say(f"Written: {file.path}")
    left = [cell for cell in wanted(given, device) if not file.has(cell, given.peers, but=known)]
    failed = [cell for cell in left if file.tried(cell)]
    said = f", of which failed: {'; '.join(map(str, failed))}" if failed else ""
    _say(f"Cells left: {len(left)}{said}." + (" Run the same command again to go on." if left else ""))
    return int(any(codes) or bool(failed))


def _fill_and_exit(given: argparse.Namespace, started: float, known: list[Any]) -> None:
    """In a process of its own: the exit code is the answer."""
    sys.exit(_fill(given, started, known))


def _fill(given: argparse.Namespace, started: float, known: list[Any]) -> int:
    """Measure the cells that no record but the `known` is of, each with no other process; `LOST` where the GPU is."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with ExitStack() as held:
        if device.type == "cuda":
            try:
                held.enter_context(alone(_gpu_lock(), deadline_s=0.0))
            except TimeoutError as error:
                _say(f"{error}: a suite runs on this GPU. Wait for it, or name another in CUDA_VISIBLE_DEVICES.")
                return LOST
        file = SuiteFile(given.json, given.backend)
        under = {
            "peers": given.peers,
            "processes": given.gpus,
            "gpu_uuid": _gpu_uuid() if device.type == "cuda" else None,
        }
        # What was never measured comes first, then what other code was measured of.
        done: set[Cell] = set()
        for of_this_code, cell in product((False, True), wanted(given, device)):
            with file.claim(cell) as free:
                if not free or cell in done or file.tried(cell, known):
                    continue
                if file.has(cell, given.peers, known, of_this_code):
                    continue
                if _spent(started, given.limit_s):
                    return 0
                _say(f"{cell} ...")
                rows, record = _measure(cell, device, given)
                file.add(cell, rows, record | under)
                done.add(cell)
                _say(f"{cell}: {record['wall_s']:.0f} s{_spent_on(rows)}")
            if not _freed(device):
                _say(f"The GPU is lost to this process since {cell}, whose row has the reason.")
                return LOST
    return 0


def _spent_on(rows: list[dict[str, Any]]) -> str:
    """What of a cell's time went into building whom."""
    built = [f"{row['backend']} {row['build_ms'] / 1000:.0f}" for row in rows if row.get("build_ms")]
    return f"; building {', '.join(built)}" if built else ""


def _gpu_lock() -> Path:
    """The file that whoever measures on this GPU holds."""
    return Path(tempfile.gettempdir(), f"torchaccel-suite-{os.getuid()}-{_gpu_uuid()}.lock")


def _gpu_uuid() -> str:
    return str(torch.cuda.get_device_properties(0).uuid)


def _console() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=WIDTH)


def _say(line: str) -> None:
    _console().print(line, highlight=False, markup=False, soft_wrap=True)
    sys.stdout.flush()


def _spent(started: float, limit_s: float | None) -> bool:
    return limit_s is not None and time.monotonic() - started >= limit_s


def _measure(
    cell: Cell, device: torch.device, given: argparse.Namespace
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of a cell, and what else is to be known of it; where it fails, one row has the reason."""
    started, model = time.monotonic(), named_model(cell.model)
    plan = Plan(
        model=cell.model,
        shape=model.shape if device.type == "cuda" or model.vocabulary else (3, CPU_PIXELS, CPU_PIXELS),
        weights="random, seeded, statistics as of a trained model",
        device=device,
        precisions=(cell.precision,),
        batches=(cell.batch,),
        runs=given.runs,
        backend=given.backend,
        race_budget_s=given.race_budget_s,
        peers=given.peers,
        compile_modes=tuple(given.compile_modes or peers.COMPILE_MODES[: 1 + (cell.batch in AUTOTUNED)]),
        vocabulary=model.vocabulary,
        alike=True,
    )
    try:
        done = carry_out(plan, _module(cell.model, device), Console(stderr=True))
    # Out of memory, a library that is missing, a bug of a rival or of ours: the run goes on, and the row says it.
    except Exception as error:  # noqa: BLE001
        failed = Candidate(
            "torchaccel", given.backend, cell.precision, cell.batch, reason=f"the cell failed: {named(error)}"
        )
        return [row(failed, None, model=cell.model)], {"failed": True, "wall_s": time.monotonic() - started}
    record = {"settings": settings_of(plan, done.timed), "gpu": done.gpu, "warnings": done.warnings}
    return done.rows, record | {"wall_s": time.monotonic() - started}


@lru_cache(maxsize=1)
def _module(name: str, device: torch.device) -> nn.Module:
    return named_model(name).module().to(device)


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
