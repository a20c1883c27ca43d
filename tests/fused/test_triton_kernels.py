"""The Triton kernels, run by Triton's interpreter: on a machine without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from torchaccel.probes import import_problem

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def interpreted() -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-m", "tests.fused.interpreted"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.skipif(bool(import_problem("triton")), reason=str(import_problem("triton")))
@pytest.mark.parametrize("kernel", ["max_pool", "mean_pixels", "pad_channels", "depthwise", "linear", "stem"])
def test_a_kernel_computes_what_pytorch_does(kernel: str, interpreted: "subprocess.CompletedProcess[str]") -> None:
    assert f"right: {kernel}" in interpreted.stdout.splitlines(), interpreted.stderr
