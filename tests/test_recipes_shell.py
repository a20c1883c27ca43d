"""The shell recipes, run for real beside a faked nvidia-smi, pip, PyTorch, test suite and benchmark."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"
TOOLS = "bash cat cp cut date dirname head ln mkdir mktemp realpath rm sed sleep sort tee timeout tr"

# Python, but blind to its site-packages: it sees what lies in $FAKE_SITE. pip "installs" into that; what would be run
# as a module answers from the environment.
FAKE_PYTHON = """#!/bin/bash
echo "$*" >>"$FAKE_LOG"
case "$*" in
  "-m pip install"*)
    shift 3
    for argument in "$@"; do
      [[ ! $argument =~ $FAKE_UNKNOWN ]] || { echo "ERROR: No matching distribution found for $argument"; exit 1; }
    done
    previous=""
    for argument in "$@"; do
      case "$previous" in
        -e) ln -sfn "${argument%%\\[*}/torchaccel" "$FAKE_SITE/torchaccel" ;;
        --*) ;;
        *)
          name=${argument%%[=>]*}
          case "$argument" in
            torch-tensorrt==*) version=2.11.0 ;;
            tensorrt-*) version=10.15.1 ;;
            *) version="" ;;
          esac
          if [ -n "$version" ]; then
            info="$FAKE_SITE/${name//-/_}-$version.dist-info"
            mkdir -p "$info"
            printf 'Metadata-Version: 2.1\\nName: %s\\nVersion: %s\\n' "$name" "$version" >"$info/METADATA"
          fi ;;
      esac
      previous=$argument
    done ;;
  "-m torchaccel env"*) echo "the table of the environment" ;;
  "-m pytest"*)
    echo "output of the tests"
    while [ $# -gt 0 ]; do [ "$1" != --junitxml ] || [ -z "$FAKE_JUNIT" ] || cp "$FAKE_JUNIT" "$2"; shift; done
    exit "${FAKE_TESTS_STATUS:-0}" ;;
  "-m benchmarks.resnet18"*)
    echo "output of the benchmark"
    [ -z "$FAKE_BENCHMARK_S" ] || exec sleep "$FAKE_BENCHMARK_S"
    while [ $# -gt 0 ]; do [ "$1" != --json ] || [ -z "$FAKE_BENCHMARK" ] || cp "$FAKE_BENCHMARK" "$2"; shift; done
    exit "${FAKE_BENCHMARK_STATUS:-0}" ;;
  *) exec "$REAL_PYTHON" -S "$@" ;;
esac
"""
FAKE_ENVIRONMENT = """
from types import SimpleNamespace
def environment(): return SimpleNamespace(to_dict=lambda: {"torch": "2.11.0", "problems": []})
"""
JUNIT = """<testsuites><testsuite>
<testcase classname="tests.gpu.test_a" name="test_good"/>
<testcase classname="tests.gpu.test_a" name="test_other"/>
<testcase classname="tests.gpu.test_a" name="test_skipped"><skipped message="needs two GPUs"/></testcase>
{more}</testsuite></testsuites>"""
FAILURES = """<testcase classname="tests.gpu.test_a" name="test_bad"><failure message="assert 1 == 2"/></testcase>
<testcase classname="tests.gpu.test_b" name="test_worse"><error message="fixture failed"/></testcase>"""


class Machine:
    """A path with nothing but basic tools, a faked nvidia-smi and python, and a site-packages with a faked PyTorch."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin, self.site, self.log = folder, folder / "bin", folder / "site", folder / "python.log"
        self.bin.mkdir()
        self.site.mkdir()
        for tool in TOOLS.split():
            (self.bin / tool).symlink_to(str(shutil.which(tool)))
        self.script("python", FAKE_PYTHON)
        self.settings = {
            "FAKE_UNKNOWN": "^nothing$",
            "FAKE_JUNIT": "",
            "FAKE_BENCHMARK": "",
            "FAKE_BENCHMARK_S": "",
        }

    def script(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def gpu(self, line: str = "Tesla T4, 7.5, 550.54.15") -> None:
        self.script("nvidia-smi", f"#!/bin/bash\necho '{line}'\n")

    def torch(self, version: str = "2.11.0+cu128", cuda: str | None = "12.8", usable: bool = True) -> None:
        for name, number in (("torch", version), ("torchvision", "0.26.0+cu128")):
            info = self.site / f"{name}-{number}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n")
        (self.site / "torch.py").write_text(
            f"class version: cuda = {cuda!r}\nclass cuda: is_available = staticmethod(lambda: {usable})\n"
        )

    def run(self, recipe: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        self.log.write_text("")
        environment = {
            "PATH": str(self.bin),
            "PYTHONPATH": str(self.site),
            "PYTHONDONTWRITEBYTECODE": "1",
            "REAL_PYTHON": sys.executable,
            "FAKE_SITE": str(self.site),
            "FAKE_LOG": str(self.log),
            "TMPDIR": str(self.folder),
            **self.settings,
            **settings,
        }
        return subprocess.run(
            ["bash", str(recipe), *arguments],
            capture_output=True,
            text=True,
            env=environment,
            cwd=self.folder,
            check=False,
            timeout=120,
        )

    def installs(self) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if line.startswith("-m pip install")]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.sh")), ids=lambda path: path.name)
