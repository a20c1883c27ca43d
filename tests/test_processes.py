"""Compiled modules in several processes: pickled, sent, forked, trained together, built at the same time."""

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import torchaccel
from tests.helpers import on_cpu, relative_error
from tests.processes import (
    Embedded,
    add_one,
    compile_and_check,
    example,
    run_apart,
    serve,
    small_net,
    train_distributed,
)
from torchaccel.compiled import CompiledModule
from torchaccel.compiler import BACKENDS

ROOT = Path(torchaccel.__file__).parents[1]
LOAD = """
import pickle, sys, torch
folder = sys.argv[1]
loaded = torch.load(folder + "/saved.pt", weights_only=False)
with open(folder + "/pickled", "rb") as file:
    models = [loaded, pickle.load(file)]
x, expected = torch.load(folder + "/example.pt")
for model in models:
    assert type(model).__mro__[1].__name__ == "CompiledModule", type(model)
    assert model.training and not model[1].training and model[4].training
    assert not model[4].weight.requires_grad and model[0].weight.requires_grad
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    report = model.report()
    assert (report.builds, report.calls_by_module) == (1, 0), report
    assert (report.precision, report.backend_asked) == ("fp16", "eager"), report
    assert model._state.options.keep_fp32 == ("4",)
print("both are right")
"""


@torch.no_grad()
def test_a_fresh_process_loads_the_module_with_its_options_modes_and_hooks(tmp_path: Path) -> None:
    model: Any = on_cpu(small_net(), "fp16", keep_fp32=["4"])
    model.register_forward_hook(add_one)
    model[4].requires_grad_(False)
    torch.save((example(), model(example())), tmp_path / "example.pt")
    model.train()
    model[1].eval()
    torch.save(model, tmp_path / "saved.pt")
    (tmp_path / "pickled").write_bytes(pickle.dumps(model))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", LOAD, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "both are right\n"


@torch.no_grad()
def test_a_model_that_is_sent_to_a_process_runs_an_engine_there() -> None:
    model = on_cpu(small_net(), "fp16", max_runners=3)
    model.register_forward_hook(add_one)
    run_apart(serve, 1, model, model(example()))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_a_data_loader_run_a_model_that_the_data_set_holds(method: str) -> None:
    model = on_cpu(small_net())
    expected = [model(example() * (index + 1)) for index in range(6)]  # a forked worker has this engine already
    loader = DataLoader(Embedded(model), batch_size=2, num_workers=2, multiprocessing_context=method)
    for _ in range(2 if method == "fork" else 1):
        results = torch.cat(list(loader))
        assert all(relative_error(y, r) < 2e-6 for y, r in zip(results, expected, strict=True))
    assert model.report().calls_by_engine == 6
    assert isinstance(model, CompiledModule)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_two_processes_that_compile_the_same_model_at_once_are_both_right(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason := BACKENDS[backend].unavailable():
        pytest.skip(reason)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))  # empty: both have everything to build
    (tmp_path / "barrier").mkdir()
    run_apart(compile_and_check, 2, backend, tmp_path / "barrier")


def test_distributed_training_of_a_compiled_module_is_that_of_the_module(tmp_path: Path) -> None:
    if not torch.distributed.is_available():
        pytest.skip("this PyTorch has no torch.distributed")
    run_apart(train_distributed, 2, tmp_path / "rendezvous")
