"""Importing torchaccel imports no TensorRT, never initialises CUDA, and is quick."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torchaccel
from torchaccel import errors

ROOT = Path(torchaccel.__file__).parents[1]
SCRIPT = """
import json, sys, time, torch
from pathlib import Path
def waited():  # seconds, for a core that others use; the second figure is nanoseconds
    return int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9
before, started = waited(), time.perf_counter()
import torchaccel
from torchaccel import errors
seconds = time.perf_counter() - started - (waited() - before)
print(json.dumps({
    "seconds": seconds,
    "modules": sorted(sys.modules),
    "cuda": torch.cuda.is_initialized(),
    "file": torchaccel.__file__,
}))
"""


@cache
def imported() -> dict[str, Any]:
    """What a fresh process says of importing torchaccel; its time is the best of several."""
    runs = []
    for _ in range(4):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        runs.append(json.loads(done.stdout))
    return min(runs, key=lambda run: run["seconds"])


def test_it_is_this_torchaccel() -> None:
    assert Path(imported()["file"]).samefile(torchaccel.__file__)


def test_no_tensorrt_and_nothing_else_that_is_heavy_is_imported() -> None:
    heavy = {"tensorrt", "tensorrt_rtx", "torch_tensorrt", "onnx", "onnxscript", "onnxruntime", "torchvision",
             "transformers", "modelopt", "triton", "pytest"}  # fmt: skip
    assert not heavy & set(imported()["modules"])


def test_cuda_is_not_initialised() -> None:
    assert imported()["cuda"] is False


def test_it_adds_less_than_three_tenths_of_a_second_to_importing_torch() -> None:
    assert imported()["seconds"] < 0.3


def test_what_the_package_shows_is_there() -> None:
    assert sorted(torchaccel.__all__) == sorted(set(torchaccel.__all__))
    for name in torchaccel.__all__:
        assert getattr(torchaccel, name).__doc__ or name == "PRECISIONS", name


def test_every_error_and_warning_can_be_caught_by_its_name_in_the_package() -> None:
    kinds = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}
    assert kinds <= set(torchaccel.__all__)
