"""The recipe that validates through an engine, run for real on the CPU; a stale engine must not pass its check."""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torchaccel
from tests.helpers import on_cpu
from torchaccel.report import Report

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

from recipes import train_with_eval
from recipes.train_with_eval import Epoch, Outcome, ResNet

ROOT = Path(__file__).resolve().parents[1]
EAGER = ("--device", "cpu", "--backend", "eager")


def run(folder, *arguments):
    """The recipe in a process of its own; its file of figures is figures.json in `folder`."""
    command = (sys.executable, "-m", "recipes.train_with_eval", "--json", "figures.json", *arguments)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def eager(tmp_path_factory):
    """What three epochs with the eager backend print, and their figures."""
    folder = tmp_path_factory.mktemp("eager")
    done = run(folder, *EAGER, "--epochs", "3")
    assert done.returncode == 0, done.stderr
    return done, json.loads((folder / "figures.json").read_text())


def refusal(*arguments):
    """What the recipe exits with."""
    with pytest.raises(SystemExit) as stopped:
        train_with_eval.main([*map(str, arguments)])
    assert isinstance(stopped.value.code, str)
    return stopped.value.code


# --- what it shows ---


def test_accuracy_rises_and_is_the_same_by_the_engine_at_every_epoch(eager):
    _, figures = eager
    epochs = figures["epochs"]
    assert [epoch["number"] for epoch in epochs] == [1, 2, 3]
    assert all(epoch["accuracy_module"] == epoch["accuracy_engine"] for epoch in epochs)
    assert epochs[-1]["accuracy_engine"] > 0.93
    assert epochs[-1]["loss"] < epochs[0]["loss"] / 3
    assert all(epoch["images"] == 450 for epoch in epochs)
    assert figures["problems"] == []


def test_engines_served_every_validation_batch_and_were_refreshed_once_an_epoch(eager):
    _, figures = eager
    report = figures["report"]
    assert (report["calls_by_engine"], report["builds"], report["refreshes"]) == (12, 1, 3)
    assert [epoch["batches"] for epoch in figures["epochs"]] == [4, 4, 4]
    assert report["calls_by_module"] == 3 * 22, "the training batches, and no validation batch"
    assert {runner["signature"] for runner in report["runners"]} >= {"float32[128, 1, 8, 8]", "float32[66, 1, 8, 8]"}


def test_the_table_has_a_row_for_each_epoch_and_the_summary_adds_up(eager):
    done, figures = eager
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines() if "│" in line]
    assert [row[0] for row in rows] == ["1", "2", "3"]
    for row, epoch in zip(rows, figures["epochs"], strict=True):
        shown = dict(zip(train_with_eval.COLUMNS, row, strict=True))
        assert shown["module"] == shown["engine"] == f"{epoch['accuracy_engine']:.4f}"
        assert shown["refresh ms"] == f"{epoch['refresh_ms']:.1f}"
        assert 0 < epoch["refresh_ms"] <= epoch["eval_ms"]
    assert "\neager, fp32, cpu: 12 of 12 validation batches by an engine; builds: 1, refreshes: 3\n" in done.stdout
    engine_ms = sum(epoch["eval_ms"] + epoch["engine_ms"] for epoch in figures["epochs"])
    saved_ms = sum(epoch["module_ms"] for epoch in figures["epochs"]) - engine_ms - figures["build_ms"]
    assert figures["saved_ms"] == pytest.approx(saved_ms)
    said = re.search(r"in all the engine (saved|cost) (\d+) ms", done.stdout)
    assert said[1] == ("saved" if saved_ms > 0 else "cost")
    assert int(said[2]) == pytest.approx(abs(saved_ms), abs=1)


