"""The suite: its arithmetic from made-up rows, and a run that is killed, resumed, and given a damaged file."""

import doctest
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from benchmarks import models, peers, processes, results_file, suite, suite_arguments, suite_file, suite_table
from benchmarks.functional import FunctionalResNet, FunctionalViT
from benchmarks.models import Model
from benchmarks.suite_file import Cell
from benchmarks.suite_table import conclusion, summaries, tables
from torchaccel import compiler
from torchaccel.backends.eager import Eager

ROOT = Path(__file__).resolve().parents[1]
CONVOLUTIONAL = "resnet18, resnet50, mobilenet_v3_large, efficientnet_b0, convnext_tiny"
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
    put(models, "MODELS", {"tiny": Model("tiny", convolution)})
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
    assert "s; building fastest" in said
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

    monkeypatch.setattr(models, "MODELS", {"tiny": Model("tiny", lambda: nn.Linear(2, 2))})
    monkeypatch.setattr(suite, "_measure", measure)
    return begun


def ran(path, *arguments):
    return suite.main(["--json", str(path), "--model", "tiny", *arguments])


def row(model, precision, batch, ms, *, route="peer", backend="eager", **others):
    timed = ms is not None
    found = dict.fromkeys(results_file.FIGURES, None)
    found |= {"model": model, "route": route, "backend": backend, "precision": precision, "batch": batch}
    found |= {"input_dtype": "float16", "layout": "contiguous", "graph": False}
    found |= {"reason": None if timed else "no", "variant": None, "median_ms": ms, "replay_median_ms": None}
    if timed:
        found |= {"samples": 100, "cv": 0.0, "relative_error": 1e-3}
    return found | others


def made_up(model, precision, batch, *, own, winner="inductor", error=1e-3, **rivals):
    rows = [row(model, precision, batch, own, route="torchaccel", backend="fastest", variant=winner)]
    for name, ms in rivals.items():
        ratio = {"value": ms / own, "low": 0.98 * ms / own, "high": 1.02 * ms / own} if ms and own else None
        wrong = error if name == "wrong" else 1e-3
        rows.append(row(model, precision, batch, ms, backend=name, versus=ratio))
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
    content = json.loads(path.read_text())
    assert len(content["rows"]) == 2
    assert [(one["commit"], one["tree"]) for one in content["cells"]] == [(content["commit"], content["tree"])]


def test_what_was_to_be_measured_again_and_was_not_is_left(tiny, tmp_path, capsys):
    path, cell = tmp_path / "suite.json", ("--batch", "1", "--precision", "fp16")
    ran(path, *cell)
    assert "Cells left: 0." in capsys.readouterr().out
    ran(path, *cell, "--again", "--limit-s", "0")
    assert "Cells left: 1." in capsys.readouterr().out


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
    ("change", "said"),
    [
        (lambda content: content.update(cells=None), "cells is missing"),
        (lambda content: content["cells"][0].pop("tree"), "cell 0 is incomplete"),
        (lambda content: content.update(cells=[3]), "cell 0 is incomplete"),
        (lambda content: content.update(libraries=[]), "libraries is missing"),
        (lambda content: content["environment"].pop("gpus"), "environment.gpus is no list"),
        (lambda content: content["environment"].update(gpus=[3]), "environment.gpus is no list"),
        (lambda content: content.update(environment={"gpus": []}), "environment names no device"),
        (lambda content: content["rows"].insert(0, 3), "row 0: it is 3"),
    ],
)
def test_a_file_whose_parts_are_not_a_suite_s_is_left_alone_too(tiny, tmp_path, capsys, change, said):
    path, cell = tmp_path / "suite.json", ("--batch", "1", "--precision", "fp16")
    ran(path, *cell)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(SystemExit):
        ran(path, *cell)
    assert f"cannot be resumed from: {said}" in " ".join(capsys.readouterr().err.split())
    assert (json.loads(path.read_text()), len(tiny)) == (content, 1)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["environment"].update(torch="1.0"),
        lambda content: content["environment"].update(driver="1.0"),
        lambda content: content["libraries"].update(transformers="1.0"),
        lambda content: content["environment"].update(gpus=[{"name": "another"}]),
    ],
)
def test_a_file_of_another_gpu_or_other_versions_is_moved_aside_whole(tiny, tmp_path, capsys, change):
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


