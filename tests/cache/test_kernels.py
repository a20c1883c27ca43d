"""Kernels of TensorRT-RTX and timings of TensorRT proper in the cache, with stand-ins for what needs a GPU."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.helpers import captured
from torchaccel import trt
from torchaccel.backends import torch_tensorrt
from torchaccel.backends.base import Plan
from torchaccel.backends.eager import Eager
from torchaccel.cache import kernels
from torchaccel.cache.plans import plan_for
from torchaccel.cache.store import Cache
from torchaccel.errors import CacheWarning
from torchaccel.options import Options
from torchaccel.quiet import quiet
from torchaccel.weights import WeightStore

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
    cache.put(kernels._key("kernels", library, GPU), {"kernels": b"of another format"}, {})
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


# --- the timings of TensorRT proper ---


class Builder:
    """A builder's config on TensorRT proper: it takes timings of its own format, and adds to them in a build."""

    def __init__(self, refuses: bool = False) -> None:
        self.refuses = refuses
        self.held: bytes | None = None

    def create_timing_cache(self, serialised: bytes) -> Any:
        if serialised and not serialised.startswith(b"timings:"):
            return None
        return SimpleNamespace(held=serialised or b"timings:")

    def set_timing_cache(self, timings: Any, ignore_mismatch: bool) -> bool:
        if ignore_mismatch or self.refuses or b"another GPU" in timings.held:
            return False
        self.held = timings.held
        return True

    def get_timing_cache(self) -> Any:
        return None if self.held is None else SimpleNamespace(serialize=lambda: self.held)


def timed(library: trt.TensorRT, cache: Cache | None, new: bytes = b"", config: Any = None) -> bytes | None:
    """Build an engine for which `new` has to be timed; returns what the build began with."""
    config = config or Builder()
    with kernels.timings_kept(library, GPU, cache):
        with quiet():  # as Torch-TensorRT builds
            library.reuse_timings(config, GPU)
        before = config.held
        if before is not None:
            config.held += new
        library.keep_timings(config, GPU)
    return before


def proper(monkeypatch: pytest.MonkeyPatch) -> trt.TensorRT:
    return Process(monkeypatch, "tensorrt").library


def test_a_build_times_nothing_that_an_earlier_one_has_timed(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    first = proper(monkeypatch)
    assert timed(first, cache, b"a") == b"timings:"
    assert timed(first, cache, b"b") == b"timings:a"
    assert timed(proper(monkeypatch), cache) == b"timings:ab"
    (entry,) = cache.entries()
    assert (entry.kind, entry.info["what"]) == ("timings", "TensorRT 1.4 on GPU 0")
    written: list[int] = []
    monkeypatch.setattr(Cache, "put", lambda *_: written.append(1))
    timed(proper(monkeypatch), cache)
    assert written == [], "nothing was new"


def test_without_a_cache_one_process_shares_its_timings(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    library = proper(monkeypatch)
    timed(library, None, b"a")
    assert timed(library, None) == b"timings:a"
    assert timed(proper(monkeypatch), None) == b"timings:"
    assert cache.entries() == []


@pytest.mark.parametrize("refused", [b"of another format", b"timings:another GPU"], ids=["format", "mismatch"])
def test_timings_that_are_refused_are_dropped(refused: bytes, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    library = proper(monkeypatch)
    cache.put(kernels._key("timings", library, GPU), {"timings": refused}, {})
    with pytest.warns(CacheWarning, match=r"TensorRT 1\.4 refuses the timings"):
        assert timed(library, cache, b"a") == b"timings:"
    assert timed(proper(monkeypatch), cache) == b"timings:a"


def test_a_builder_that_takes_no_timings_builds_all_the_same(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(CacheWarning, match="refuses the timings"):
        assert timed(proper(monkeypatch), cache, config=Builder(refuses=True)) is None
    assert cache.entries() == []


def test_timings_beyond_the_limit_are_begun_anew(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    timed(proper(monkeypatch), cache, b"many")
    monkeypatch.setattr(kernels, "MAX_BYTES", 10)
    assert timed(proper(monkeypatch), cache) == b"timings:"


def test_tensorrt_rtx_which_times_nothing_is_not_asked(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    library, config, interpreter = Process(monkeypatch).library, SimpleNamespace(held=None), SimpleNamespace()
    assert timed(library, cache, config=config) is None
    torch_tensorrt._share_timings(interpreter, library, GPU)
    assert (cache.entries(), vars(interpreter)) == ([], {})


def test_torch_tensorrt_s_builds_share_timings_too(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    library, interpreter, config = proper(monkeypatch), SimpleNamespace(), Builder()
    timed(library, cache, b"a")
    torch_tensorrt._share_timings(interpreter, library, GPU)
    interpreter._create_timing_cache(config, "/nowhere/timing_cache.bin")
    assert config.held == b"timings:a"
    config.held += b"b"
    interpreter._save_timing_cache(config, "/nowhere/timing_cache.bin")
    assert library.timings(GPU) == b"timings:ab"


def test_a_plan_is_built_with_the_timings_that_are_kept(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    library = proper(monkeypatch)

    class Timing(Eager):
        name, native = "timing", False

        def tensorrt(self) -> trt.TensorRT:
            return library

        def build(self, program: Any, precision: Any, device: Any, **_: Any) -> Plan:
            config = Builder()
            library.reuse_timings(config, device)
            assert config.held is not None
            config.held += b"a"
            library.keep_timings(config, device)
            return Plan(self.name, precision, b"engine", {"inputs": []})

    program = captured(torch.nn.Linear(2, 2), torch.ones(1, 2))
    program.take_weights(WeightStore(), torch.nn.Linear(2, 2))
    plan_for(Timing(), program, Options("fp32"), GPU, cache=cache, what="Linear", gpu={"name": "GPU 0"})
    assert {entry.kind for entry in cache.entries()} == {"plan", "timings"}
    assert timed(proper(monkeypatch), cache) == b"timings:a"
