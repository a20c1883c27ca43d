"""A process that compiles ResNet-18 with a cache: `python -m benchmarks.first_result_process BACKEND FOLDER`."""

from __future__ import annotations

import importlib
import json
import sys
import time
from typing import Any

import torch

import torchaccel
from benchmarks.models import named_model
from torchaccel.compiler import BACKENDS
from torchaccel.fused import choice, cudnn_plans

MODEL = "resnet18"


def main(backend: str, folder: str) -> None:
    """Print how long the first result took from `compile` on, imports excluded, and what the report says."""
    started = time.perf_counter()
    for other in BACKENDS.values() if backend == "fastest" else [BACKENDS[backend]]:
        other.unavailable()  # it imports the libraries to find out
    importlib.import_module("torch.export._trace")  # which torch.export imports at its first use
    imports_s = time.perf_counter() - started
    searched = _count_plan_searches()
    model = named_model(MODEL)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module, precision = model.module().to(device), "fp16" if device.type == "cuda" else "fp32"
    x = torch.randn(1, *model.shape, device=device)
    _wait_for(device)
    with torch.inference_mode():
        started = time.perf_counter()
        budget: dict[str, Any] = (
            {"race_budget_s": 15.0} if backend == "fastest" else {}
        )  # without those that are slow to build
        compiled = torchaccel.compile(module, precision, backend=backend, cache_dir=folder, **budget)
        result = compiled(x)
        _wait_for(device)
        seconds = time.perf_counter() - started
    found = {"precision": precision, "seconds": seconds, "imports_s": imports_s, "sum": result.double().sum().item()}
    found |= {"timed": len(choice.times_ms()), "plan_searches": len(searched)}
    report = compiled.report().to_dict()
    found |= {name: report[name] for name in ("graph", "relative_error", "races")}
    print(json.dumps({**report["engines"][0], **found}))


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _count_plan_searches() -> list[object]:
    """A list that grows with every search among cuDNN's plans."""
    searched: list[object] = []
    plans: Any = cudnn_plans
    search = plans._search

    def counted(problem: Any, *others: Any) -> Any:
        searched.append(problem)
        return search(problem, *others)

    plans._search = counted
    return searched


if __name__ == "__main__":
    main(*sys.argv[1:])