def test_what_was_moved_aside_before_is_not_overwritten(tiny, tmp_path):
    path, cell = tmp_path / "suite.json", ("--batch", "1", "--precision", "fp16")
    for backend in ("fastest", "eager", "fused", "inductor"):
        ran(path, *cell, "--backend", backend)
    aside = [tmp_path / f"suite.old-{number}.json" for number in (1, 2, 3)]
    assert [json.loads(file.read_text())["backend"] for file in aside] == ["fastest", "eager", "fused"]
    assert len(list(tmp_path.iterdir())) == 4


def test_precisions_of_one_batch_are_cells_of_their_own(tiny, tmp_path):
    path = tmp_path / "suite.json"
    ran(path, "--batch", "1", "--precision", "fp16,bf16")
    ran(path, "--batch", "1", "--precision", "fp16,bf16")
    assert [cell.precision for cell in tiny] == ["fp16", "bf16"]
    content = json.loads(path.read_text())
    assert [one["precision"] for one in content["rows"]] == ["bf16", "bf16", "fp16", "fp16"]


def test_a_lost_gpu_ends_the_run_and_the_exit_code_says_so(tiny, tmp_path, monkeypatch, capsys):
    def lost(device):
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(suite, "release", lost)
    assert ran(tmp_path / "suite.json", "--batch", "1,2", "--precision", "fp16") == suite.LOST
    assert [cell.batch for cell in tiny] == [1]
    said = capsys.readouterr().out
    assert "The GPU is lost to this process since tiny, fp16, batch 1" in said
    assert "Cells left: 1." in said


def test_cells_of_other_code_stay_until_all_are_measured_and_say_so(tiny, tmp_path):
    path = tmp_path / "suite.json"
    ran(path, "--batch", "1", "--precision", "fp16")
    content = json.loads(path.read_text())
    content["cells"][0] |= {"tree": "0" * 40, "commit": "1" * 40}
    path.write_text(json.dumps(content))
    ran(path, "--batch", "1,2", "--precision", "fp16")
    assert [cell.batch for cell in tiny] == [1, 2, 1]
    content = json.loads(path.read_text())
    (tree,) = {cell["tree"] for cell in content["cells"]}
    assert tree == content["tree"]

    content["cells"][0] |= {"tree": "0" * 40, "commit": "1" * 40}
    path.write_text(json.dumps(content))
    ran(path, "--batch", "4", "--precision", "fp16")
    content = json.loads(path.read_text())
    assert [cell["batch"] for cell in content["cells"]] == [1, 2, 4]
    said = content["conclusion"][-1]
    assert said.startswith("Cells, by the commit of torchaccel: 2 at ")
    assert said.endswith(f"1 at {'1' * 40} (tree 000000000000).")


def test_the_tree_says_which_code_a_cell_is_of_and_not_the_commit(tiny, tmp_path):
    path, cell = tmp_path / "suite.json", ("--batch", "1", "--precision", "fp16")
    for change, measured in (({"commit": "1" * 40}, 1), ({"tree": "0" * 40}, 2)):
        ran(path, *cell)
        content = json.loads(path.read_text())
        content["cells"][0] |= change
        path.write_text(json.dumps(content))
        ran(path, *cell)
        assert len(tiny) == measured


def test_another_host_with_the_same_gpu_goes_on():
    content = {"tree": "t", "libraries": {}}
    content["environment"] = {"gpus": [{"name": "H100"}], "cpu": "a", "platform": "b", "torch": "2"}
    other = content | {"environment": content["environment"] | {"cpu": "c", "platform": "d"}}
    assert suite_file.identity(content) == suite_file.identity(other)


