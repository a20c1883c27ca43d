"""The ten lines, run as a user would, on weights that are in PyTorch's cache already."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchvision.models import ResNet18_Weights, resnet18

pytest.importorskip("skimage", reason="the picture comes with scikit-image")

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = ResNet18_Weights.DEFAULT


def test_it_prints_the_three_likeliest_classes(tmp_path):
    cache = tmp_path / "hub" / "checkpoints" / Path(WEIGHTS.url).name
    cache.parent.mkdir(parents=True)
    torch.manual_seed(0)
    module = resnet18()
    with torch.no_grad():
        module.fc.bias[WEIGHTS.meta["categories"].index("tabby")] = 50
    torch.save(module.state_dict(), cache)
    # Without a GPU, and without a C++ compiler for Inductor, PyTorch's own kernels serve.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TORCH_HOME": str(tmp_path), "CXX": "no-such-compiler"}
    command = (sys.executable, ROOT / "recipes" / "quickstart.py")
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "100.0%  tabby"
    assert len(lines) == 3
    assert all(re.fullmatch(r" *\d+\.\d%  .+", line) for line in lines)
