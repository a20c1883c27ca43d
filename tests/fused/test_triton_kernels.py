"""The Triton kernels, run by Triton's interpreter: on a machine without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from torchaccel.environment import import_problem

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(bool(import_problem("triton")), reason=str(import_problem("triton")))
@pytest.mark.parametrize("kernel", ["max_pool", "mean_pixels", "pad_channels", "depthwise"])
def test_a_kernel_computes_what_pytorch_does(kernel: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-m", "tests.fused.interpreted", kernel]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
