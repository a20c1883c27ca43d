"""One process that compiles ResNet-18 with a cache folder: `python -m tests.gpu.cached_process BACKEND FOLDER`."""

import importlib
import json
import sys
import time
from typing import Any

import torch

import torchaccel
from tests.models import ZOO
from torchaccel.compiler import BACKENDS
from torchaccel.fused import choice, cudnn_plans


def main(backend: str, folder: str) -> None:
    """Print how long the first result took from `compile` on, imports excluded, and what the report says."""
    started = time.perf_counter()
    for other in BACKENDS.values() if backend == "fastest" else [BACKENDS[backend]]:
        other.unavailable()  # it imports the libraries to find out
    importlib.import_module("torch.export._trace")  # which torch.export imports at its first use
    imports_s = time.perf_counter() - started
    searched = _count_plan_searches()
    torch.manual_seed(0)
    module = ZOO["resnet18"].module().cuda()
    x = torch.randn(1, 3, 224, 224, device="cuda")
    torch.cuda.synchronize()
    with torch.inference_mode():
        started = time.perf_counter()
        budget = {"race_budget_s": 15.0} if backend == "fastest" else {}  # without those that are slow to build
        model = torchaccel.compile(module, "fp16", backend=backend, cache_dir=folder, **budget)
        result = model(x)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    found = {"seconds": seconds, "imports_s": imports_s, "sum": result.double().sum().item()}
    found |= {"timed": len(choice.times_ms()), "plan_searches": len(searched)}
    report = model.report().to_dict()
    print(json.dumps({**found, **report["engines"][0], "races": report["races"]}))


def _count_plan_searches() -> list[object]:
    """A list that grows with every search among cuDNN's plans."""
    searched: list[object] = []
    search = cudnn_plans._search

    def counted(problem: Any, *others: Any) -> Any:
        searched.append(problem)
        return search(problem, *others)

    cudnn_plans._search = counted
    return searched


if __name__ == "__main__":
    main(*sys.argv[1:])
