"""The kernels of TensorRT-RTX in the cache, with a stand-in for its runtime cache, which needs a GPU."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from torchaccel import kernels, trt
from torchaccel.cache import Cache
from torchaccel.errors import CacheWarning

GPU, OTHER = torch.device("cuda", 0), torch.device("cuda", 1)
RTX = "tensorrt_rtx"


class RuntimeCache:
    """Bytes instead of kernels; it takes those that begin with its own format."""

    def __init__(self) -> None:
        self.held = b"format:"

    def serialize(self) -> bytes:
        return self.held

    def deserialize(self, blob: bytes) -> bool:
        if blob.startswith(b"format:"):
            self.held = blob
            return True
        return False


class Process:
    """What one process holds of TensorRT-RTX."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, flavour: str = RTX) -> None:
        self.library = trt.TensorRT(flavour, SimpleNamespace(ILogger=_Logger, __version__="1.4"))
        self._patch = monkeypatch

    def serve(self, cache: Cache | None, new: bytes = b"", device: torch.device = GPU) -> bytes:
        """Load an engine that needs the kernels `new`; returns what there was before."""
        self._patch.setattr(trt, "load", lambda _: self.library)
        kernels.restore(RTX, device, cache)
        config = _Config()
        self.library.share_kernels(config, device)
        before = config.cache.held
        config.cache.held += new
        kernels.keep(RTX, device, cache)
        return before


class _Config:
    cache: Any

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache()

    def set_runtime_cache(self, cache: RuntimeCache) -> None:
        self.cache = cache


class _Logger:
    Severity = SimpleNamespace(**{name: name for name in ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")})


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    monkeypatch.setattr(kernels, "describe_gpu", lambda device: {"name": f"GPU {device.index}"})
    return Cache(tmp_path, 1 << 20)


def test_a_later_process_begins_with_the_kernels_of_earlier_ones(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Process(monkeypatch)
    assert first.serve(cache, b"a") == b"format:"
    assert first.serve(cache, b"b") == b"format:a"
    second = Process(monkeypatch)
    assert second.serve(cache, b"c") == b"format:ab"
    assert Process(monkeypatch).serve(cache) == b"format:abc"
    (entry,) = cache.entries()
    assert (entry.kind, entry.info["what"]) == ("kernels", "TensorRT-RTX 1.4 on GPU 0")


def test_nothing_is_written_where_nothing_is_new(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    Process(monkeypatch).serve(cache, b"a")
    written = []
    monkeypatch.setattr(Cache, "put", lambda *_: written.append(1))
    Process(monkeypatch).serve(cache)
    assert written == []
    Process(monkeypatch).serve(cache, b"b")
    assert written == [1]


def test_another_gpu_or_version_has_kernels_of_its_own(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    Process(monkeypatch).serve(cache, b"a")
    assert Process(monkeypatch).serve(cache, device=OTHER) == b"format:"
    later = Process(monkeypatch)
    later.library.api.__version__ = "1.5"
    assert later.serve(cache) == b"format:"
    monkeypatch.setattr(kernels, "driver_version", lambda: "another")
    assert Process(monkeypatch).serve(cache) == b"format:"


def test_kernels_that_are_refused_are_made_anew(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    Process(monkeypatch).serve(cache, b"a")
    library = Process(monkeypatch).library
    cache.put(kernels._key(library, GPU), {"kernels": b"of another format"}, {})
    with pytest.warns(CacheWarning, match="refuses the kernels"):
        assert Process(monkeypatch).serve(cache, b"b") == b"format:"
    assert Process(monkeypatch).serve(cache) == b"format:b"


def test_beyond_a_limit_kernels_are_begun_anew(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "MAX_BYTES", 10)
    Process(monkeypatch).serve(cache, b"many")
    assert Process(monkeypatch).serve(cache, b"x") == b"format:"
    assert Process(monkeypatch).serve(cache) == b"format:x"


def test_without_a_cache_or_on_tensorrt_proper_nothing_is_kept(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    Process(monkeypatch).serve(None, b"a")
    Process(monkeypatch, "tensorrt").serve(cache, b"a")
    assert cache.entries() == []
