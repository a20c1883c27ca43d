"""The benchmarks: figures into conclusions, tables and files, and one run from end to end."""

import doctest
import io
import json
import math
import subprocess
import sys
import time
from http.client import IncompleteRead
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from benchmarks import candidates, first_result, peers, resnet18, results_file, run, table
from benchmarks.candidates import TIMES, Candidate, check, relate, row
from benchmarks.table import conclusion, number, tables
from torchaccel.figures import Comparison, Timing

ROOT = Path(__file__).resolve().parents[1]
# Those in git: what anyone measures here, perhaps of code that is not committed yet, is beside them.
_TRACKED = ("git", "-C", str(ROOT), "ls-files", "benchmarks/results/*.json")
RESULT_FILES = [
    ROOT / name for name in subprocess.run(_TRACKED, capture_output=True, text=True, check=False).stdout.split()
]


def candidate(precision, batch, ms, route="torchaccel", backend="torch_tensorrt", **others):
    made = Candidate(route, backend, precision, batch, call=lambda: None, relative_error=4e-4, **others)
    return made, ms


def refused(precision, batch, reason):
    return Candidate("torchaccel", "torch_tensorrt", precision, batch, reason=reason), None


def measured(*pairs, replay_ms=0.1):
    """The candidates' rows, as if each call had taken its milliseconds, give or take 0.1 % by round."""
    ones = [one for one, _ in pairs]
    times = {one.name: ms for one, ms in pairs if ms is not None}
    times |= {f"{one.name} replay": replay_ms for one, _ in pairs if one.replay is not None}
    rounds = {
        name: tuple(ms * (1 + 0.001 * math.sin(7 * index + phase)) for index in range(100))
        for phase, (name, ms) in enumerate(times.items())
    }
    timed = Comparison({name: Timing(samples) for name, samples in rounds.items()}, rounds)
    rows = [row(one, timed, model="resnet18", h2d_ms=None, d2h_ms=None) for one in ones]
    relate(ones, rows, timed)
    return rows


def shown(rows, width=80, notes=()):
    console = Console(file=io.StringIO(), width=width)
    console.print(tables(rows, list(notes)))
    return console.file.getvalue()


