"""Tests in several processes, by pytest-xdist: how many there are at most, and with how many threads each computes."""

import gc
import os
from contextlib import suppress

import pytest

MOST_PROCESSES = 8  # each holds PyTorch and TensorRT: 1.5 GB
CORES = len(os.sched_getaffinity(0))

if "PYTEST_XDIST_WORKER" in os.environ:  # each its share of the cores; PyTorch, not imported yet, takes all
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, CORES // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))))

with suppress(ImportError):  # tests/gpu does without it
    from hypothesis import settings

    settings.register_profile("no deadline", deadline=None)  # a busy machine is no failure
    settings.load_profile("no deadline")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int | None:
    """What `-n auto` means: as many as there are cores, and none beside this one where they would share a GPU."""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None  # pytest-xdist takes it
    import torch

    return 0 if torch.cuda.is_available() or CORES == 1 else min(CORES, MOST_PROCESSES)


@pytest.fixture(autouse=True, scope="module")
def _collections_pass_over_what_is_old() -> None:
    """Each build collects garbage, which takes 0.2 s where PyTorch, TensorRT and thousands of tests are looked at."""
    gc.collect()
    gc.freeze()
