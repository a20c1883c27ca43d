"""What needs a GPU, skipped with the reason where there is none."""

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "tests/gpu" in str(item.path).replace("\\", "/"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU, and PyTorch sees none"))


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test compiles is built by it, not by an earlier run."""
    monkeypatch.setenv("TORCHACCEL_CACHE_LIMIT_GIB", "0")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())
