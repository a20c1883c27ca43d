"""`python -m torchaccel`, as a process and in this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from torchaccel.__main__ import main
from torchaccel.environment import Problem, environment


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
