"""Compiling kernels ahead, for a GPU that is not there."""

import warnings

import pytest

from torchaccel.probes import import_problem

if import_problem("triton"):
    pytest.skip(str(import_problem("triton")), allow_module_level=True)

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import CompilationError, CompiledKernel
from triton.runtime import driver

from torchaccel.fused.ahead import compiling, is_compiling, launch


class Hopper:
    """As much of a driver as compiling asks for."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class Half:
    """A tensor without memory."""

    dtype = torch.float16

    def data_ptr(self) -> int:
        return 0


@triton.jit
def _fill(y, VALUE: tl.constexpr, KIND: tl.constexpr):
    tl.static_assert(KIND != "impossible")
    tl.store(y + tl.arange(0, 32), tl.full((32,), VALUE, tl.float16))


@pytest.fixture(autouse=True)
def _hopper(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
    _fill.device_caches.clear()
    monkeypatch.setattr(driver, "_active", Hopper())


def test_kernels_are_compiled_and_not_run_and_one_that_fails_stops_no_other() -> None:
    assert not is_compiling()
    filters = list(warnings.filters)
    with compiling():
        assert is_compiling()
        for value, kind in ((1, "a"), (2, "impossible"), (3, "a"), (1, "a")):
            launch(_fill, (1,), Half(), VALUE=value, KIND=kind)
    assert not is_compiling()
    compiled = [kernel for kernel in _fill.device_caches[0][0].values() if isinstance(kernel, CompiledKernel)]
    assert len(compiled) == 2
    assert list(warnings.filters) == filters
    with pytest.raises(CompilationError):
        launch(_fill, (1,), Half(), VALUE=2, KIND="impossible")
