"""How long ResNet-18's first result takes, in a first process and in later ones: `python -m benchmarks.first_result`.

For each backend the first process finds an empty cache, and the later ones what it has left there. Counted is from
`compile` to the first result at batch 1, in fp16 on a GPU and in fp32 on a CPU; imports are excluded. The result file
has a row for the first process, and one with the median of the later ones.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import results_file
from benchmarks.arguments import choices, count, listed
from benchmarks.first_result_process import MODEL
from benchmarks.results_file import FIGURES
from torchaccel.compiler import BACKENDS
from torchaccel.provenance import gpu_state

NAME = "first_result"
ROOT = Path(__file__).resolve().parents[1]
ON_A_GPU, ON_A_CPU = ("torch_tensorrt", "onnx_tensorrt", "fused", "inductor", "fastest"), ("inductor", "fastest")
TIMES = ("export_ms", "build_ms", "load_ms", "gate_ms", "first_call_ms")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; returns 1 where a process failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.first_result", description=(__doc__ or "").split("\n")[0]
    )
    add, several = parser.add_argument, "; several: repeat it, or separate them by commas"
    backends = (*BACKENDS, "fastest")
    add("--backend", type=listed(choices(backends)), action="extend", help=", ".join(backends) + several)
    add("--runs", type=count, default=3, help="later processes for each backend (3)")
    add("--json", type=Path, metavar="PATH", help="where the result file goes")
    given = parser.parse_args(arguments)
    path = given.json or results_file.default_path(NAME)
    try:
        results_file.require_writable(path)
    except ValueError as error:
        parser.error(str(error))
    on_gpu = torch.cuda.is_available()
    console, state = Console(), gpu_state if on_gpu else dict[str, Any]
    if not on_gpu:
        console.print("No GPU was found: this measures the CPU. Nothing here is a GPU figure.")
    before, rows = state(), []
    for backend in dict.fromkeys(given.backend or (ON_A_GPU if on_gpu else ON_A_CPU)):
        with tempfile.TemporaryDirectory() as folder:
            runs = [process(backend, folder) for _ in range(1 + given.runs)]
        rows += [row(backend, "first", runs[:1]), row(backend, "later", runs[1:])]
    settings = {"runs": given.runs, "clock": "time.perf_counter, from compile() to the first result, imports excluded"}
    content = results_file.document(
        NAME, rows, settings=settings, gpu={"before": before, "after": state()}, warnings=[]
    )
    console.print(table(rows))
    results_file.write(path, content)
    console.print(f"Written: {path}", highlight=False, markup=False, soft_wrap=True)
    return int(any(line["reason"] for line in rows))


def process(backend: str, folder: str) -> dict[str, Any]:
    """What a process reports that compiles with this cache folder; `reason` where it failed."""
    command = [sys.executable, "-m", "benchmarks.first_result_process", backend, folder]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"reason": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def row(backend: str, which: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The row of the first process of a backend, or of the later ones: `median_ms` is the time to the first result.

    >>> run = {"seconds": 0.8, "precision": "fp16", "graph": True, "relative_error": 1e-3, "backend": "onnx_tensorrt"}
    >>> run |= {"from_cache": True, "races": []} | dict.fromkeys(TIMES, 1.0)
    >>> line = row("onnx_tensorrt", "later", [run, run | {"seconds": 1.0}, run | {"seconds": 0.9}])
    >>> line["median_ms"], line["samples"], line["from_cache"]
    (900.0, 3, True)
    """
    line: dict[str, Any] = {"model": MODEL, "route": "torchaccel", "backend": backend, "process": which, "batch": 1}
    line |= {"precision": "", "input_dtype": "float32", "layout": "contiguous", "graph": "", "reason": None}
    line |= dict.fromkeys((*FIGURES, *TIMES, "race_ms", "served_by", "from_cache"))
    if reasons := [run["reason"] for run in runs if run.get("reason")]:
        return line | {"reason": reasons[0]}
    times_ms = [1000 * run["seconds"] for run in runs]
    last = runs[-1]
    line |= {"precision": last["precision"], "graph": last["graph"], "relative_error": last["relative_error"]}
    line |= {name: statistics.median(run[name] for run in runs) for name in TIMES}
    line |= {"median_ms": statistics.median(times_ms), "samples": len(runs), "cv": _variation(times_ms)}
    race = last["races"][-1] if last["races"] else None
    line |= {"served_by": last["backend"], "from_cache": (race or last)["from_cache"]}
    return line | {"race_ms": race and race["race_ms"]}


def _variation(times_ms: Sequence[float]) -> float:
    return statistics.stdev(times_ms) / statistics.mean(times_ms) if len(times_ms) > 1 else 0.0


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows, for a terminal."""
    found = Table(title=f"{MODEL}: from compile() to the first result", title_justify="left")
    for name in ("backend", "process", "first result, ms", "processes", "engine", "served by"):
        found.add_column(name, justify="right" if "ms" in name or name == "processes" else "left")
    for line in rows:
        if line["reason"]:
            found.add_row(line["backend"], line["process"], "-", "-", "-", line["reason"])
        else:
            engine = "from the cache" if line["from_cache"] else "built"
            shown = f"{line['median_ms']:.0f}", str(line["samples"]), engine, line["served_by"]
            found.add_row(line["backend"], line["process"], *shown)
    return found


if __name__ == "__main__":
    sys.exit(main())
