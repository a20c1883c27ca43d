"""cuDNN's plans, as far as they go without a GPU: what it is asked for is valid; where it is missing that is said."""

import itertools
from dataclasses import replace

import pytest
import torch

from torchaccel.environment import import_problem
from torchaccel.fused import cudnn_plans
from torchaccel.fused.cudnn_plans import ACTIVATIONS, Problem

needs_cudnn = pytest.mark.skipif(bool(import_problem("cudnn")), reason=str(import_problem("cudnn")))
PROBLEM = Problem(
    (2, 64, 56, 56),
    (128, 64, 3, 3),
    (2, 128, 28, 28),
    (2, 2),
    (1, 1),
    (1, 1),
    True,
    False,
    "relu",
    torch.float16,
    torch.device("cuda", 0),
)


@needs_cudnn
@pytest.mark.parametrize("dtype", cudnn_plans.DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_cudnn_takes_what_it_is_asked_for(activation: str, dtype: torch.dtype) -> None:
    for bias, residual in itertools.product((True, False), repeat=2):
        problem = replace(PROBLEM, activation=activation, dtype=dtype, bias=bias, residual=residual)
        assert cudnn_plans.operations(problem, None) is not None


@needs_cudnn
def test_cudnn_refuses_an_output_of_another_size() -> None:
    with pytest.raises(cudnn_plans._errors()):
        cudnn_plans.operations(replace(PROBLEM, residual=True, y=(2, 128, 27, 28)), None)


def test_where_the_package_is_missing_the_reason_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudnn_plans, "import_problem", lambda name: f"{name} is not installed")
    cudnn_plans.problem.cache_clear()
    try:
        assert "pip install nvidia-cudnn-frontend" in str(cudnn_plans.problem())
        assert not cudnn_plans.takes(torch.ones(1, 8, 4, 4, dtype=torch.float16), "relu")
    finally:
        cudnn_plans.problem.cache_clear()


def test_there_are_no_plans_for_float32_or_other_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudnn_plans, "problem", lambda: None)
    x = torch.ones(1, 8, 4, 4, dtype=torch.float16)
    assert cudnn_plans.takes(x, "relu")
    assert not cudnn_plans.takes(x.float(), "relu")
    assert not cudnn_plans.takes(x, "hardswish")
    assert not cudnn_plans.takes(x[:0], "relu")
