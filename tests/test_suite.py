"""The suite: its arithmetic from made-up rows, and a run that is killed, resumed, and given a damaged file."""

import doctest
import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from benchmarks import models, peers, results_file, suite, suite_file, suite_table
from benchmarks.models import Model
from benchmarks.suite_file import Cell
from benchmarks.suite_table import conclusion, summaries, tables
from torchaccel import compiler
from torchaccel.backends.eager import Eager

ROOT = Path(__file__).resolve().parents[1]
on_a_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this is the run of a machine without a GPU")

# Runs the suite on one tiny model, and is killed as the second cell begins.
KILLED = """
import os, signal, sys
from benchmarks import suite
from tests.test_suite import shrink

shrink(setattr)
measure, begun = suite._measure, []

def measured(*arguments):
    begun.append(arguments)
    if len(begun) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return measure(*arguments)

suite._measure = measured
suite.main(sys.argv[1:])
"""


def convolution():
    pooled = nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 4)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), *pooled)


def shrink(put):
    """One tiny model, and nobody who has to compile."""
    put(suite, "MODELS", {"tiny": Model("tiny", convolution, convolutional=True)})
    put(compiler, "FIELD", (Eager(),))
    put(peers, "ON_A_CPU", ("eager",))


@on_a_cpu
def test_a_run_that_is_killed_goes_on_with_the_cells_that_are_missing(tmp_path, monkeypatch, capsys):
    path = tmp_path / "suite.json"
    arguments = ["--json", str(path), "--model", "tiny", "--batch", "1,2", "--precision", "bf16"]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], cwd=ROOT, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    first = json.loads(path.read_text())
    assert [cell["batch"] for cell in first["cells"]] == [1]
    shrink(monkeypatch.setattr)
    suite._module.cache_clear()
    assert suite.main(arguments) == 0
    content = json.loads(path.read_text())
    assert results_file.problems(content) == []
    assert [cell["batch"] for cell in content["cells"]] == [1, 2]
    assert content["rows"][: len(first["rows"])] == first["rows"]  # not measured again
    said = capsys.readouterr().out
    assert "tiny, bf16, batch 2 ..." in said
    assert "tiny, bf16, batch 1 ..." not in said
    assert "Cells left: 0." in said
    assert all(line in said for line in content["conclusion"])
    own, peer = content["rows"][:2]
    assert (own["route"], own["backend"], own["variant"]) == ("torchaccel", "fastest", "eager")
    assert own["race"]["entries"][0]["outcome"] == "won"
    assert (peer["backend"], peer["input_dtype"], own["input_dtype"]) == ("eager", "bfloat16", "bfloat16")
    assert peer["versus"]["low"] <= peer["versus"]["value"] <= peer["versus"]["high"]


# --- in this process ---


@pytest.fixture
def tiny(monkeypatch):
    """A suite of one model, whose cells are made up; returns the cells that were measured."""
    begun = []

    def measure(cell, device, given):
        begun.append(cell)
        return made_up(cell.model, cell.precision, cell.batch, own=1.0, eager=2.0), {"wall_s": 0.0}

    monkeypatch.setattr(suite, "MODELS", {"tiny": Model("tiny", lambda: nn.Linear(2, 2))})
    monkeypatch.setattr(suite, "_measure", measure)
    return begun


def ran(path, *arguments):
    return suite.main(["--json", str(path), "--model", "tiny", *arguments])


def row(model, precision, batch, ms, *, route="peer", backend="eager", **others):
    timed = ms is not None
    found = dict.fromkeys(results_file.FIGURES, None)
    found |= {"model": model, "route": route, "backend": backend, "precision": precision, "batch": batch}
    found |= {"input_dtype": "float16", "layout": "contiguous", "graph": False, "convolutional": True}
    found |= {"reason": None if timed else "no", "variant": None, "median_ms": ms, "replay_median_ms": None}
    if timed:
        found |= {"samples": 100, "cv": 0.0, "relative_error": 1e-3}
    return found | others