@pytest.mark.parametrize("module", [candidates, first_result, results_file, run, table])
def test_the_examples_of_the_docstrings_run(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


# --- the conclusion ---


def test_the_conclusion_has_the_gains_of_the_figures():
    rows = measured(
        candidate("fp32", 1, 1.0), candidate("fp32", 32, 8.0), candidate("fp16", 1, 0.25), candidate("fp16", 32, 1.0)
    )
    lines = conclusion(rows)
    assert len(lines) == 4
    assert lines[0].startswith("fp16 at batch 1 is 4.00 times as fast (95 % interval ")
    assert lines[0].endswith(" as FP32 (torch_tensorrt fp32).")
    assert lines[1].startswith("fp16 at batch 32 is 8.00 times as fast")
    assert lines[2].startswith("fp32: batch 32 instead of 1 gives 4.00 times the FPS")
    assert lines[3].startswith("fp16: batch 32 instead of 1 gives 8.00 times the FPS")
    assert lines[3].endswith(" FPS.")
    assert rows[3]["throughput_fps"] == pytest.approx(32_000, rel=1e-2)
    assert rows[2]["gain"]["low"] <= 4 <= rows[2]["gain"]["high"]
    assert rows[3]["batching"]["over_batch"] == 1
    assert rows[0]["gain"]["value"] == 1


def test_the_conclusion_says_where_fp16_is_slower():
    lines = conclusion(measured(candidate("fp32", 1, 1.0), candidate("fp16", 1, 1.25)))
    assert lines[0].startswith("fp16 at batch 1 is slower, at 0.80 times the speed (95 % interval ")
    assert not any("as fast" in line for line in lines)


def test_the_conclusion_says_where_no_difference_is_measurable():
    rows = measured(candidate("fp32", 1, 1.0), candidate("fp16", 1, 1.0))
    assert conclusion(rows)[0].startswith("fp16 at batch 1 is not measurably faster or slower (1.00 times the speed, ")


def test_strict_fp32_pytorch_is_the_baseline_where_fp32_is_refused():
    reason = "TensorRT-RTX computes fp32 in TF32"
    strict = candidate("fp32", 1, 3.0, route="baseline", backend="eager")
    rows = measured(refused("fp32", 1, reason), strict, candidate("fp16", 1, 0.5))
    lines = conclusion(rows)
    assert lines[0].startswith("fp16 at batch 1 is 6.00 times as fast")
    assert lines[0].endswith("as FP32 (eager fp32).")
    text = shown(rows, width=100)
    assert "torch_tensorrt: not run" in text
    assert "eager (the module)" in text
    assert reason in " ".join(text.split())
    assert [one["median_ms"] is None for one in rows] == [True, False, False]


def test_without_fp32_there_is_no_gain_and_the_conclusion_says_so():
    rows = measured(candidate("fp16", 1, 0.5))
    assert rows[0]["gain"] is None
    assert conclusion(rows) == ["fp16 at batch 1 takes 0.500 ms; there is no FP32 row to compare it with."]


def test_a_peer_in_fp32_is_no_baseline():
    rows = measured(candidate("fp32", 1, 3.0, route="peer", backend="eager"), candidate("fp16", 1, 0.5))
    assert rows[1]["gain"] is None


def test_a_single_fp32_row_still_concludes_with_its_figure():
    assert conclusion(measured(candidate("fp32", 1, 2.0)))[0].startswith("fp32 at batch 1 (torch_tensorrt) takes 2 ms")


def test_nothing_measured_is_said():
    rows = measured(refused("fp16", 1, "no"), candidate("fp32", 1, 1.0, route="peer", backend="eager"))
    assert conclusion(rows) == ["Nothing could be measured: see the reasons above."]


@pytest.mark.parametrize(
    ("peer_ms", "said"), [(1.0, "is 2.00 times as fast"), (0.4, "is slower, at 0.80 times the sp")]
)
def test_the_fastest_peer_is_compared_with_honestly(peer_ms, said):
    rows = measured(
        candidate("fp32", 1, 2.0),
        candidate("fp16", 1, 0.5),
        candidate("fp16", 1, peer_ms, route="peer", backend="torch.compile"),
        candidate("fp16", 1, 9.0, route="peer", backend="eager"),
    )
    (line,) = (line for line in conclusion(rows) if "peer" in line)
    assert line.startswith("fp16 at batch 1 (torch_tensorrt) " + said)
    assert line.endswith("the fastest peer, torch.compile.")
    assert rows[2]["versus"]["of"] == "torch_tensorrt"


def test_the_fastest_peer_is_that_of_the_same_batch():
    rows = measured(
        candidate("fp16", 1, 0.5),
        candidate("fp16", 32, 5.0),
        candidate("fp16", 1, 1.0, route="peer", backend="torch.compile"),
        candidate("fp16", 32, 20.0, route="peer", backend="eager"),
    )
    one, other = (line for line in conclusion(rows) if "peer" in line)
    assert one.startswith("fp16 at batch 1 (torch_tensorrt) is 2.00 times as fast")
    assert one.endswith("torch.compile.")
    assert other.startswith("fp16 at batch 32 (torch_tensorrt) is 4.00 times as fast")
    assert other.endswith("eager.")


def test_an_interval_that_begins_or_ends_at_one_is_no_difference():
    for low, high in ((1.0, 1.1), (0.9, 1.0)):
        said = table._speed({"value": 1.0, "low": low, "high": high})
        assert said.startswith("not measurably faster or slower (1.00 times the speed, ")
    assert table._speed({"value": 0.95, "low": 0.94, "high": 0.96}).startswith("slower, at 0.95 times the speed")


def test_a_ratio_of_one_round_is_told_without_an_interval():
    one, ms = candidate("fp32", 1, 1.0)
    two, _ = candidate("fp16", 1, 0.5)
    times = {one.name: (ms,), two.name: (0.5,)}
    timed = Comparison({name: Timing(samples) for name, samples in times.items()}, times)
    rows = [row(each, timed, model="resnet18") for each in (one, two)]
    relate([one, two], rows, timed)
    assert conclusion(rows)[0] == "fp16 at batch 1 is 2.00 times as fast (one round: no interval) as FP32 ({}).".format(
        "torch_tensorrt fp32"
    )


# --- the table ---


def test_the_table_fits_80_columns_with_every_figure_whole():
    rows = measured(
        candidate("fp32", 1, 123.456, backend="inductor"),
        candidate("fp32", 32, 13716.4, backend="inductor"),
        candidate("fp16", 1, 0.21534),
        candidate("fp16", 32, 0.51234),
        candidate("fp16", 32, 0.6, route="peer", backend="eager in a CUDA graph"),
    )
    for one in rows:
        one |= {"h2d_ms": 0.43215, "d2h_ms": 0.011234}
    text = shown(rows, notes=["a note of the measurement"])
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    line = next(line for line in text.splitlines() if line.startswith("fp16      32"))
    figures = line.split()
    expected = rows[3]
    assert figures[:2] == ["fp16", "32"]
    assert figures[2:4] == [number(expected["mean_ms"]), number(expected["throughput_fps"])]
    assert figures[4] == f"{expected['gain']['value']:.2f}x"
    assert figures[5:7] == [number(expected["median_ms"]), number(expected["p95_ms"])]
    assert figures[7:] == ["4e-04", "0.432", "0.011", "torch_tensorrt"]
    assert "13" in text
    assert "Peers" in text
    assert "- a note of the measurement" in text


def test_a_note_is_told_once():
    rows = measured(
        candidate("fp32", 1, 1.0, notes=["served by eager"]), candidate("fp16", 1, 1.0, notes=["served by eager"])
    )
    assert shown(rows).count("served by eager") == 1


# --- result files ---


def document(rows=None):
    rows = rows or measured(candidate("fp32", 1, 1.0), refused("fp16", 1, "no"))
    return results_file.document("resnet18", rows, settings={}, warnings=[])


def test_rows_follow_the_schema():
    content = document()
    assert results_file.problems(content) == []
    assert content["schema"] == 1
    assert content["environment"]["torch"] == torch.__version__
    assert {*results_file.FIELDS, *results_file.FIGURES, *TIMES} <= set(content["rows"][0])


def broken(change):
    content = json.loads(json.dumps(document()))
    change(content)
    return results_file.problems(content)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda content: content.update(schema=2), "schema is 2, not 1"),
        (lambda content: content.pop("environment"), "environment is missing"),
        (lambda content: content.update(tree="abc"), "tree is 'abc', not a git tree hash"),
        (lambda content: content.update(rows=[]), "rows is missing or empty"),
        (lambda content: content["rows"][0].pop("layout"), "row 0: layout is missing"),
        (lambda content: content["rows"][0].update(batch="1"), "row 0: batch is '1'"),
        (
            lambda content: content["rows"][0].update(route="other"),
            "row 0: route is 'other', none of torchaccel, baseline, peer",
        ),
        (lambda content: content["rows"][0].update(median_ms=None), "row 0: median_ms is None"),
        (lambda content: content["rows"][0].update(median_ms=float("nan")), "row 0: median_ms is nan"),
        (lambda content: content["rows"][0].update(relative_error=None), "row 0: relative_error is None"),
        (
            lambda content: content["rows"][0].update(samples=99),
            "row 0: p99_ms stands on 99 samples, which is under 100",
        ),
        (
            lambda content: content["rows"][0].update(samples=19, p99_ms=None),
            "row 0: p95_ms stands on 19 samples, which is under 20",
        ),
        (lambda content: content["rows"][0].update(median_ms=-1.0), "row 0: median_ms is -1.0"),
        (lambda content: content["rows"][0].pop("p99_ms"), "row 0: p99_ms is missing"),
        (lambda content: content["rows"][1].update(median_ms=1.0), "row 1: median_ms is set beside a reason"),
    ],
)
def test_what_is_wrong_with_a_result_file_is_named(change, problem):
    assert broken(change) == [problem]


