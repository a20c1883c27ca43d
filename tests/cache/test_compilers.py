"""Inductor's and Triton's own caches beside ours: where they are kept, that they are used, that they are bounded."""

import os
import threading
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.helpers import on_cpu
from torchaccel.__main__ import main
from torchaccel.backends.base import Engine, Plan
from torchaccel.backends.eager import Eager
from torchaccel.cache import compilers, store
from torchaccel.cache.folder import make_own_folder
from torchaccel.cache.store import Cache
from torchaccel.compiler import BACKENDS
from torchaccel.errors import AccuracyError, BuildError, CacheWarning, DeviceMemoryError

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


def write(cache: Cache, name: str, size: int, age_s: int) -> Path:
    path = make_own_folder(cache.folder) / name
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
    write(cache, "triton/KERNEL/kernel.cubin", 3 << 20, 0)
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


def test_a_disk_with_next_to_no_room_is_left_to_others_with_one_warning(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "ROOM_BYTES", 1 << 60)
    with pytest.warns(CacheWarning, match="No space|fewer than .* MiB are free.*make room there") as caught:
        for _ in range(2):
            with cache.compiling(CPU) as is_kept:
                assert not is_kept
                assert named() == (None, None)
    assert len(caught) == 1


def test_what_fails_for_a_disk_that_has_filled_is_compiled_elsewhere(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders, free = [], iter([1 << 40, 1 << 10])

    def load(backend: Eager, plan: Plan, device: torch.device) -> Engine:
        folders.append(os.environ.get(INDUCTOR))
        if len(folders) == 1:
            raise BuildError("No space left on device")
        return real(backend, plan, device)

    real = Eager.load
    monkeypatch.setattr(Eager, "compiles", True)
    monkeypatch.setattr(Eager, "load", load)
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=next(free)))
    model = on_cpu(nn.Linear(4, 4), cache_dir=cache.folder)
    with torch.no_grad(), pytest.warns(CacheWarning, match=r"is full, .* done again.*No space left"):
        model(torch.ones(2, 4))
    assert len(folders) == 2
    assert folders[0] == ours(cache)[0]
    assert folders[1] != ours(cache)[0]
    assert len(model.report().engines[0].gates) == 1


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (BuildError, BuildError),
        (AccuracyError, AccuracyError),
        (torch.OutOfMemoryError, DeviceMemoryError),
    ],
)
def test_what_fails_for_another_reason_is_not_repeated(
    cache: Cache, error: type[Exception], seen: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = []

    def load(backend: Eager, plan: Plan, device: torch.device) -> Engine:
        loads.append(1)
        if error is not BuildError:
            monkeypatch.setattr(store, "ROOM_BYTES", 1 << 60)
        raise error("it is wrong")

    monkeypatch.setattr(Eager, "compiles", True)
    monkeypatch.setattr(Eager, "load", load)
    with torch.no_grad(), pytest.raises(seen):
        on_cpu(nn.Linear(4, 4), cache_dir=cache.folder)(torch.ones(2, 4))
    assert loads == [1]


def test_what_was_unused_for_longest_goes_first_whatever_it_is(cache: Cache) -> None:
    old = write(cache, "triton/OLD/kernel.cubin", 400 << 10, 300)
    also_old = write(cache, "triton/OLD/kernel.json", 1 << 10, 300)
    middle = write(cache, "inductor/ab/middle.so", 400 << 10, 200)
    lock = write(cache, "inductor/locks/held.lock", 0, 400)
    young = write(cache, "triton/YOUNG/kernel.cubin", 400 << 10, 100)
    cache.put({"kind": "plan"}, {"engine": bytes(100 << 10)}, {})
    assert [path.exists() for path in (old, also_old, middle, lock, young)] == [False, False, True, True, True]
    cache.put({"kind": "plan"}, {"engine": bytes(500 << 10)}, {})
    assert (middle.exists(), young.exists()) == (False, True)
    (kernels,) = cache.compiled()
    assert (kernels.kind, kernels.size_bytes, kernels.last_used_s) == ("triton", 400 << 10, 1e9 - 100)


def test_what_is_compiled_is_bounded_as_soon_as_it_is_there(cache: Cache) -> None:
    old = write(cache, "triton/OLD/kernel.cubin", 700 << 10, 300)
    with cache.compiling(CPU):
        middle = write(cache, "triton/MIDDLE/kernel.cubin", 100 << 10, 200)
        young = write(cache, "triton/YOUNG/kernel.cubin", 700 << 10, 100)
        assert old.exists(), "nothing goes while it may be in use"
    assert [path.exists() for path in (old, middle, young)] == [False, True, True]
    (kernels,) = cache.compiled()
    assert (kernels.size_bytes, kernels.last_used_s) == (800 << 10, 1e9 - 100)


def test_without_a_cache_pytorch_keeps_its_own_folders(cache: Cache) -> None:
    if reason := BACKENDS["inductor"].unavailable():
        pytest.skip(reason)
    serve(False)
    assert not cache.folder.exists()