def test_a_cell_is_measured_again_beside_more_rivals_but_not_beside_fewer(tiny, tmp_path):
    path, cell = tmp_path / "suite.json", ("--batch", "1", "--precision", "fp16")
    ran(path, *cell, "--peers", "eager")
    ran(path, *cell, "--peers", "eager", "compile")
    ran(path, *cell, "--peers", "compile")
    assert len(tiny) == 2
    (record,) = json.loads(path.read_text())["cells"]
    assert record["peers"] == ["eager", "compile"]


def test_a_file_of_another_backend_is_moved_aside(tiny, tmp_path):
    path, cell = tmp_path / "suite.json", ("--batch", "1", "--precision", "fp16")
    ran(path, *cell)
    ran(path, *cell, "--backend", "eager")
    assert len(tiny) == 2
    assert json.loads(path.read_text())["backend"] == "eager"
    assert json.loads((tmp_path / "suite.old-1.json").read_text())["backend"] == "fastest"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--gpus", "99"), "--gpus 99: this process may use"),
        (("--backend", "eager", "--race-budget-s", "9"), "--backend eager is no race"),
        (("--race-budget-s", "0"), "name that as --backend"),
        (("--race-budget-s", "inf"), "'inf': name a number of seconds"),
        pytest.param(("--peers", "graph", "eager"), "--peers graph needs a GPU; here there are", marks=on_a_cpu),
    ],
)
def test_what_cannot_be_is_refused(tiny, tmp_path, capsys, arguments, said):
    with pytest.raises(SystemExit):
        ran(tmp_path / "suite.json", *arguments)
    assert said in " ".join(capsys.readouterr().err.split())


def test_gpus_of_two_kinds_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "ABB"[index])
    with pytest.raises(ValueError, match="--gpus 2: one file is of one kind of GPU, and these are A, B"):
        given(GPU, "--gpus", "2")


def test_each_backend_has_a_file_of_its_own():
    for name, expected in (("fastest", "suite.json"), ("fused", "suite-fused.json")):
        found = suite_arguments.parser("").parse_args(["--backend", name])
        suite_arguments.complete(found, torch.device("cpu"))
        assert found.json.name == expected


# --- several processes ---


def added(file, batch):
    file.add(Cell("tiny", "fp16", batch), made_up("tiny", "fp16", batch, own=1.0, eager=2.0), {"peers": []})


def test_two_who_add_to_one_file_lose_no_cell(tmp_path):
    path = tmp_path / "suite.json"
    one, other = suite_file.SuiteFile(path), suite_file.SuiteFile(path)
    with ThreadPoolExecutor(2) as threads:
        for ends in [threads.submit(added, file, batch) for batch in range(1, 5) for file in (one, other)]:
            ends.result()
    added(one, 9)
    added(other, 8)  # it has not seen 9
    content = json.loads(path.read_text())
    assert [cell["batch"] for cell in content["cells"]] == [1, 2, 3, 4, 8, 9]
    assert [row["batch"] for row in content["rows"]] == [1, 1, 2, 2, 3, 3, 4, 4, 8, 8, 9, 9]
    assert [file.name for file in tmp_path.iterdir()] == ["suite.json"]  # the locks are gone


def test_who_adds_waits_for_who_adds(tmp_path):
    path = tmp_path / "suite.json"
    with ThreadPoolExecutor(1) as threads:
        with suite_file.alone(tmp_path / ".suite.json.lock"):
            ends = threads.submit(added, suite_file.SuiteFile(path), 1)
            with pytest.raises(TimeoutError):
                ends.result(timeout=0.3)
            assert not path.exists()
        ends.result()
    assert path.exists()


def test_a_cell_that_another_process_measures_is_left_to_it(tiny, tmp_path, capsys):
    path = tmp_path / "suite.json"
    with suite_file.SuiteFile(path).claim(Cell("tiny", "fp16", 1)) as free:
        assert free
        ran(path, "--batch", "1,2", "--precision", "fp16")
    assert [cell.batch for cell in tiny] == [2]
    assert "Cells left: 1." in capsys.readouterr().out


