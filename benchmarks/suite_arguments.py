"""What the suite is asked for: its command line, this machine's defaults, and the cells that follow from both."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks import models, peers, results_file
from benchmarks.arguments import choices, count, listed
from benchmarks.models import BATCHES, PRECISIONS
from benchmarks.suite_file import Cell
from torchaccel.compiler import BACKENDS

AUTOTUNED = (1, 32)  # the batches at which torch.compile's max-autotune runs unless told otherwise: it takes minutes
# Of a machine without a GPU. Many cores take seconds for one image of full size in BF16, and a race hundreds of calls.
SMALL_PART = {"model": ("resnet18",), "precision": ("bf16",), "batch": (1,)}


def parser(about: str) -> argparse.ArgumentParser:
    """The command line; what this machine decides is left for `complete`."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.suite", description=about)
    add, several = made.add_argument, "; several: repeat it, or separate them by commas"
    named = f"{', '.join(models.MODELS)}; where named, {', '.join(models.TWINS)}{several}"
    add("--model", type=listed(choices({**models.MODELS, **models.TWINS})), action="extend", help=named)
    add("--precision", type=listed(choices(PRECISIONS)), action="extend", help=", ".join(PRECISIONS) + several)
    add("--batch", type=listed(count), action="extend", help=f"{', '.join(map(str, BATCHES))}, or any other{several}")
    add("--runs", type=count, default=100, help="timed calls per row (100)")
    add("--limit-s", type=_seconds, metavar="SECONDS", help="begin no cell later than this after the start")
    modes = f"torch.compile's modes at every batch; left out, max-autotune is for batches {AUTOTUNED[0]} and 32 alone"
    add("--compile-modes", nargs="+", choices=peers.COMPILE_MODES, help=modes)
    add("--again", action="store_true", help="measure the selected cells also where the file has them")
    add("--backend", choices=("fastest", *BACKENDS), default="fastest", help="torchaccel's, to measure (fastest)")
    add("--peers", nargs="+", choices=peers.NAMES, metavar="PEER", help=f"the rivals: {', '.join(peers.NAMES)} (all)")
    add("--race-budget-s", type=_some_seconds, metavar="SECONDS", help="of each race; its record has what it left out")
    add("--gpus", type=count, default=1, help="a process on each of so many GPUs, all adding to one file (1)")
    add("--json", type=Path, metavar="PATH", help="where the result file is, or goes")
    return made


def complete(given: argparse.Namespace, device: torch.device) -> None:
    """Fill in this machine's defaults; raises ValueError for what it cannot do."""
    possible = peers.names_for(device, tuple(peers.NAMES))
    given.peers = tuple(dict.fromkeys(given.peers or possible))
    if missing := set(given.peers) - set(possible):
        raise ValueError(f"--peers {' '.join(sorted(missing))} needs a GPU; here there are {', '.join(possible)}")
    if given.gpus > max(1, torch.cuda.device_count()):
        raise ValueError(f"--gpus {given.gpus}: this process may use {torch.cuda.device_count()}")
    if given.gpus > 1 and len(kinds := {torch.cuda.get_device_name(index) for index in range(given.gpus)}) > 1:
        raise ValueError(
            f"--gpus {given.gpus}: one file is of one kind of GPU, and these are {', '.join(sorted(kinds))}"
        )
    if given.race_budget_s is not None and given.backend != "fastest":
        raise ValueError(f"--race-budget-s: --backend {given.backend} is no race; leave it out, or take fastest")
    name = "suite" if given.backend == "fastest" else f"suite-{given.backend}"
    given.json = given.json or results_file.default_path(name)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not seconds >= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds, 0 or more")
    return seconds


def _some_seconds(text: str) -> float:
    seconds = _seconds(text)
    if math.isinf(seconds):
        raise argparse.ArgumentTypeError(f"{text!r}: name a number of seconds, such as 600, or leave it out")
    if seconds == 0:
        raise argparse.ArgumentTypeError("a race of 0 seconds builds its first candidate alone: name that as --backend")
    return seconds


def wanted(given: argparse.Namespace, device: torch.device) -> list[Cell]:
    """The cells selected, a model at a time: its weights are drawn once."""
    every: dict[str, Sequence[Any]] = {"model": tuple(models.MODELS), "precision": PRECISIONS, "batch": BATCHES}
    default = every if device.type == "cuda" else SMALL_PART
    names, batches, precisions = (
        tuple(dict.fromkeys(getattr(given, name) or default[name])) for name in ("model", "batch", "precision")
    )
    return [Cell(model, precision, batch) for model, batch, precision in product(names, batches, precisions)]
