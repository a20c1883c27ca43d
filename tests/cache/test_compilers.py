"""Inductor's and Triton's own caches beside ours: where they are kept, that they are used, that they are bounded."""

import os
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.helpers import on_cpu
from torchaccel.__main__ import main
from torchaccel.cache import compilers
from torchaccel.cache.store import Cache
from torchaccel.compiler import BACKENDS
from torchaccel.errors import CacheWarning

CPU = torch.device("cpu")
INDUCTOR, TRITON = compilers.FOLDERS.values()


def serve(folder: Path | bool) -> None:
    """Compile a small module by Inductor, with the caches in `folder`."""
    module = nn.Sequential(nn.Linear(4, 4), nn.GELU()).eval()
    with torch.no_grad():
        model = on_cpu(module, backend="inductor", cache_dir=folder)
        assert torch.allclose(model(torch.ones(2, 4)), module(torch.ones(2, 4)), atol=1e-5)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    for name in (INDUCTOR, TRITON):
        monkeypatch.setenv(name, "")  # so that it is as it was after the test
        monkeypatch.delenv(name)
    return Cache(tmp_path / "cache", 1 << 20)


def named() -> tuple[str | None, str | None]:
    return os.environ.get(INDUCTOR), os.environ.get(TRITON)


def ours(cache: Cache) -> tuple[str, str]:
    return str(cache.folder / "inductor"), str(cache.folder / "triton")


def write(path: Path, size: int, age_s: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))
    os.utime(path, (1e9 - age_s, 1e9 - age_s))
    return path


def test_inductor_keeps_its_files_in_the_cache_which_lists_and_clears_them(
    cache: Cache, capsys: pytest.CaptureFixture[str]
) -> None:
    if reason := BACKENDS["inductor"].unavailable():
        pytest.skip(reason)
    torch._dynamo.reset()
    serve(cache.folder)
    assert str(cache.folder) not in str(named())
    (made,) = cache.compiled()
    assert (made.kind, made.size_bytes > 0) == ("inductor", True)
    write(cache.folder / "triton/KERNEL/kernel.cubin", 3 << 20, 0)
    assert main(["cache", "list", "--dir", str(cache.folder)]) == 0
    shown = capsys.readouterr().out
    for part in ("inductor", "triton", "1 of PyTorch's own", "3.0"):
        assert part in shown, part
    assert cache.clear() == (2, made.size_bytes + (3 << 20))
    assert cache.compiled() == []


def test_the_folders_are_set_for_a_build_and_are_then_what_pytorch_sets(cache: Cache) -> None:
    with cache.compiling(CPU):
        assert named() == ours(cache)
        with Cache(cache.folder / "other", 1 << 20).compiling(CPU):
            assert named() == ours(cache), "no folder changes under a build"
        assert named() == ours(cache)
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    assert named() == (default_cache_dir(), None)
    with cache.compiling(torch.device("cuda", 1)):
        assert named() == ours(cache)
    assert named() == (default_cache_dir(), f"{default_cache_dir()}/triton/1")
    with cache.compiling(CPU):
        assert named() == ours(cache), "what PyTorch has set for itself is not the user's"


@pytest.mark.parametrize("variable", [INDUCTOR, TRITON])
def test_a_folder_that_the_user_has_named_stays(cache: Cache, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "/mine")
    before = named()
    with cache.compiling(CPU):
        assert named() == before
    assert named() == before
    assert not cache.folder.exists()


def test_no_folder_changes_under_a_compilation(cache: Cache) -> None:
    from torch._dynamo.convert_frame import compile_lock

    begun = threading.Event()

    def build() -> None:
        with cache.compiling(CPU):
            begun.set()

    thread = threading.Thread(target=build)
    with compile_lock:
        thread.start()
        assert not begun.wait(0.2)
        assert named() == (None, None)
    thread.join()
    assert begun.is_set()


def test_a_folder_that_cannot_be_used_is_a_warning(cache: Cache) -> None:
    cache.folder.write_text("mine")
    with pytest.warns(CacheWarning, match="could not write"), cache.compiling(CPU):
        assert named() == (None, None)


def test_what_was_unused_for_longest_goes_first_whatever_it_is(cache: Cache) -> None:
    old = write(cache.folder / "triton/OLD/kernel.cubin", 400 << 10, 300)
    also_old = write(cache.folder / "triton/OLD/kernel.json", 1 << 10, 300)
    middle = write(cache.folder / "inductor/ab/middle.so", 400 << 10, 200)
    lock = write(cache.folder / "inductor/locks/held.lock", 0, 400)
    young = write(cache.folder / "triton/YOUNG/kernel.cubin", 400 << 10, 100)
    cache.put({"kind": "plan"}, {"engine": bytes(100 << 10)}, {})
    assert [path.exists() for path in (old, also_old, middle, lock, young)] == [False, False, True, True, True]
    cache.put({"kind": "plan"}, {"engine": bytes(500 << 10)}, {})
    assert (middle.exists(), young.exists()) == (False, True)
    (kernels,) = cache.compiled()
    assert (kernels.kind, kernels.size_bytes, kernels.last_used_s) == ("triton", 400 << 10, 1e9 - 100)


def test_what_is_compiled_is_bounded_as_soon_as_it_is_there(cache: Cache) -> None:
    old = write(cache.folder / "triton/OLD/kernel.cubin", 700 << 10, 300)
    with cache.compiling(CPU):
        middle = write(cache.folder / "triton/MIDDLE/kernel.cubin", 100 << 10, 200)
        young = write(cache.folder / "triton/YOUNG/kernel.cubin", 700 << 10, 100)
        assert old.exists(), "nothing goes while it may be in use"
    assert [path.exists() for path in (old, middle, young)] == [False, True, True]
    (kernels,) = cache.compiled()
    assert (kernels.size_bytes, kernels.last_used_s) == (800 << 10, 1e9 - 100)


def test_without_a_cache_pytorch_keeps_its_own_folders(cache: Cache) -> None:
    if reason := BACKENDS["inductor"].unavailable():
        pytest.skip(reason)
    serve(False)
    assert not cache.folder.exists()