def test_a_cell_that_another_process_has_just_added_is_not_measured(tiny, tmp_path, monkeypatch):
    path, wanted = tmp_path / "suite.json", suite.wanted

    def added_meanwhile(given, device):  # the file has been read by then
        rows = made_up("tiny", "fp16", 1, own=1.0, eager=2.0)
        suite_file.SuiteFile(path).add(Cell("tiny", "fp16", 1), rows, {"peers": given.peers})
        return wanted(given, device)

    monkeypatch.setattr(suite, "wanted", added_meanwhile)
    ran(path, "--batch", "1,2", "--precision", "fp16")
    assert [cell.batch for cell in tiny] == [2]


def test_every_process_has_a_gpu_and_cores_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-1a,6")
    tell = f"echo $CUDA_VISIBLE_DEVICES $(taskset -pc $$ | sed 's/.*: //') > {tmp_path}/$$"
    cores = sorted(os.sched_getaffinity(0))
    assert processes.on_each_gpu(2, os.system, tell) == [0, 0]
    told = dict(file.read_text().split() for file in tmp_path.iterdir())
    assert set(told) == {"5", "GPU-1a"}
    if len(cores) > 1:
        assert told["5"] != told["GPU-1a"]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5,GPU-1a,6"
    assert sorted(os.sched_getaffinity(0)) == cores
    assert processes.on_each_gpu(1, sys.exit, 3) == [3]


def test_the_processes_end_with_the_one_that_started_them():
    program = "import time; from benchmarks.processes import on_each_gpu; on_each_gpu(1, time.sleep, 60)"
    starter = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    started = Path(f"/proc/{starter.pid}/task/{starter.pid}/children")
    assert within_10_s(lambda: any(b"spawn_main" in command(child) for child in started.read_text().split()))
    (worker,) = (child for child in started.read_text().split() if b"spawn_main" in command(child))
    starter.kill()
    starter.wait()
    assert within_10_s(lambda: not command(worker))


def command(process):
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def within_10_s(condition):
    end = time.monotonic() + 10
    while time.monotonic() < end and not condition():
        time.sleep(0.02)
    return condition()


# --- a cell ---


CPU, GPU = torch.device("cpu"), torch.device("cuda")


def given(device, *arguments):
    found = suite_arguments.parser("").parse_args([*arguments, "--json", "unused.json"])
    suite_arguments.complete(found, device)
    return found


def test_a_cell_that_fails_is_a_row_with_its_reason(monkeypatch, tmp_path):
    def make():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried\nmore")

    monkeypatch.setattr(models, "MODELS", {"tiny": Model("tiny", make)})
    suite._module.cache_clear()
    path = tmp_path / "suite.json"
    assert ran(path, "--batch", "1,2", "--precision", "fp16") == 1
    content = json.loads(path.read_text())
    assert results_file.problems(content) == []
    assert [one["reason"] for one in content["rows"]] == [
        "the cell failed: OutOfMemoryError: CUDA out of memory. Tried"
    ] * 2
    assert "No cell has figures" in content["conclusion"][0]
    assert [cell["failed"] for cell in content["cells"]] == [True, True]


@pytest.fixture
def moody(tiny, monkeypatch):
    """The suite of `tiny`, in which the cells of these batches fail."""
    failing, measure = {2}, suite._measure

    def measured(cell, device, given):
        rows, record = measure(cell, device, given)
        if cell.batch in failing:
            rows = [row(cell.model, cell.precision, cell.batch, None, route="torchaccel", reason="the cell failed: no")]
        return rows, record | {"failed": cell.batch in failing, "wall_s": float(len(tiny))}

    monkeypatch.setattr(suite, "_measure", measured)
    return failing


