"""How the tests are spread over processes: one a core and not too many, one alone beside a GPU."""

import os

import pytest
import torch

from tests import conftest


@pytest.mark.parametrize(("cores", "gpu", "processes"), [(1, False, 0), (2, False, 2), (64, False, 8), (64, True, 0)])
def test_there_are_as_many_processes_as_cores_and_none_that_share_a_gpu(
    cores: int, gpu: bool, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTEST_XDIST_AUTO_NUM_WORKERS", raising=False)
    monkeypatch.setattr(conftest, "CORES", cores)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert conftest.pytest_xdist_auto_num_workers() == processes
    monkeypatch.setenv("PYTEST_XDIST_AUTO_NUM_WORKERS", "3")
    assert conftest.pytest_xdist_auto_num_workers() is None


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="the tests run in this process alone")
def test_each_process_computes_with_its_share_of_the_cores() -> None:
    assert torch.get_num_threads() == int(os.environ["OMP_NUM_THREADS"])
