"""The compiled helper: built once, shared, and done without where it cannot be built."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from torchaccel import helper as module
from torchaccel.cache.folder import MARKER, make_own_folder
from torchaccel.cache.store import cache_folder
from torchaccel.helper import Helper
from torchaccel.probes import cxx_compiler

needs_compiler = pytest.mark.skipif(cxx_compiler() is None, reason="there is no C++ compiler")


@needs_compiler
def test_it_is_compiled_once_and_found_by_the_next_process() -> None:
    helper = Helper()
    assert helper.wait() is not None, helper.problem
    code = "from torchaccel.helper import helper; assert helper.wait(), helper.problem"
    without_compiler = os.environ | {"CXX": "/nowhere/g++"}
    subprocess.run([sys.executable, "-c", code], env=without_compiler, check=True, timeout=120)


@pytest.mark.parametrize("compiler", ["/nowhere/g++", sys.executable])
def test_a_compiler_that_is_missing_or_fails_leaves_a_reason_and_no_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compiler: str
) -> None:
    monkeypatch.setenv("TORCHACCEL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "cxx_compiler", lambda: compiler)
    helper = Helper()
    assert helper.wait() is None
    assert helper.problem
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [MARKER]


def test_without_a_compiler_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHACCEL_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(module, "cxx_compiler", lambda: None)
    helper = Helper()
    assert helper.wait() is None
    assert "install g++" in helper.problem


@needs_compiler
def test_a_damaged_library_is_compiled_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert Helper().wait() is not None
    (whole,) = make_own_folder(cache_folder()).glob(f"watch-{module._key()}*")
    monkeypatch.setenv("TORCHACCEL_CACHE_DIR", str(make_own_folder(tmp_path)))
    (tmp_path / whole.name).write_bytes(b"no library")
    helper = Helper()
    assert helper.wait() is not None, helper.problem
    assert (tmp_path / whole.name).stat().st_size == whole.stat().st_size


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_cannot_be_written_leaves_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    monkeypatch.setenv("TORCHACCEL_CACHE_DIR", str(tmp_path / "cache"))
    helper = Helper()
    assert helper.wait() is None
    assert "PermissionError" in helper.problem


def test_the_cache_is_where_the_platform_keeps_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHACCEL_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/torchaccel")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache/torchaccel"
    monkeypatch.setenv("TORCHACCEL_CACHE_DIR", "/elsewhere")
    assert cache_folder() == Path("/elsewhere")