def test_a_cell_that_failed_is_left_and_the_next_run_tries_it_once_more(moody, tiny, tmp_path, capsys):
    path, cells = tmp_path / "suite.json", ("--batch", "1,2,4", "--precision", "fp16")
    assert ran(path, *cells) == 1
    assert [cell.batch for cell in tiny] == [1, 2, 4]
    said = "Cells left: 1, of which failed: tiny, fp16, batch 2. Run the same command again to go on."
    assert said in capsys.readouterr().out
    assert ran(path, *cells) == 1
    assert [cell.batch for cell in tiny] == [1, 2, 4, 2]
    assert ran(path, *cells, "--limit-s", "0") == 1  # it was not tried again, and is as it was
    assert said in capsys.readouterr().out
    moody.clear()
    assert ran(path, *cells) == 0
    assert [cell.batch for cell in tiny] == [1, 2, 4, 2, 2]
    assert "Cells left: 0." in capsys.readouterr().out


def test_a_cell_that_another_process_has_just_failed_at_is_not_tried_in_this_run(moody, tiny, tmp_path, monkeypatch):
    path, wanted = tmp_path / "suite.json", suite.wanted

    def failed_meanwhile(given, device):
        rows = [row("tiny", "fp16", 1, None, route="torchaccel", reason="the cell failed: no")]
        suite_file.SuiteFile(path).add(Cell("tiny", "fp16", 1), rows, {"peers": given.peers, "failed": True})
        return wanted(given, device)

    with monkeypatch.context() as patch:
        patch.setattr(suite, "wanted", failed_meanwhile)
        assert ran(path, "--batch", "1", "--precision", "fp16") == 1
    assert tiny == []
    assert ran(path, "--batch", "1", "--precision", "fp16") == 0
    assert [cell.batch for cell in tiny] == [1]


def test_a_folder_that_cannot_be_written_in_is_refused_before_anything_is_measured(tiny, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as caught:
        ran(tmp_path / "file" / "suite.json")
    assert (caught.value.code, tiny) == (2, [])
    assert "name another file with --json" in " ".join(capsys.readouterr().err.split())


def test_max_autotune_is_for_two_batches_unless_told_otherwise(monkeypatch):
    plans = []
    monkeypatch.setattr(suite, "carry_out", lambda plan, *_: plans.append(plan) or 1 / 0)
    monkeypatch.setattr(suite, "_module", lambda *_: None)
    for batch in (1, 8):
        suite._measure(Cell("resnet18", "fp16", batch), CPU, given(CPU))
    suite._measure(Cell("bert_base", "fp16", 8), GPU, given(GPU, "--compile-modes", "max-autotune"))
    modes = [plan.compile_modes for plan in plans]
    assert modes == [("reduce-overhead", "max-autotune"), ("reduce-overhead",), ("max-autotune",)]
    assert (plans[2].shape, plans[2].vocabulary) == ((128,), 30522)
    assert plans[2].peers == tuple(peers.NAMES)
    assert plans[0].peers == ("eager", "compile")
    assert (plans[0].backend, plans[0].race_budget_s, plans[0].alike) == ("fastest", None, True)
    assert (plans[1].model, plans[1].precisions, plans[1].batches) == ("resnet18", ("fp16",), (8,))
    suite._measure(Cell("resnet18", "fp16", 1), GPU, given(GPU, "--peers", "graph", "--race-budget-s", "9"))
    assert (plans[3].peers, plans[3].race_budget_s) == (("graph",), 9.0)


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


# --- the twins ---


@torch.no_grad()
def test_the_functional_resnets_compute_what_torchvision_computes():
    from torchvision.models.resnet import Bottleneck, ResNet

    deep = models.look_trained(ResNet(Bottleneck, [2, 1, 1, 1]), size=32)
    pairs = [(deep, FunctionalResNet(deep.state_dict()))]
    pairs += [(models.named_model("resnet18").module(), models.named_model("resnet18_functional").module())]
    for module, twin in pairs:
        images = torch.randn(2, 3, 32, 32)
        assert torch.allclose(twin(images), module(images), rtol=1e-4, atol=1e-5)
        assert not any(isinstance(child, nn.Conv2d | nn.BatchNorm2d) for child in twin.modules())


@torch.no_grad()
def test_the_functional_vit_computes_what_torchvision_computes():
    from torchvision.models.vision_transformer import VisionTransformer

    sizes = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 4, "hidden_dim": 48, "mlp_dim": 96}
    module = models.look_trained(VisionTransformer(**sizes))
    images = torch.randn(3, 3, 32, 32)
    twin = FunctionalViT(module.state_dict(), heads=4)
    assert torch.allclose(twin(images), module(images), rtol=1e-4, atol=1e-5)