def test_without_options_it_says_once_what_serves_in_the_place_of_tensorrt(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")  # what serves is then PyTorch's own kernels, without a compilation
    done = run(tmp_path, "--epochs", "1")
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["report"]["backend_asked"] == "auto"
    assert figures["report"]["precision"] == ("fp16" if torch.cuda.is_available() else "fp32")
    assert figures["report"]["calls_by_engine"] == 4
    if not torch.cuda.is_available():
        assert done.stderr.count("BackendWarning: backend='auto' serves through ") == 1


def test_the_digits_are_split_by_the_seed_with_as_many_of_each():
    digits, again, other = (train_with_eval.load_digits(seed) for seed in (1, 1, 2))
    assert all(torch.equal(*pair) for pair in zip(vars(digits).values(), vars(again).values(), strict=True))
    assert not torch.equal(digits.validation_images, other.validation_images)
    assert digits.training_images.shape == (1347, 1, 8, 8)
    assert digits.validation_images.shape == (450, 1, 8, 8)
    assert 0 == digits.training_images.min() < digits.training_images.max() == 1
    assert 40 < digits.validation_labels.bincount().min() <= digits.validation_labels.bincount().max() < 50


# --- what it must not let pass ---


def test_stale_weights_are_found_and_told(monkeypatch, tmp_path, capsys):
    stale = functools.partial(torchaccel.compile, on_weight_change="ignore")
    monkeypatch.setattr(torchaccel, "compile", stale)
    path = tmp_path / "figures.json"
    message = refusal(*EAGER, "--epochs", "1", "--json", path)
    found = re.search(
        r"epoch 1: the accuracy is (0\.\d+) by the module and (0\.\d+) by the engine; (\d+) of 450", message
    )
    assert float(found[1]) > 0.5 > float(found[2]), "the engine still has the weights of before the training"
    assert int(found[3]) > 200
    assert "the engine was refreshed 0 times in 1 epochs" in message
    assert json.loads(path.read_text())["problems"] == message.splitlines()
    assert "in all the engine" in capsys.readouterr().out


def test_a_stale_engine_of_a_trained_network_differs_in_what_it_predicts():
    torch.manual_seed(0)
    digits = train_with_eval.load_digits(0)
    model = on_cpu(
        ResNet(), inputs=digits.validation_images[:128], on_weight_change="ignore", dynamic_batch=(1, 128, 128)
    )
    model.train()
    train_with_eval.train_epoch(model, torch.optim.AdamW(model.parameters(), lr=3e-3), digits)
    stale = train_with_eval.validate(model, digits, 1, loss=1.0)
    assert stale.accuracy_engine != stale.accuracy_module
    model.refresh()
    fresh = train_with_eval.validate(model, digits, 2, loss=1.0)
    assert fresh.accuracy_engine == fresh.accuracy_module == stale.accuracy_module
    assert fresh.predictions_differ == 0


def made_epoch(**fields):
    same = {"accuracy_module": 0.9, "accuracy_engine": 0.9, "predictions_differ": 0}
    times = {"module_ms": 100.0, "eval_ms": 5.0, "engine_ms": 15.0, "refresh_ms": 4.0}
    return Epoch(**{"number": 1, "loss": 0.5, "images": 10, "batches": 2} | same | times | fields)


def made_outcome(*epochs, build_ms=100.0, **counts):
    served = {"calls_by_engine": 2 * len(epochs), "builds": 1, "refreshes": len(epochs)}
    return Outcome(epochs, build_ms, Report("ResNet", "fp16", "cuda:0", "auto", "eager", **served | counts))


def test_only_an_equal_accuracy_passes():
    assert made_outcome(made_epoch(predictions_differ=2)).problems() == [], "two that cancel out"
    (problem,) = made_outcome(made_epoch(), made_epoch(number=2, accuracy_engine=0.8, predictions_differ=1)).problems()
    assert problem.startswith("epoch 2: the accuracy is 0.9000 by the module and 0.8000 by the engine; 1 of 10 ")
    assert "--precision fp32" in problem


def test_a_batch_that_no_engine_served_and_a_refresh_left_out_do_not_pass():
    assert made_outcome(made_epoch(), calls_by_engine=1).problems() == ["engines served 1 of 2 validation batches."]
    (problem,) = made_outcome(made_epoch(), made_epoch(number=2), refreshes=1).problems()
    assert problem == "the engine was refreshed 1 times in 2 epochs."


def test_it_says_saved_only_where_the_build_and_the_refreshes_are_paid_for():
    saved = made_outcome(made_epoch(), made_epoch())
    assert saved.saved_ms == 200 - 40 - 100
    assert "in all the engine saved 60 ms" in saved.summary()
    paid_later = made_outcome(made_epoch(), build_ms=400.0)
    assert paid_later.saved_ms == 100 - 20 - 400
    assert paid_later.summary().endswith(
        "in all the engine cost 320 ms\nit gains 80.0 ms an epoch: 5 epochs pay for its build"
    )
    never = made_outcome(made_epoch(eval_ms=90.0))
    assert "in all the engine cost 105 ms\nnot even without its build is it faster" in never.summary()


# --- what is refused ---


def test_without_scikit_learn_it_names_the_command(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert refusal(*EAGER).endswith("pip install scikit-learn")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--precision", "fp8"), "precision='fp8': allowed are 'fp32', 'tf32', 'fp16', 'bf16'"),
        (("--precision", "tf32"), "TF32 is a format of NVIDIA GPUs"),
        (("--backend", "tensorflow"), "backend='tensorflow': allowed are 'auto', "),
        (("--device", "tpu"), "device='tpu': allowed are None, 'cpu', 'cuda' and 'cuda:N'"),
        (("--device", "cuda:99"), "device='cuda:99': this machine has "),
    ],
)
def test_what_cannot_be_compiled_is_answered_with_what_can(arguments, message):
    assert message in refusal(*EAGER, *arguments)


@pytest.mark.parametrize("count", ["0", "-1", "2.5", "many"])
def test_a_number_of_epochs_is_at_least_1(count, capsys):
    with pytest.raises(SystemExit) as stopped:
        train_with_eval.main(["--epochs", count])
    assert stopped.value.code == 2
    assert f"{count!r}: allowed is a whole number of at least 1" in capsys.readouterr().err


def test_no_place_for_the_figures_is_noticed_before_the_work(monkeypatch, tmp_path):
    monkeypatch.setattr(train_with_eval, "train", lambda *_: pytest.fail("it trained"))
    assert refusal(*EAGER, "--json", tmp_path).startswith(f"--json {tmp_path} is a folder: name a file in it")
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "figures.json"
    assert refusal(*EAGER, "--json", path).startswith(f"could not write {path}: ")
