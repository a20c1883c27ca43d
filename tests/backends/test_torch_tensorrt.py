"""Torch-TensorRT's route without a GPU: real engines by its converters and TensorRT-RTX's builder, none loaded."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from torchaccel.probes import tensorrt_of_torch_tensorrt

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu loads and runs what it builds"),
    pytest.mark.skipif(
        tensorrt_of_torch_tensorrt() != "tensorrt_rtx", reason="TensorRT-RTX alone builds without a GPU: extra 'rtx'"
    ),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process made: it tells Torch-TensorRT that there is a GPU, which nothing else here is to believe."""
    folder = str(tmp_path_factory.mktemp("temporary"))  # of Torch-TensorRT's own caches
    command = [sys.executable, "-m", "tests.backends.torch_tensorrt_process"]
    environment = {**os.environ, "TMPDIR": folder}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("batch", ["static", "dynamic"])
@pytest.mark.parametrize("precision", ["tf32", "fp16", "bf16"])
def test_a_convolutional_network_becomes_one_engine(found: dict[str, Any], precision: str, batch: str) -> None:
    assert_whole(found[f"convolutional, {precision}, {batch}"], 10_000)


@pytest.mark.parametrize(
    ("case", "least_mib"),
    [
        ("resnet18, fp16", 20),
        ("convnext_tiny, fp16", 50),
        ("mobilenet_v3_large, bf16", 5),
        ("transformer, dynamic", 1),
    ],
)
def test_well_known_networks_become_one_engine(found: dict[str, Any], case: str, least_mib: float) -> None:
    assert_whole(found[case], least_mib * 2**20)


def assert_whole(plan: dict[str, Any], least_bytes: float) -> None:
    assert plan["bytes"] > least_bytes
    assert (plan["engines"], plan["outside"]) == (1, {})
    assert plan["manifest"]["flavour"] == "tensorrt_rtx"
    assert [index for index, _ in plan["manifest"]["inputs"]] == [0]
    assert len(plan["manifest"]["outputs"]) == 1


def test_an_engine_built_again_has_the_new_weights_and_nothing_of_the_old(found: dict[str, Any]) -> None:
    assert found["built again"] == {"is_fresh": True, "has_changed": True}


def test_an_operator_outside_engines_is_named_and_nothing_else_is_said(found: dict[str, Any]) -> None:
    assert (
        "cannot put these operators into a TensorRT engine: aten._linalg_svd.default ×1." in found["refused"]["error"]
    )
    assert "partial=True" in found["refused"]["error"]
    assert found["refused"]["printed"] == ""
