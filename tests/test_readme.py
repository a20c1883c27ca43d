"""README.md: its tables are those of the result files, its commands are commands, its examples run."""

import configparser
import doctest
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torchvision
from torch._dynamo.backends import registry

import torchaccel
from benchmarks import readme_table, results_file
from benchmarks.readme_table import BLOCK, block, measured_commit, render, tree_of, updated
from tests.models import small_conv_net
from torchaccel import compiler
from torchaccel.backends.inductor import Inductor
from torchaccel.race import Racer

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
RESULTS = sorted(results_file.RESULTS.glob("*/*.json"))
IN_GIT = subprocess.run(("git", "-C", str(ROOT), "rev-parse", "HEAD"), capture_output=True, check=False).returncode == 0
SHALLOW = (ROOT / ".git" / "shallow").exists()
with_results = pytest.mark.skipif(not RESULTS, reason="no result file is committed yet")


def fenced(text, language):
    """The blocks of code of a language, each with the number of its first line."""
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(text.count("\n", 0, match.start(1)) + 1, match[1]) for match in found]


# --- tables ---


def made_row(**fields):
    row = {"model": "resnet18", "route": "torchaccel", "backend": "torch_tensorrt", "precision": "fp16", "batch": 32}
    row |= {"median_ms": 0.5, "p95_ms": 0.625, "replay_median_ms": 0.25, "throughput_fps": 64000.0, "reason": None}
    return row | {"gain": {"value": 9.876, "low": 9.75, "high": 10.0}, "relative_error": 7.25e-4} | fields


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_row_shows_its_figures_under_their_headings():
    heading, rule, row = render([made_row()]).splitlines()
    assert len(cells(rule)) == len(cells(heading))
    shown = dict(zip(cells(heading), cells(row), strict=True))
    assert {shown["precision"], shown["batch"], shown["route"]} == {"fp16", "32", "torch_tensorrt"}
    assert float(shown["call, median ms"]) == 0.5
    assert float(shown["p95 ms"]) == 0.625
    assert float(shown["graph replay, median ms"]) == 0.25
    assert float(shown["images/s"]) == 64000
    assert shown["gain over fp32 (95 % interval)"] == "9.88 (9.75 to 10.00)"
    assert shown["relative error"] == "7e-04"


def test_rivals_and_the_module_itself_are_told_apart():
    rows = [made_row(route="baseline", backend="eager"), made_row(route="peer", backend="torch.compile")]
    first, second = render(rows).splitlines()[2:]
    assert cells(first)[2] == "the module itself (eager)"
    assert cells(second)[2] == "peer: torch.compile"


def test_what_was_not_measured_is_said_under_the_table():
    nothing = dict.fromkeys(("median_ms", "p95_ms", "replay_median_ms", "throughput_fps", "gain", "relative_error"))
    lines = render([made_row(**nothing, precision="fp32", reason="it computes\n in TF32"), made_row()]).splitlines()
    assert len([line for line in lines if line.startswith("|")]) == 3
    assert lines[-1] == "- fp32 at batch 32, torch_tensorrt: not measured: it computes in TF32"


def test_a_figure_that_is_missing_is_a_dash():
    assert cells(render([made_row(replay_median_ms=None, gain=None)]).splitlines()[-1])[5::2] == ["-", "-"]
    one_round = {"value": 2.0, "low": None, "high": None}
    assert cells(render([made_row(gain=one_round)]).splitlines()[-1])[7] == "2.00"