def test_every_shell_recipe_parses_and_can_be_executed(recipe: Path) -> None:
    subprocess.run(["bash", "-n", str(recipe)], check=True)
    assert os.access(recipe, os.X_OK)
    assert "set -euo pipefail" in recipe.read_text()


# ---- setup_colab.sh ----

SETUP = RECIPES / "setup_colab.sh"
KEEP = "torch==2.11.0+cu128 torchvision==0.26.0+cu128"
WHEELS = "--extra-index-url https://download.pytorch.org/whl/cu128"
EDITABLE = "--config-settings editable_mode=compat -e"


def test_dry_run_prints_the_commands_and_runs_none(machine: Machine) -> None:
    machine.gpu()
    machine.torch()
    done = machine.run(SETUP, "--dry-run")
    assert done.returncode == 0, done.stderr
    install, show = done.stdout.replace("\\", "").split("\n")[:2]
    wanted = f"-m pip install torch-tensorrt==2.11.* {EDITABLE} {ROOT}[tensorrt] {KEEP} {WHEELS}"
    assert install.rstrip() == f"{machine.bin}/python {wanted}"
    assert show.rstrip() == f"{machine.bin}/python -m torchaccel env"
    assert machine.installs() == []
    assert "Tesla T4, compute capability 7.5, driver 550.54.15" in done.stderr


def test_it_installs_and_shows_and_a_second_run_installs_nothing(machine: Machine) -> None:
    machine.gpu()
    machine.torch()
    first = machine.run(SETUP)
    assert first.returncode == 0, first.stderr
    assert machine.installs() == [f"-m pip install torch-tensorrt==2.11.* {EDITABLE} {ROOT}[tensorrt] {KEEP} {WHEELS}"]
    assert first.stdout.endswith("the table of the environment\n")
    assert "restart the session" in first.stderr
    second = machine.run(SETUP)
    assert second.returncode == 0, second.stderr
    assert machine.installs() == []
    assert second.stdout == "the table of the environment\n"
    assert "restart the session" not in second.stderr


def test_torch_tensorrt_of_another_minor_version_is_replaced(machine: Machine) -> None:
    machine.gpu()
    machine.torch()
    machine.run(SETUP)
    shutil.move(machine.site / "torch_tensorrt-2.11.0.dist-info", machine.folder / "old")
    text = (machine.folder / "old" / "METADATA").read_text().replace("2.11.0", "2.9.0")
    (machine.site / "torch_tensorrt-2.9.0.dist-info").mkdir()
    (machine.site / "torch_tensorrt-2.9.0.dist-info" / "METADATA").write_text(text)
    assert machine.run(SETUP).returncode == 0
    assert machine.installs() == [f"-m pip install torch-tensorrt==2.11.* {KEEP} {WHEELS}"]


def test_without_a_matching_torch_tensorrt_the_rest_is_installed(machine: Machine) -> None:
    machine.gpu()
    machine.torch()
    done = machine.run(SETUP, FAKE_UNKNOWN="^torch-tensorrt")
    assert done.returncode == 0, done.stderr
    assert "no torch-tensorrt 2.11 for CUDA 12.8" in done.stderr
    assert machine.installs()[1:] == [
        f"-m pip install {EDITABLE} {ROOT} {KEEP}",
        "-m pip install tensorrt-cu12>=10.13",
    ]
    assert done.stdout.endswith("the table of the environment\n")
    again = machine.run(SETUP, FAKE_UNKNOWN="^torch-tensorrt")
    assert again.returncode == 0
    assert machine.installs() == [f"-m pip install torch-tensorrt==2.11.* {KEEP} {WHEELS}"]  # tried, in vain


def test_without_any_tensorrt_torchaccel_is_installed_alone(machine: Machine) -> None:
    machine.gpu()
    machine.torch()
    done = machine.run(SETUP, FAKE_UNKNOWN="^(torch-)?tensorrt")
    assert done.returncode == 0, done.stderr
    assert (machine.site / "torchaccel").is_symlink()
    assert "no TensorRT for CUDA 12" in done.stderr
    assert done.stdout.endswith("the table of the environment\n")


