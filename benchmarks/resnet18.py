"""ResNet-18 by precision and batch: `python -m benchmarks.resnet18`.

Measures a compiled torchvision ResNet-18, call by call and interleaved, prints a table and a conclusion computed from
it, and writes a result file with full provenance under benchmarks/results/<gpu>/. Without a GPU it measures the CPU,
with fewer samples, and says so.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

import torchaccel
from benchmarks import peers, results_file
from benchmarks.candidates import Candidate, baseline, check, noting, ours, refusal, relate, row, strict
from benchmarks.table import conclusion, tables
from torchaccel.environment import environment, gpu_state
from torchaccel.options import BACKENDS
from torchaccel.timing import Comparison, compare, measure

SEED, SHAPE = 0, (3, 224, 224)
PRECISIONS = ("fp32", "tf32", "fp16", "bf16")
CPU_BUDGET_S = 40.0  # for all the samples together, so that a slow machine is done within two minutes


@dataclass
class Plan:
    """What was asked for, with the defaults of this machine filled in."""

    device: torch.device
    precisions: tuple[str, ...]
    batches: tuple[int, ...]
    runs: int
    backend: str
    peers: tuple[str, ...]
    dynamic_batch: tuple[int, int, int] | None
    weights: str


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write; 1 where nothing could be measured."""
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        plan, module = _plan(given), _module(given.weights)
    except ValueError as error:
        parser.error(str(error))
    console = Console()
    console.print(_what_runs(plan))
    content = run(plan, module.to(plan.device), Console(stderr=True))
    rows, notes = content["rows"], content["warnings"]
    console.print(tables(rows, notes))
    for line in content["conclusion"]:
        console.print(line, highlight=False)
    path = given.json or results_file.default_path("resnet18")
    results_file.write(path, content)
    console.print(f"Written: {path}", highlight=False, soft_wrap=True)
    return 0 if any(line["median_ms"] is not None for line in rows) else 1
