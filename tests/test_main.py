"""`python -m torchaccel`, as a process and in this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from torchaccel.__main__ import main
from torchaccel.cache.store import Cache
from torchaccel.environment import environment
from torchaccel.probes import Problem


def test_env_prints_tables_that_a_narrow_terminal_does_not_cut() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "torchaccel", "env"],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "30"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    for part in ("GPUs", "Versions", "Usable here", torch.__version__, "Inductor on CPU", "Torch-TensorRT"):
        assert part in done.stdout, part
    rows = [line for line in done.stdout.splitlines() if "ONNX export" in line]
    assert len(rows) == 1
    assert "yes" in rows[0]


def test_env_keeps_a_long_command_on_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = "pip install " + " ".join(f"package-{number}" for number in range(20))
    found = replace(environment(), problems=(Problem("this beside that", "they clash", command),))
    monkeypatch.setattr("torchaccel.__main__.environment", lambda: found)
    assert main(["env"]) == 0
    assert f"  this beside that: {command}" in capsys.readouterr().out.splitlines()


def test_env_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["torch"] == torch.__version__
    assert {"gpus", "driver", "components", "problems"} <= set(found)


@pytest.mark.parametrize("arguments", [[], ["no-such-command"], ["env", "--no-such-option"]])
def test_wrong_arguments_say_how_to_call_it(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: torchaccel" in capsys.readouterr().err


# --- the cache ---


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    monkeypatch.setenv("TORCHACCEL_CACHE_DIR", str(tmp_path / "cache"))
    return Cache(tmp_path / "cache", 1 << 30)


@pytest.mark.parametrize("action", [[], ["list"], ["verify"], ["clear"]])
def test_a_folder_without_a_cache_is_an_error_and_is_left_as_it_is(
    cache: Cache, capsys: pytest.CaptureFixture[str], tmp_path: Path, action: list[str]
) -> None:
    assert main(["cache", *action]) == 1
    assert f"there is no cache in {cache.folder}: --dir" in capsys.readouterr().err
    assert not cache.folder.exists()
    mine = [tmp_path / "mine" / name for name in ("triton/.git", "entries/table.csv", "busy/notes.txt")]
    for path in mine:
        path.parent.mkdir(parents=True)
        path.write_text("mine")
    assert main(["cache", *action, "--dir", str(tmp_path / "mine")]) == 1
    assert all(path.read_text() == "mine" for path in mine)
    assert main(["cache", *action, "--dir", str(mine[0])]) == 1


def test_the_cache_is_listed_verified_and_cleared(cache: Cache, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(2):
        cache.put({"kind": "plan", "n": number}, {"plan": bytes(3 << 20)}, {"what": f"Net float32[{number}, 3]"})
    assert main(["cache"]) == 0
    shown = capsys.readouterr().out
    for part in ("plan", "Net float32[0, 3]", "Net float32[1, 3]", "3.0", "last used", "2 entries"):
        assert part in shown, part
    assert main(["cache", "verify"]) == 0
    assert "2 of 2 entries are whole" in capsys.readouterr().out
    path = cache.path({"kind": "plan", "n": 1})
    path.write_bytes(path.read_bytes()[:-1])
    assert main(["cache", "verify"]) == 1
    shown = capsys.readouterr().out
    assert f"damaged: {path}: the checksum of 'plan' is wrong" in shown
    assert "1 of 2 entries are whole" in shown
    assert main(["cache", "clear", "--dir", str(cache.folder)]) == 0
    assert "removed 2 entries, 6.0 MiB" in capsys.readouterr().out
    assert cache.entries() == []


def test_a_limit_that_is_none_is_an_error_in_one_line(
    cache: Cache, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHACCEL_CACHE_LIMIT_GIB", "plenty")
    assert main(["cache", "list"]) == 1
    assert "TORCHACCEL_CACHE_LIMIT_GIB='plenty': allowed is" in capsys.readouterr().err


def test_a_cache_that_is_no_folder_is_an_error(cache: Cache, capsys: pytest.CaptureFixture[str]) -> None:
    cache.folder.write_text("mine")
    for action in ("list", "verify", "clear"):
        assert main(["cache", action]) == 1
        assert str(cache.folder) in capsys.readouterr().err
