"""The wheel ships torchaccel alone, with its extras; a file imports only from lines above its own."""

import configparser
import email
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from pathlib import Path

import pytest

import torchaccel

ROOT = Path(torchaccel.__file__).parents[1]
needs_sources = pytest.mark.skipif(not (ROOT / "setup.cfg").is_file(), reason="torchaccel is installed, not a checkout")
pytestmark = needs_sources


def has_setuptools(major: int) -> bool:
    try:
        return int(importlib.metadata.version("setuptools").split(".")[0]) >= major
    except importlib.metadata.PackageNotFoundError:
        return False


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the files that git would have."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("torchaccel", "tests", "benchmarks", "recipes"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(target), str(source)]
    if has_setuptools(77):
        command.append("--no-build-isolation")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_string(archive.read(name).decode())


def test_the_wheel_holds_torchaccel_alone_and_all_of_it(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    packages = {name.split("/")[0] for name in names}
    assert {name for name in packages if not name.endswith(".dist-info")} == {"torchaccel"}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "torchaccel").rglob("*.py")}
    sources |= {"torchaccel/py.typed", "torchaccel/watch.cpp"}
    assert {name for name in names if name.startswith("torchaccel/")} == sources
    assert any(name.endswith("LICENSE") for name in names)


def test_the_wheel_is_for_every_platform_and_has_the_command(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "torchaccel = torchaccel.__main__:main" in archive.read(name).decode()


def test_torch_compile_finds_the_installed_backend_by_its_name(wheel: Path, tmp_path: Path) -> None:
    script = """
import torch
module, x = torch.nn.Linear(4, 2), torch.ones(3, 4)
assert "torchaccel" in torch.compiler.list_backends()
fast = torch.compile(module, backend="torchaccel", options={"precision": "fp32", "backend": "eager"})
with torch.no_grad():
    assert torch.equal(fast(x), module(x))
import torchaccel
(model,) = torchaccel.dynamo.models()
assert model.report().calls_by_engine == 1
print(torchaccel.__file__)
"""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)  # what pip does with a wheel of Python alone
    command = [sys.executable, "-W", "error", "-c", script]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(tmp_path)


def test_the_metadata_has_the_extras(metadata: Message) -> None:
    assert metadata["Name"] == "torchaccel"
    assert "Apache-2.0" in (metadata["License-Expression"], metadata["License"])
    assert set(metadata.get_all("Provides-Extra", [])) >= {"tensorrt", "rtx", "test", "dev"}


def test_the_rtx_extra_is_bounded_on_both_sides(metadata: Message) -> None:
    requirements = [line for line in metadata.get_all("Requires-Dist", []) if re.search(r"extra == .rtx.", line)]
    (line,) = (line for line in requirements if line.startswith("torch-tensorrt-rtx"))
    assert ">=" in line
    assert "<" in line


def test_nothing_that_only_tests_need_is_installed_with_it(metadata: Message) -> None:
    needed = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    names = {re.split(r"[^\w.-]", line)[0].lower() for line in needed}
    assert names >= {"torch", "numpy", "rich", "onnx", "onnxscript"}
    assert not names & {"pytest", "hypothesis", "transformers", "tensorrt", "torch-tensorrt", "tensorrt-rtx", "ruff"}


def test_imports_go_up_only_and_tensorrt_is_imported_in_one_file() -> None:
    pytest.importorskip("importlinter")
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_every_file_of_the_package_has_its_line_in_the_layers() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = set(re.split(r"[\s|]+", config["importlinter:contract:layers"]["layers"].strip()))
    folder = ROOT / "torchaccel"
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in folder.rglob("*.py")
        if path.name != "__init__.py"
    }
    assert files == listed