def test_a_result_file_is_written_whole(tmp_path):
    path = tmp_path / "some" / "gpu" / "resnet18.json"
    content = document()
    results_file.write(path, content)
    assert json.loads(path.read_text()) == json.loads(json.dumps(content))
    assert [one.name for one in path.parent.iterdir()] == ["resnet18.json"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "resnet18.json"
    path.write_text("old")
    with pytest.raises(ValueError, match="schema is 7"):
        results_file.write(path, document() | {"schema": 7})
    with pytest.raises(TypeError):
        results_file.write(path, document() | {"settings": object()})
    with pytest.raises(ValueError, match="not JSON compliant"):
        results_file.write(path, document() | {"settings": {"ms": math.nan}})
    monkeypatch.setattr(results_file.os, "replace", lambda source, target: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        results_file.write(path, document())
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_default_path_is_named_after_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert results_file.default_path("resnet18") == ROOT / "benchmarks/results/cpu/resnet18.json"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA RTX 6000 Ada")
    assert results_file.default_path("suite").parts[-2:] == ("nvidia-rtx-6000-ada", "suite.json")


def test_trees_of_the_history_are_those_that_git_names(tmp_path):
    def git(*command):
        return subprocess.run(
            ("git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c", *command),
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()

    git("init", "-q")
    package = tmp_path / "torchaccel"
    package.mkdir()
    trees = []
    for text in ("one", "two"):
        (package / "a.py").write_text(text)
        git("add", ".")
        git("commit", "-q", "-m", text)
        trees.append(git("rev-parse", "HEAD:torchaccel"))
    (tmp_path / "elsewhere").write_text("three")
    git("add", ".")
    git("commit", "-q", "-m", "three")
    found = results_file.commits_by_tree(tmp_path)
    assert list(found) == trees[::-1]
    assert found[trees[1]] == git("rev-parse", "HEAD~1")
    assert results_file.commits_by_tree(tmp_path / "torchaccel" / "nowhere") == {}


@pytest.mark.skipif(not RESULT_FILES, reason="no result file is committed yet")
def test_committed_result_files_follow_the_schema():
    for path in RESULT_FILES:
        assert results_file.problems(json.loads(path.read_text())) == [], path


@pytest.mark.skipif(not RESULT_FILES, reason="no result file is committed yet")
def test_committed_result_files_measured_code_of_this_history():
    trees = results_file.commits_by_tree(ROOT)
    if not trees:
        pytest.skip("this is no git checkout with torchaccel/ in its history")
    if (ROOT / ".git" / "shallow").exists():
        pytest.skip("the checkout is shallow: its history is cut off")
    for path in RESULT_FILES:
        assert json.loads(path.read_text())["tree"] in trees, path


# --- the command ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--precision fp64", "argument --precision: 'fp64' is none of fp32, tf32, fp16, bf16"),
        ("--precision fp32,fp8", "argument --precision: 'fp8' is none of fp32, tf32, fp16, bf16"),
        ("--batch 0", "argument --batch: '0' is not a whole number of at least 1"),
        ("--batch 1,x", "argument --batch: 'x' is not a whole number of at least 1"),
        ("--runs -3", "argument --runs: "),
        ("--backend magic", "argument --backend: invalid choice: 'magic'"),
        ("--peers nobody", "argument --peers: invalid choice: 'nobody'"),
        ("--weights no/such/file.pt", "no such file; allowed are none (random, seeded), default (torchvision's) and"),
        ("--batch 1 --dynamic-batch", "--dynamic-batch needs a batch of at least 2 among --batch"),
    ],
)
def test_wrong_arguments_are_named_with_what_is_allowed(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        resnet18.main(arguments.split())
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_result_file_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(resnet18, "run", lambda *_: pytest.fail("it was measured"))
    (tmp_path / "file").touch()
    for path, message in ((tmp_path, "is a folder: name a file in it"), (tmp_path / "file" / "x.json", "cannot write")):
        with pytest.raises(SystemExit) as caught:
            resnet18.main(["--json", str(path)])
        assert caught.value.code == 2
        assert message in capsys.readouterr().err
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_a_folder_in_which_nothing_can_be_written_is_named(tmp_path, monkeypatch):
    def refused(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(results_file.tempfile, "TemporaryFile", refused)
    with pytest.raises(ValueError, match=r"cannot write in .*\(Permission denied\): name another file with --json"):
        results_file.require_writable(tmp_path / "resnet18.json")


def test_a_file_that_is_no_state_dict_of_the_model_is_named(tmp_path, capsys):
    for name, content in (("tensor.pt", torch.ones(3)), ("other.pt", torch.nn.Linear(2, 2).state_dict())):
        torch.save(content, tmp_path / name)
        with pytest.raises(SystemExit):
            resnet18.main(["--weights", str(tmp_path / name)])
        assert "is no state_dict of torchvision's ResNet-18" in capsys.readouterr().err
    (tmp_path / "text.pt").write_text("text")
    with pytest.raises(SystemExit):
        resnet18.main(["--weights", str(tmp_path / "text.pt")])
    assert "is no state_dict of torchvision's ResNet-18" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [OSError("no route to host"), IncompleteRead(b""), RuntimeError("invalid hash value")], ids=repr
)
def test_weights_that_cannot_be_downloaded_name_the_way_out(error, monkeypatch, capsys):
    import torchvision.models

    def offline(weights=None):
        raise error

    monkeypatch.setattr(torchvision.models, "resnet18", offline)
    with pytest.raises(SystemExit):
        resnet18.main(["--weights", "default"])
    assert "use --weights none" in capsys.readouterr().err


def test_weights_from_a_file_are_the_ones_that_run(tmp_path):
    saved = resnet18._module("none")
    with torch.no_grad():
        saved.fc.bias += 1
    torch.save(saved.state_dict(), tmp_path / "mine.pt")
    assert torch.equal(resnet18._module(str(tmp_path / "mine.pt")).fc.bias, saved.fc.bias)
    again = resnet18._module("none")
    assert torch.equal(again.fc.weight, saved.fc.weight)  # seeded


def planned(*arguments):
    return resnet18._plan(resnet18._parser().parse_args(arguments))


def test_defaults_and_lists(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plan = planned()
    assert (plan.device.type, plan.precisions, plan.batches, plan.runs) == ("cpu", ("fp32", "bf16"), (1, 32), 100)
    assert (plan.peers, plan.dynamic_batch, plan.weights, plan.backend) == ((), None, "none", "auto")
    plan = planned("--precision", "bf16,fp32", "--precision", "bf16", "--batch", "8", "--batch=2,8", "--dynamic-batch")
    assert (plan.precisions, plan.batches, plan.dynamic_batch) == (("bf16", "fp32"), (8, 2), (2, 8, 8))
    assert planned("--peers").peers == ("eager", "compile")
    assert planned("--peers", "eager").peers == ("eager",)
    with pytest.raises(ValueError, match="--peers torch_tensorrt needs a GPU; here there are eager, compile"):
        planned("--peers", "torch_tensorrt")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    plan = planned("--peers")
    assert (plan.device.type, plan.precisions) == ("cuda", ("fp32", "tf32", "fp16"))
    assert plan.peers == ("eager", "graph", "compile", "torch_tensorrt")


def test_samples_fit_the_budget():
    assert run.affordable({"a": 10.0, "b": 20.0}, 100, 1e6) == {"a": 100, "b": 100}
    assert run.affordable({"slow": 8000.0, "quick": 40.0, "middle": 1000.0}, 100, 40_000) == {
        "quick": 100,
        "middle": 18,
        "slow": 2,
    }
    assert run.affordable({"slow": 8000.0, "quick": 40.0}, 100, 0) == {"quick": 1, "slow": 1}


def test_the_error_is_that_of_each_candidate_against_its_reference():
    right, wrong = Candidate("torchaccel", "a", "fp32", 1), Candidate("torchaccel", "b", "fp16", 1)
    right.call, wrong.call = lambda: torch.tensor([3.0, 4.0]), lambda: torch.tensor([3.0, 4.5], dtype=torch.float16)
    check([right, wrong], {1: torch.tensor([3.0, 4.0])})
    assert (right.relative_error, wrong.relative_error) == (0, 0.1)
    assert right.first_ms > 0


def test_a_peer_that_fails_is_a_row_with_its_reason(monkeypatch):
    def fails(module, images, stay):
        raise RuntimeError("out of patience\nand more")

    def works(module, images, stay):
        return lambda: module(images), None

    module, images = torch.nn.Conv2d(3, 2, 1).eval(), torch.randn(1, 3, 8, 8)
    monkeypatch.setattr(peers, "_variants", lambda peer, inputs, modes: [("one", fails)])
    failed = peers.build("eager", module, "fp32", images, None)
    assert failed.call is None
    assert failed.reason == "one: RuntimeError: out of patience"
    monkeypatch.setattr(peers, "_variants", lambda peer, inputs, modes: [("one", fails), ("two, channels-last", works)])
    with torch.no_grad():
        half = peers.build("eager", module, "bf16", images, None)
        assert half.call().dtype is torch.bfloat16
    assert (half.variant, half.layout, half.input_dtype) == ("two, channels-last", "channels_last", "bfloat16")
    assert half.reason is None
    assert "one: RuntimeError" in half.notes[0]
    refused_row = peers.build("eager", module, "tf32", images, None)
    assert refused_row.call is None
    assert "TF32" in refused_row.reason


def test_rivals_have_both_layouts_where_there_are_images_and_slow_modes_the_usual_one():
    def names(peer, *shape):
        inputs = SimpleNamespace(dim=lambda: len(shape), is_cuda=True)
        return [name for name, _ in peers._variants(peer, inputs, peers.COMPILE_MODES)]

    both = ["channels-last", "contiguous"]
    assert names("eager", 2, 3, 8, 8) == names("graph", 2, 3, 8, 8) == both
    assert names("eager", 2, 8) == ["contiguous"]
    assert names("compile", 2, 3, 8, 8) == [
        "reduce-overhead, frozen, channels-last",
        "reduce-overhead, frozen, contiguous",
        "max-autotune, frozen, channels-last",
    ]
    assert names("compile", 2, 8) == ["reduce-overhead, frozen, contiguous", "max-autotune, frozen, contiguous"]
    assert names("torch_tensorrt", 2, 3, 8, 8) == ["its own CUDA graphs"]


def test_the_fastest_variant_of_a_peer_is_the_one_that_stays(monkeypatch):
    def takes(seconds):
        return lambda module, images, stay: (lambda: time.sleep(seconds) or images, None)

    variants = [("slow", takes(0.05)), ("quick", takes(0.001)), ("slower", takes(0.1))]
    monkeypatch.setattr(peers, "_variants", lambda peer, inputs, modes: variants)
    built = peers.build("eager", torch.nn.Conv2d(3, 2, 1).eval(), "fp32", torch.randn(1, 3, 8, 8), None)
    assert built.variant == "quick"
    assert all(name in built.notes[0] for name in ("slow: ", "quick: ", "slower: "))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is the run of a machine without a GPU")
def test_from_end_to_end_on_a_cpu(tmp_path):
    path = tmp_path / "out.json"
    command = f"-m benchmarks.resnet18 --batch 1 --precision fp32 --runs 3 --json {path} --backend eager --peers eager"
    done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    content = json.loads(path.read_text())
    assert results_file.problems(content) == []
    own, peer = content["rows"]
    assert (own["route"], own["backend"], own["precision"], own["batch"], own["samples"]) == (
        "torchaccel",
        "eager",
        "fp32",
        1,
        3,
    )
    assert own["relative_error"] < 1e-5
    assert own["p95_ms"] is own["p99_ms"] is own["h2d_ms"] is None
    assert own["input_shape"] == [1, 3, 224, 224]
    assert peer["route"] == "peer"
    assert content["settings"]["seed"] == 0
    words = " ".join(done.stdout.split())
    assert "No GPU was found: this measured the CPU" in words
    assert "through eager. Nothing here is a GPU figure." in words
    assert "Timed calls per row: 3." in words
    assert all(" ".join(line.split()) in words for line in content["conclusion"])
    assert str(path) in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU has no TF32")
def test_a_precision_that_the_machine_has_not_is_refused_with_its_reason(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(resnet18, "SHAPE", (3, 32, 32))
    path = tmp_path / "out.json"
    arguments = f"--batch 1 --precision tf32 --runs 1 --backend eager --json {path}"
    assert resnet18.main(arguments.split()) == 1
    (only,) = json.loads(path.read_text())["rows"]
    assert (only["precision"], only["median_ms"]) == ("tf32", None)
    assert "TF32" in only["reason"]
    assert "eager: not run" in capsys.readouterr().out