def made_up(model, precision, batch, *, own, convolutional=True, winner="inductor", error=1e-3, **rivals):
    shared = {"convolutional": convolutional}
    rows = [row(model, precision, batch, own, route="torchaccel", backend="fastest", variant=winner, **shared)]
    for name, ms in rivals.items():
        ratio = {"value": ms / own, "low": 0.98 * ms / own, "high": 1.02 * ms / own} if ms and own else None
        wrong = error if name == "wrong" else 1e-3
        rows.append(row(model, precision, batch, ms, backend=name, versus=ratio, **shared))
        if ms is not None:
            rows[-1]["relative_error"] = wrong
    return rows


def test_the_limit_stops_before_the_next_cell_and_says_how_many_are_left(tiny, tmp_path, capsys):
    path = tmp_path / "suite.json"
    assert ran(path, "--batch", "1,2,3", "--precision", "fp16", "--limit-s", "0") == 0
    assert (tiny, path.exists()) == ([], False)
    assert "Cells left: 3. Run the same command again to go on." in capsys.readouterr().out
    assert ran(path, "--batch", "1,2", "--precision", "fp16", "--limit-s", "60") == 0
    assert [cell.batch for cell in tiny] == [1, 2]


def test_a_limit_that_passes_during_a_cell_ends_the_run_after_it(tiny, tmp_path, monkeypatch):
    clock = iter((0.0, 0.0, 11.0, 22.0))
    monkeypatch.setattr(suite.time, "monotonic", lambda: next(clock))
    assert ran(tmp_path / "suite.json", "--batch", "1,2,3", "--precision", "fp16", "--limit-s", "10") == 0
    assert [cell.batch for cell in tiny] == [1]


def test_cells_are_measured_once_unless_asked_again(tiny, tmp_path):
    path = tmp_path / "suite.json"
    for extra in ((), (), ("--again",)):
        ran(path, "--batch", "1", "--precision", "fp16", *extra)
    assert len(tiny) == 2
    assert len(json.loads(path.read_text())["rows"]) == 2


@pytest.mark.parametrize("content", ["{", "[]", '{"schema": 1}', "", "\0\0"])
def test_a_damaged_file_is_left_alone_and_the_way_out_is_named(tiny, tmp_path, capsys, content):
    path = tmp_path / "suite.json"
    path.write_text(content)
    with pytest.raises(SystemExit) as caught:
        ran(path)
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert "cannot be resumed from" in said
    assert "move it away" in said
    assert (path.read_text(), tiny) == (content, [])


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.update(tree="0" * 40),
        lambda content: content["environment"].update(torch="1.0"),
        lambda content: content["libraries"].update(transformers="1.0"),
        lambda content: content["environment"].update(gpus=[{"name": "another"}]),
    ],
)
def test_a_file_of_other_code_or_versions_is_moved_aside_whole(tiny, tmp_path, capsys, change):
    path = tmp_path / "suite.json"
    ran(path, "--batch", "1", "--precision", "fp16")
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    before = path.read_text()
    ran(path, "--batch", "1", "--precision", "fp16", "--limit-s", "0")
    assert path.read_text() == before  # nothing was measured, so nothing is moved
    ran(path, "--batch", "1", "--precision", "fp16")
    assert len(tiny) == 2
    assert (tmp_path / "suite.old-1.json").read_text() == before
    assert "The first cell moves it aside" in capsys.readouterr().out


def test_another_host_with_the_same_gpu_goes_on():
    content = {"tree": "t", "libraries": {}}
    content["environment"] = {"gpus": [{"name": "H100"}], "cpu": "a", "platform": "b", "torch": "2"}
    other = content | {"environment": content["environment"] | {"cpu": "c", "platform": "d"}}
    assert suite_file.identity(content) == suite_file.identity(other)


# --- a cell ---


def given(**others):
    return suite._parser().parse_args([f"--{name}={value}" for name, value in others.items()])


def test_a_cell_that_fails_is_a_row_with_its_reason(monkeypatch, tmp_path):
    def make():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried\nmore")

    monkeypatch.setattr(suite, "MODELS", {"tiny": Model("tiny", make)})
    suite._module.cache_clear()
    path = tmp_path / "suite.json"
    assert ran(path, "--batch", "1,2", "--precision", "fp16") == 0
    content = json.loads(path.read_text())
    assert results_file.problems(content) == []
    assert [one["reason"] for one in content["rows"]] == [
        "the cell failed: OutOfMemoryError: CUDA out of memory. Tried"
    ] * 2
    assert "No cell has figures" in content["conclusion"][0]