@pytest.fixture
def checkout(tmp_path):
    """A git checkout with a package, one result file measured on it, and a README with a table of that."""

    def git(*command):
        identity = ("-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false")
        done = subprocess.run(("git", *identity, *command), cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init", "-q")
    (tmp_path / "torchaccel").mkdir()
    (tmp_path / "torchaccel" / "a.py").write_text("1\n")
    git("add", ".")
    git("commit", "-qm", "first")
    content = {"rows": [made_row()], "environment": {"gpus": [{"name": "NVIDIA X"}], "torch": "2.11.0", "cpu": "C"}}
    content |= {"tree": git("rev-parse", "HEAD:torchaccel"), "commit": None, "settings": {"weights": "none"}}
    (tmp_path / "r.json").write_text(json.dumps(content))
    return tmp_path, content, git


def test_a_table_is_made_anew_from_its_file_and_names_the_commit(checkout):
    root, content, git = checkout
    first = git("rev-parse", "HEAD")
    (root / "other").touch()
    git("add", ".")
    git("commit", "-qm", "second")
    text = updated("before\n<!-- results: r.json -->\nold\n<!-- /results -->\nafter\n", root)
    assert text.startswith("before\n<!-- results: r.json -->\n\nresnet18 on NVIDIA X; weights: none; PyTorch 2.11.0; ")
    assert text.endswith("\n\n<!-- /results -->\nafter\n")
    assert f"commit `{first}`" in text
    assert render(content["rows"]) in text
    assert updated(text, root) == text
    assert measured_commit(content | {"commit": git("rev-parse", "HEAD")}, root) == git("rev-parse", "HEAD")


def test_a_table_of_code_that_no_commit_has_is_refused(checkout):
    root, content, git = checkout
    with pytest.raises(ValueError, match="no commit has the torchaccel/ that was measured"):
        measured_commit(content | {"tree": "0" * 40, "commit": git("rev-parse", "HEAD")}, root)


def test_the_command_tells_and_rewrites(checkout, monkeypatch):
    root, _, _ = checkout
    monkeypatch.setattr(readme_table, "ROOT", root)
    monkeypatch.setattr(readme_table, "updated", lambda text: updated(text, root))
    readme = root / "README.md"
    readme.write_text("<!-- results: r.json -->\n<!-- /results -->\n")
    with pytest.raises(SystemExit, match="does not agree with its result files"):
        readme_table.main([])
    readme_table.main(["--write"])
    readme_table.main([])
    (root / "r.json").unlink()
    with pytest.raises(SystemExit, match=r"README\.md: .*r\.json"):
        readme_table.main(["--write"])


def test_every_table_has_its_two_lines():
    assert len(BLOCK.findall(README)) == README.count("<!-- results:") == README.count("<!-- /results -->") > 0


@with_results
@pytest.mark.parametrize("match", list(BLOCK.finditer(README)), ids=lambda match: match[1])
def test_the_tables_agree_with_their_files_and_name_their_commits(match):
    assert (ROOT / match[1]).is_file(), f"README.md has a table of {match[1]}, which is not there"
    content = json.loads((ROOT / match[1]).read_text(encoding="utf-8"))
    shown = match[0].removeprefix(match[1] + match[2])
    named = re.search(r"commit `([0-9a-f]{40})`", shown)
    assert named, "the table names no commit"
    assert shown == block(content, match[1], named[1]), "run `python -m benchmarks.readme_table --write`"
    if IN_GIT and not SHALLOW:
        assert tree_of(named[1], ROOT) == content["tree"], "the commit is not the one that was measured"


# --- commands ---


@pytest.mark.parametrize(
    ("line", "commands"), [*fenced(README, "bash"), *fenced(CONTRIBUTING, "bash")], ids=lambda value: str(value)[:40]
)
def test_every_command_is_bash(line, commands):
    done = subprocess.run(("bash", "-n"), input=commands, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"line {line}: {done.stderr}"


def test_the_test_command_stands_where_ci_reads_it():
    (read_it,) = re.findall(r"^command=(.*)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    command = f"command={read_it}; printf '%s\n' \"$command\""
    done = subprocess.run(("bash", "-c", command), cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout in [block for _, block in fenced(README, "bash")]
    lines = done.stdout.splitlines()
    assert lines[0] == "python3 -m venv .venv"
    assert lines[-1].split()[:3] == ["python", "-m", "pytest"]


def test_commands_name_what_there_is():
    text = README + CONTRIBUTING
    setup = (ROOT / "setup.cfg").read_text()
    for module in set(re.findall(r"python -m ((?:torchaccel|benchmarks|recipes)[\w.]*)", text)):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
    for extra in {name for names in re.findall(r'-e "\.\[([\w,]+)\]"', text) for name in names.split(",")}:
        assert re.search(rf"^{extra} =$", setup, re.MULTILINE), extra
    for path in set(re.findall(r"\b(?:recipes|tests|torchaccel|benchmarks)/[\w/]+\.\w+", text)):
        assert (ROOT / path).exists() or (ROOT / path.removeprefix("torchaccel/")).exists(), path


# --- what it says ---


def test_the_first_thing_said_is_that_tensorrt_is_an_extra():
    said = README.partition("```")[0]
    assert "`torch-tensorrt` and `tensorrt` are extras" in said


def test_the_bounds_are_those_of_the_gate():
    for name, row in torchaccel.PRECISIONS.items():
        assert f"| `{name}` | {row.bound:g} | {row.spread} |" in README


def test_every_extra_has_its_row():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    table = README.partition("| extra |")[2].partition("\n\n")[0]
    first = [line.split("|")[1] for line in table.splitlines()[1:]]
    assert set(re.findall(r"`(\w+)`", " ".join(first))) == set(setup["options.extras_require"])


def test_every_backend_has_its_row():
    for row in torchaccel.backends():
        assert f"\n| `{row.name}` |" in README


@pytest.fixture
def entry_points(tmp_path, monkeypatch):
    """The package's entry points where Python looks for those of what is installed, which a checkout is not."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    folder = tmp_path / "torchaccel-0.1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: torchaccel\nVersion: 0.1.0\n")
    groups = setup["options.entry_points"].items()
    (folder / "entry_points.txt").write_text("".join(f"[{name}]{lines}\n" for name, lines in groups))
    monkeypatch.syspath_prepend(tmp_path)
    for cached in (registry._lazy_import, registry._discover_entrypoint_backends):
        cached.cache_clear()


def test_the_examples_run(monkeypatch, capsys, entry_points):
    """As one session, on a small network in the place of ResNet-18."""
    monkeypatch.setattr(torchvision.models, "resnet18", lambda: small_conv_net(1000))
    if not torch.cuda.is_available():
        monkeypatch.setattr(Inductor, "unavailable", lambda _: "the test has no time for a compiler")
        monkeypatch.setattr(compiler, "FIELD", (compiler.BACKENDS["eager"],))
    monkeypatch.setattr(sys.modules[Racer.__module__], "SAMPLES", (5,))
    session = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torchaccel.BackendWarning)
        for line, code in fenced(README, "python"):
            exec(compile("\n" * (line - 1) + code, "README.md", "exec"), session)
    assert session["logits"].shape == (8, 1000)
    assert session["model"].report().calls_by_engine == 1
    assert session["model"].report().calls_by_module == 1
    assert "torch.Size([8, 1000]) torch.Size([3, 1000])" in capsys.readouterr().out
    # examples with prompts, if there are any, are doctests
    assert doctest.testfile(str(ROOT / "README.md"), module_relative=False).failed == 0