def test_pip_failing_altogether_is_an_error(machine: Machine) -> None:
    machine.gpu()
    machine.torch()
    done = machine.run(SETUP, FAKE_UNKNOWN=".")
    assert done.returncode != 0
    assert "pip could not install torchaccel" in done.stderr
    assert "the table of the environment" not in done.stdout


def test_a_gpu_too_old_for_tensorrt_gets_torchaccel_alone(machine: Machine) -> None:
    machine.gpu("Tesla V100-SXM2-16GB, 7.0, 550.54.15")
    machine.torch()
    done = machine.run(SETUP)
    assert done.returncode == 0
    assert machine.installs() == [f"-m pip install {EDITABLE} {ROOT} {KEEP} {WHEELS}"]
    assert "needs compute capability 7.5, and this GPU has 7.0" in done.stderr
    (machine.site / "torchaccel").unlink()
    assert machine.run(SETUP, FAKE_UNKNOWN=".").returncode != 0
    assert len(machine.installs()) == 1  # nothing else is tried


def test_a_gpu_of_two_digits_is_not_too_old(machine: Machine) -> None:
    machine.gpu("NVIDIA B200, 10.0, 580.95.05")
    machine.torch("2.11.0", "13.0")
    done = machine.run(SETUP, "--dry-run")
    assert "torch-tensorrt" in done.stdout
    assert "whl/cu130" in done.stdout