def test_max_autotune_is_for_two_batches_unless_told_otherwise(monkeypatch):
    plans = []
    monkeypatch.setattr(suite, "carry_out", lambda plan, *_: plans.append(plan) or 1 / 0)
    monkeypatch.setattr(suite, "_module", lambda *_: None)
    for batch in (1, 8):
        suite._measure(Cell("resnet18", "fp16", batch), torch.device("cpu"), given())
    suite._measure(Cell("bert_base", "fp16", 8), torch.device("cuda"), given(**{"compile-modes": "max-autotune"}))
    modes = [plan.compile_modes for plan in plans]
    assert modes == [("reduce-overhead", "max-autotune"), ("reduce-overhead",), ("max-autotune",)]
    assert (plans[2].shape, plans[2].vocabulary) == ((128,), 30522)
    assert plans[2].peers == tuple(peers.NAMES)
    assert plans[0].peers == ("eager", "compile")


def test_ids_stay_ids_and_have_no_layout():
    class Embedded(nn.Embedding):
        def forward(self, ids):
            assert ids.dtype is torch.int64
            return super().forward(ids), ids.sum()

    ids = torch.randint(9, (2, 4))
    with torch.no_grad():
        built = peers.build("eager", Embedded(9, 3), "bf16", ids, None)
        assert built.call()[0].dtype is torch.bfloat16
    assert (built.input_dtype, built.layout, built.variant) == ("int64", "contiguous", "contiguous")


def test_the_models_look_trained_and_depend_on_their_inputs():
    for name in ("resnet18", "mobilenet_v3_large"):
        module = models.MODELS[name].module()
        with torch.no_grad():
            one, other = module(torch.randn(2, 3, 64, 64))
        assert (one - other).norm() > 0.05 * one.norm()


# --- the arithmetic ---


@pytest.mark.parametrize("module", [models, suite_table, suite_file])
def test_the_examples_of_the_docstrings_run(module):
    assert doctest.testmod(module).failed == 0


def test_the_best_rival_is_the_quickest_that_is_right():
    rows = made_up("a", "fp16", 1, own=1.0, eager=3.0, graph=2.0, wrong=0.5, broken=None, error=0.2)
    (cell,) = summaries(rows)
    assert (cell.best["backend"], cell.ratio["value"]) == ("graph", 2.0)
    assert [one["backend"] for one in cell.wrong] == ["wrong"]
    rows = made_up("a", "bf16", 1, own=1.0, eager=3.0, wrong=0.5, error=0.02)  # bf16's bound is wider
    assert summaries(rows)[0].best["backend"] == "wrong"


def test_the_conclusion_is_computed_from_the_rows():
    rows = [
        *made_up("a", "fp16", 1, own=1.0, eager=2.0, graph=8.0),
        *made_up("a", "fp16", 8, own=1.0, eager=0.5),
        *made_up("b", "fp16", 1, own=1.0, eager=4.0, winner="eager"),
        *made_up("c", "fp16", 1, own=1.0, eager=0.99, convolutional=False),  # within noise
        *made_up("d", "fp16", 1, own=None, eager=9.0),
    ]
    assert conclusion(rows) == [
        "fastest is not slower than the best rival, beyond noise, in 3 of 4 cells compared.",
        "It is slower in: a fp16 batch 8.",
        "Not compared, for want of a figure: d fp16 batch 1.",
        "Best rival over fastest, geometric mean over 3 cells of a, b: 1.587.",  # (2 * 0.5 * 4) ** (1/3)
        "Races won: inductor 3, eager 1.",
    ]


def test_the_table_has_every_cell_and_what_is_missing():
    rows = [
        *made_up("a", "fp16", 1, own=0.5, graph=1.0, wrong=0.25, error=0.2),
        *made_up("b", "bf16", 8, own=None, eager=9.0),
    ]
    console = Console(width=160, file=io.StringIO())
    console.print(tables(rows))
    text = console.file.getvalue()
    assert "2.00 (1.96 to 2.04)" in text
    assert "a fp16 batch 1, wrong: 0.250 ms, and wrong: its error is 2e-01" in text
    assert "b bf16 batch 8, fastest: no" in text
