"""ResNet-18 by precision and batch: `python -m benchmarks.resnet18`.

Measures a compiled torchvision ResNet-18, call by call and interleaved, prints a table and a conclusion computed from
it, and writes a result file with full provenance under benchmarks/results/<gpu>/. Without a GPU it measures the CPU,
with as many samples as two minutes allow, and says so.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from benchmarks import peers, results_file
from benchmarks.arguments import choices, count, listed
from benchmarks.run import SEED, Plan, run
from benchmarks.table import tables
from torchaccel.compiler import BACKENDS

MODEL, SHAPE = "resnet18", (3, 224, 224)
PRECISIONS = ("fp32", "tf32", "fp16", "bf16")
WEIGHTS = "none (random, seeded), default (torchvision's) and the path of a state_dict"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; returns 1 where no engine of torchaccel could be measured."""
    parser = _parser()
    given = parser.parse_args(arguments)
    path = given.json or results_file.default_path(MODEL)
    try:
        results_file.require_writable(path)  # now, rather than after minutes of measuring
        plan, module = _plan(given), _module(given.weights)
    except ValueError as error:
        parser.error(str(error))
    console = Console()
    content = run(plan, module.to(plan.device).eval(), Console(stderr=True))
    console.print(tables(content["rows"], content["warnings"]))
    for line in content["conclusion"]:
        console.print(line, highlight=False, markup=False)
    results_file.write(path, content)
    console.print(f"Written: {path}", highlight=False, markup=False, soft_wrap=True)
    ran = any(row["route"] == "torchaccel" and not row["reason"] for row in content["rows"])
    return 0 if ran else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.resnet18", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--backend", choices=("auto", *BACKENDS), default="auto")
    add, several = parser.add_argument, "; several: repeat it, or separate them by commas"
    add("--precision", type=listed(choices(PRECISIONS)), action="extend", help=", ".join(PRECISIONS) + several)
    add("--batch", type=listed(count), action="extend", help="images per call" + several)
    add("--runs", type=count, default=100, help="timed calls per row (100)")
    add("--weights", default="none", help=WEIGHTS)
    add("--dynamic-batch", action="store_true", help="one engine for all batches, instead of one for each")
    add("--json", type=Path, metavar="PATH", help="where the result file goes")
    add("--peers", nargs="*", choices=peers.USUAL, help="measure the rivals beside it: all, or these")
    modes = f"torch.compile's modes among the peers ({' '.join(peers.COMPILE_MODES)})"
    add("--compile-modes", nargs="+", choices=peers.COMPILE_MODES, default=peers.COMPILE_MODES, help=modes)
    return parser


def _plan(given: argparse.Namespace) -> Plan:
    """Fill in this machine's defaults; raises ValueError for what it cannot do."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    default = ("fp32", "tf32", "fp16") if device.type == "cuda" else ("fp32", "bf16")
    batches = tuple(dict.fromkeys(given.batch or (1, 32)))
    if given.dynamic_batch and max(batches) < 2:
        raise ValueError("--dynamic-batch needs a batch of at least 2 among --batch")
    possible = peers.names_for(device)
    rivals = () if given.peers is None else tuple(dict.fromkeys(given.peers or possible))
    if missing := set(rivals) - set(possible):
        raise ValueError(f"--peers {' '.join(sorted(missing))} needs a GPU; here there are {', '.join(possible)}")
    return Plan(
        model=MODEL,
        shape=SHAPE,
        weights=given.weights if given.weights in ("none", "default") else Path(given.weights).name,
        device=device,
        precisions=tuple(dict.fromkeys(given.precision or default)),
        batches=batches,
        runs=given.runs,
        backend=given.backend,
        peers=rivals,
        compile_modes=tuple(given.compile_modes),
        dynamic_batch=(min(batches), max(batches), max(batches)) if given.dynamic_batch else None,
    )


def _module(weights: str) -> nn.Module:
    """Torchvision's ResNet-18 with the weights asked for; raises ValueError where they cannot be had."""
    from torchvision.models import ResNet18_Weights, resnet18

    torch.manual_seed(SEED)
    if weights == "none":
        return resnet18()
    if weights == "default":
        try:
            return resnet18(weights=ResNet18_Weights.DEFAULT)
        # urllib's errors are OSErrors; a RuntimeError says that what came has not the SHA-256 of its name.
        except (OSError, HTTPException, RuntimeError) as error:
            raise ValueError(f"--weights default could not download them ({error}); use --weights none") from error
    if not Path(weights).is_file():
        raise ValueError(f"--weights {weights!r}: there is no such file; allowed are {WEIGHTS}")
    module = resnet18()
    try:
        module.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    # What the unpickler raises depends on the bytes that it meets: whatever it is, they are not these weights.
    except Exception as error:
        raise ValueError(f"--weights {weights!r} is no state_dict of torchvision's ResNet-18: {error}") from error
    return module


if __name__ == "__main__":
    sys.exit(main())
