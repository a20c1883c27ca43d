"""How long the first result takes: real processes with a cache folder, and a file that a reader can check."""

import json
from pathlib import Path

import pytest

from benchmarks import first_result, results_file
from torchaccel.compiler import BACKENDS

# A name that is in the field, and cannot be had here.
ABSENT = next((name for name, backend in BACKENDS.items() if backend.unavailable()), None)


def test_a_first_process_and_later_ones_have_a_row_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "first.json"
    assert first_result.main(["--backend", "eager", "--runs", "2", "--json", str(path)]) == 0
    content = json.loads(path.read_text())
    assert results_file.problems(content) == []
    first, later = content["rows"]
    assert [(row["process"], row["samples"]) for row in (first, later)] == [("first", 1), ("later", 2)]
    assert 0 < later["gate_ms"] < later["first_call_ms"] <= later["median_ms"]
    assert later["served_by"] == "eager"
    assert first["relative_error"] < 1e-2
    printed = capsys.readouterr().out
    assert f"{later['median_ms']:.0f}" in printed
    assert str(path) in printed


def test_a_folder_that_cannot_be_written_in_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        first_result.main(["--backend", "eager", "--json", str(tmp_path / "file" / "first.json")])
    assert "name another file with --json" in " ".join(capsys.readouterr().err.split())


@pytest.mark.skipif(ABSENT is None, reason="every backend is there")
def test_a_backend_that_is_not_there_is_a_row_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "first.json"
    assert first_result.main(["--backend", str(ABSENT), "--runs", "1", "--json", str(path)]) == 1
    for row in json.loads(path.read_text())["rows"]:
        assert row["median_ms"] is None
        assert "BackendError" in row["reason"]