def test_no_gpu_is_a_clear_error(machine: Machine) -> None:
    machine.torch()
    done = machine.run(SETUP)
    assert done.returncode != 0
    assert "this runtime has no NVIDIA GPU: choose Runtime > Change runtime type" in done.stderr
    machine.script("nvidia-smi", "#!/bin/bash\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    assert machine.run(SETUP).returncode != 0
    assert machine.installs() == []


@pytest.mark.parametrize(
    ("version", "cuda", "usable", "message"),
    [
        ("2.9.1+cu128", "12.8", True, "torchaccel needs PyTorch 2.11 or newer, and this runtime has 2.9.1"),
        ("2.11.0+cpu", None, True, "built without CUDA"),
        ("2.11.0+cu130", "13.0", False, "PyTorch (CUDA 13.0) cannot use the GPU with driver 550.54.15"),
    ],
)
def test_a_pytorch_that_will_not_do_is_a_clear_error(
    machine: Machine, version: str, cuda: str | None, usable: bool, message: str
) -> None:
    machine.gpu()
    machine.torch(version, cuda, usable)
    done = machine.run(SETUP)
    assert done.returncode != 0
    assert message in done.stderr
    assert machine.installs() == []


def test_no_pytorch_and_wrong_arguments_are_clear_errors(machine: Machine) -> None:
    machine.gpu()
    assert "this Python has no PyTorch" in machine.run(SETUP).stderr
    done = machine.run(SETUP, "--dry")
    assert done.returncode != 0
    assert "unknown argument --dry; the only one is --dry-run" in done.stderr


# ---- verify_gpu.sh ----


@pytest.fixture
def checkout(machine: Machine) -> Path:
    """A checkout whose environment can be described without PyTorch; returns its verify_gpu.sh."""
    machine.gpu("NVIDIA A10G")
    root = machine.folder / "checkout"
    (root / "recipes").mkdir(parents=True)
    (root / "torchaccel").mkdir()
    (root / "torchaccel" / "__init__.py").touch()
    (root / "torchaccel" / "environment.py").write_text(FAKE_ENVIRONMENT)
    fake_provenance = 'def provenance(): return {"environment": {}, "commit": "c0ffee", "tree": "7ree"}'
    (root / "torchaccel" / "provenance.py").write_text(fake_provenance)
    machine.settings["PYTHONPATH"] = str(root)
    machine.settings["FAKE_JUNIT"] = str(machine.folder / "junit.xml")
    machine.settings["FAKE_BENCHMARK"] = str(machine.folder / "benchmark.json")
    (machine.folder / "junit.xml").write_text(JUNIT.format(more=""))
    rows = [{"model": "resnet18", "route": "torchaccel", "median_ms": 0.2}]
    (machine.folder / "benchmark.json").write_text(
        json.dumps({"schema": 1, "tree": "from the benchmark", "rows": rows})
    )
    return Path(shutil.copy(RECIPES / "verify_gpu.sh", root / "recipes"))


def test_verify_writes_one_file_with_everything(machine: Machine, checkout: Path) -> None:
    done = machine.run(checkout, "out/result.json", "--compile-modes", "reduce-overhead")
    assert done.returncode == 0, done.stderr
    result = json.loads((machine.folder / "out" / "result.json").read_text())
    assert result["ok"] is True
    assert result["wrong"] == []
    assert (result["schema"], result["commit"], result["tree"]) == (1, "c0ffee", "7ree")
    assert result["environment"] == {"torch": "2.11.0", "problems": []}
    assert {key: result["tests"][key] for key in ("passed", "failed", "errors", "skipped")} == {
        "passed": 2,
        "failed": 0,
        "errors": 0,
        "skipped": 1,
    }
    assert result["tests"]["skips"] == [{"test": "tests.gpu.test_a::test_skipped", "reason": "needs two GPUs"}]
    assert result["rows"] == [{"model": "resnet18", "route": "torchaccel", "median_ms": 0.2}]
    assert [(part["name"], part["exit_status"]) for part in result["parts"]] == [
        ("environment", 0),
        ("tests", 0),
        ("benchmark", 0),
    ]
    assert result["parts"][2]["log_tail"] == ["output of the benchmark"]
    assert "-m benchmarks.resnet18 --peers --json" in machine.log.read_text()
    assert "benchmark.json --compile-modes reduce-overhead" in machine.log.read_text()
    assert [path.name for path in (machine.folder / "out").iterdir()] == ["result.json"]  # no temporary left
    assert "output of the tests" in done.stdout


def test_verify_goes_on_after_failing_tests(machine: Machine, checkout: Path) -> None:
    (machine.folder / "junit.xml").write_text(JUNIT.format(more=FAILURES))
    done = machine.run(checkout, "result.json", FAKE_TESTS_STATUS="1")
    assert done.returncode == 1
    result = json.loads((machine.folder / "result.json").read_text())
    assert result["ok"] is False
    assert result["wrong"] == ["tests ended with status 1"]
    assert (result["tests"]["failed"], result["tests"]["errors"]) == (1, 1)
    assert [failure["test"] for failure in result["tests"]["failures"]] == [
        "tests.gpu.test_a::test_bad",
        "tests.gpu.test_b::test_worse",
    ]
    assert len(result["rows"]) == 1  # the benchmark ran all the same
    assert "tests failed with status 1; going on" in done.stderr
    assert "NOT all passed" in done.stderr


def test_verify_with_every_part_failing_still_writes(machine: Machine, checkout: Path) -> None:
    (checkout.parents[1] / "torchaccel" / "environment.py").write_text("raise RuntimeError('broken')")
    settings = {"FAKE_TESTS_STATUS": "4", "FAKE_BENCHMARK_STATUS": "1", "FAKE_JUNIT": "", "FAKE_BENCHMARK": ""}
    done = machine.run(checkout, "result.json", **settings)
    assert done.returncode == 1
    result = json.loads((machine.folder / "result.json").read_text())
    assert [part["exit_status"] for part in result["parts"]] == [1, 4, 1]
    assert "RuntimeError: broken" in result["parts"][0]["log_tail"][-1]
    assert {"no GPU test passed", "the benchmark left no rows"} <= set(result["wrong"])
    assert result["environment"] is result["tree"] is None


def test_verify_takes_the_tree_from_the_benchmark_if_it_must(machine: Machine, checkout: Path) -> None:
    (checkout.parents[1] / "torchaccel" / "environment.py").write_text("raise RuntimeError('broken')")
    machine.run(checkout, "result.json")
    assert json.loads((machine.folder / "result.json").read_text())["tree"] == "from the benchmark"


def test_verify_does_not_take_skipped_tests_for_a_success(machine: Machine, checkout: Path) -> None:
    only_skips = JUNIT.format(more="").replace('name="test_good"/>', 'name="g"><skipped/></testcase>')
    (machine.folder / "junit.xml").write_text(
        only_skips.replace('name="test_other"/>', 'name="o"><skipped/></testcase>')
    )
    assert machine.run(checkout, "result.json").returncode == 1
    assert json.loads((machine.folder / "result.json").read_text())["wrong"] == ["no GPU test passed"]


def test_verify_stops_a_part_that_hangs(machine: Machine, checkout: Path) -> None:
    done = machine.run(checkout, "result.json", VERIFY_LIMIT_S="1", FAKE_BENCHMARK_S="60")
    assert done.returncode == 1
    result = json.loads((machine.folder / "result.json").read_text())
    assert result["parts"][2]["exit_status"] == 124
    assert result["tests"]["passed"] == 2


def test_verify_names_its_file_after_the_gpu(machine: Machine, checkout: Path) -> None:
    assert machine.run(checkout).returncode == 0
    (written,) = machine.folder.glob("torchaccel-*.json")
    assert written.name.startswith("torchaccel-nvidia-a10g-2")


def test_verify_without_a_gpu_is_a_clear_error(machine: Machine, checkout: Path) -> None:
    (machine.bin / "nvidia-smi").unlink()
    done = machine.run(checkout, "result.json")
    assert done.returncode == 2
    assert "finds no NVIDIA GPU" in done.stderr
    assert not (machine.folder / "result.json").exists()
    assert machine.log.read_text() == ""