def test_the_twins_are_measured_where_they_are_named_and_only_there():
    names = {"resnet18_functional", "resnet50_functional", "vit_b_16_functional"}
    assert set(models.TWINS) == names
    cells = suite_arguments.wanted(given(GPU), GPU)
    assert len(cells) == 8 * 2 * 4
    assert not names & {cell.model for cell in cells}
    named = suite_arguments.wanted(given(GPU, "--model", "resnet18,resnet18_functional", "--batch", "1"), GPU)
    assert {cell.model for cell in named} == {"resnet18", "resnet18_functional"}


# --- the arithmetic ---


@pytest.mark.parametrize("module", [models, processes, suite_table, suite_file])
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
        *made_up("resnet18", "fp16", 1, own=1.0, eager=2.0, graph=8.0),
        *made_up("resnet18", "fp16", 8, own=1.0, eager=0.5),
        *made_up("resnet50", "fp16", 1, own=1.0, eager=4.0, winner="eager"),
        *made_up("swin_t", "fp16", 1, own=1.0, eager=0.99),  # within noise
        *made_up("d", "fp16", 1, own=None, eager=9.0),
    ]
    assert conclusion(rows) == [
        "fastest is not slower than the best rival, beyond noise, in 3 of 4 cells compared.",
        "It is slower in: resnet18 fp16 batch 8.",
        "Not compared, for want of a figure: d fp16 batch 1.",
        f"Best rival over fastest, geometric mean over no more than 3 of 40 cells of {CONVOLUTIONAL}: 1.587.",  # ∛4
        "Races won: inductor 3, eager 1.",
        "Rivals: eager, graph; not all of them in: "
        "resnet18 fp16 batch 8; resnet50 fp16 batch 1; swin_t fp16 batch 1; d fp16 batch 1.",
    ]


def test_the_mean_is_over_the_convolutional_models_at_the_suite_s_own_batches_and_over_nothing_else():
    others = made_up("resnet18_functional", "fp16", 1, own=1.0, eager=9.0)
    others += made_up("resnet18", "fp16", 3, own=1.0, eager=9.0) + made_up("bert_base", "fp16", 1, own=1.0, eager=9.0)
    cells = itertools.product(models.CONVOLUTIONAL, models.PRECISIONS, models.BATCHES)
    every = [line for cell in cells for line in made_up(*cell, own=1.0, eager=2.0)]
    said = f"Best rival over fastest, geometric mean over 40 cells of {CONVOLUTIONAL}: 2.000."
    assert said in conclusion([*every, *others])
    assert f"No cell of {CONVOLUTIONAL} was compared: there is no geometric mean." in conclusion(others)


def test_a_named_backend_has_its_name_and_its_replays_in_what_is_said():
    rows = made_up("a", "fp16", 1, own=1.0, winner=None, eager=2.0)
    rows[0] |= {"backend": "fused", "replay_median_ms": 0.1234}
    assert conclusion(rows) == [
        "fused is not slower than the best rival, beyond noise, in 1 of 1 cells compared.",
        f"No cell of {CONVOLUTIONAL} was compared: there is no geometric mean.",
        "Median of a replay of fused's graph, ms: a fp16 batch 1 0.123.",
        "Rivals: eager.",
    ]
    console = Console(width=160, file=io.StringIO())
    console.print(tables(rows))
    text = " ".join(console.file.getvalue().split())
    assert "the best rival's call over fused's" in text
    assert "fastest" not in text
    assert "race won by" not in text


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
